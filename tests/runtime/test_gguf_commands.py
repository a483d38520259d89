"""The commands on a model.gguf: whole transcripts, the text that llama.cpp itself gives, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import small_tensors
from support.tiny_gguf import HASH, gguf_tensors, tiny_adapter, tiny_config, tiny_gguf
from support.tiny_model import CHAT_TEMPLATE, tiny_checkpoint, tiny_model

from fbiedge.bench import weight_bytes_per_token
from fbiedge.chat import Chat
from fbiedge.engines import is_gguf, open_session
from fbiedge.generate import GenerationOptions, GenerationStats, Piece, PromptProgress, end_tokens, generate
from fbiedge.inspection import inspect
from fbiedge.llama_cpp_session import LlamaCppSession
from fbiedge.sample_text import SAMPLE_TEXT
from fbiedge.sampling import Sampler, SamplingOptions
from fbiedge.tokenizer import Tokenizer

from .conftest import Run, one_error_line

ONE = ["--threads", 1]  # two would wait for one another on a busy machine
GREEDY = ["--temperature", 0, "--seed", 0, *ONE]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf with a context of 512, its checkpoint beside it."""
    return tiny_gguf(tmp_path_factory.mktemp("gguf"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(
        tmp_path_factory.mktemp("chat"),
        metadata={"tokenizer.chat_template": CHAT_TEMPLATE},
        max_position_embeddings=512,
    )


def llama_cpp_greedy(path: Path, prompt: str, count: int) -> tuple[list[int], bytes]:
    """Ids and text by llama-cpp-python's own tokenizer, sampler and detokenizer."""
    from llama_cpp import Llama

    llama = Llama(str(path), n_ctx=512, flash_attn=True, verbose=False)
    ids: list[int] = []
    for token in llama.generate(llama.tokenize(prompt.encode(), special=True), temp=0.0, repeat_penalty=1.0):
        if token == llama.token_eos() or len(ids) == count:
            break
        ids.append(token)
    text = llama.detokenize(ids)
    llama.close()
    return ids, text


@pytest.mark.parametrize("prompt", ["Hello", "the there is", ""])
def test_greedy_text_is_llama_cpps_own(fbiedge: Run, model: Path, prompt: str) -> None:
    _, expected = llama_cpp_greedy(model, prompt, 64)
    code, out, err = fbiedge("generate", model, "-p", prompt, "--max-tokens", 64, *GREEDY)
    assert code == 0
    assert out.removesuffix("\n") == expected.decode("utf-8", "replace").removesuffix("\n")
    assert re.fullmatch(
        r"prefill \d+ tokens, \d+ tok/s · decode \d+ tokens, [\d.]+ tok/s · context \d+/512 · ended by [^·]+"
        r" · llama\.cpp \(llama-cpp-python [\d.]+\), F32 layers, \d+ threads?, context 512\n",
        err,
    )


class Recording:
    """A session, and every row of logits that it gave to pick from."""

    def __init__(self, session: LlamaCppSession) -> None:
        self._session = session
        self.rows: list[np.ndarray] = []
        self.capacity = session.capacity
        self.reuse = session.reuse

    @property
    def position(self) -> int:
        return self._session.position

    def forward(self, ids: Sequence[int], *, copy: bool = True) -> np.ndarray:
        logits = self._session.forward(ids)
        self.rows.append(logits)
        return logits


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
)
def test_options_pick_what_they_pick_from_the_same_logits_elsewhere(model: Path, options: dict[str, float]) -> None:
    session = LlamaCppSession.open(model, threads=1)
    engine, tokenizer = Recording(session), Tokenizer.from_model(session.model)
    sampling = SamplingOptions(seed=7, **options)  # type: ignore[arg-type]
    prompt = tokenizer.encode("Hello")
    *_, stats = generate(
        engine, tokenizer, prompt, GenerationOptions(max_tokens=40, sampling=sampling), ends=frozenset()
    )
    assert isinstance(stats, GenerationStats) and stats.generated_tokens == 40
    sampler, picked = Sampler(sampling), list[int]()
    for row in engine.rows:
        picked.append(sampler.sample(row, [*prompt, *picked][-64:]))
    assert tuple(picked) == stats.generated_ids


def test_options_give_the_text_of_onnx(fbiedge: Run, model: Path, tmp_path: Path) -> None:
    """The same weights in ONNX Runtime: the same greedy text; and seeds repeat themselves."""
    from fbiedge.exporters.onnx import export_onnx
    from fbiedge.weights import open_checkpoint

    onnx = tmp_path / "model.onnx"
    export_onnx(open_checkpoint(model.parent / "checkpoint"), onnx, accuracy_level="fp32", head="fp32", kv_cache="fp32")
    arguments = ["-p", "Once upon", "--max-tokens", 8, *GREEDY]
    assert fbiedge("generate", model, *arguments)[1] == fbiedge("generate", onnx, *arguments)[1]
    seeded = ["-p", "a", "--max-tokens", 20, "--temperature", 1.5, "--top-k", 0, *ONE]
    texts = [fbiedge("generate", model, *seeded, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings(fbiedge: Run, model: Path) -> None:
    arguments = [
        "generate",
        model,
        "-p",
        "a",
        "--max-tokens",
        40,
        "--temperature",
        1.5,
        "--top-k",
        0,
        "--seed",
        3,
        *ONE,
    ]
    full = fbiedge(*arguments)[1]
    stop = full[5:7]
    _, out, err = fbiedge(*arguments, "--stop", stop)
    assert out == full[: full.index(stop)] + "\n" and "ended by a stop string" in err


def test_the_context_fills_up(fbiedge: Run, model: Path) -> None:
    arguments = [
        "generate",
        model,
        "-p",
        "aaaa",
        "--context",
        12,
        "--temperature",
        2.0,
        "--top-k",
        0,
        "--seed",
        1,
        *ONE,
    ]
    code, _, err = fbiedge(*arguments)
    assert code == 0 and "context 12/12 · ended by the end of the context" in err
    assert "longer than the context of 3" in one_error_line(fbiedge("generate", model, "-p", "aaaa", "--context", 3))


def test_chat_keeps_what_was_said_in_the_cache(chat_model: Path) -> None:
    session = open_session(chat_model, threads=1)
    chat = Chat(session, GenerationOptions(max_tokens=5, sampling=SamplingOptions(temperature=0)))
    assert chat.template is not None
    stats = []
    for turn in ("Hello", "again"):
        *pieces, last = chat.ask(turn)
        assert isinstance(last, GenerationStats) and all(isinstance(piece, Piece | PromptProgress) for piece in pieces)
        stats.append(last)
    assert stats[0].cached_tokens == 0
    assert stats[1].cached_tokens == stats[0].prompt_tokens + stats[0].generated_tokens - 1


def test_chat_in_a_pipe(fbiedge: Run, chat_model: Path) -> None:
    arguments = ["chat", chat_model, "--max-tokens", 10, *GREEDY]
    code, once, err = fbiedge(*arguments, stdin="Hello\n")
    assert (code, err) == (0, "")
    assert fbiedge(*arguments, stdin="Hello\n/reset\nHello\n/exit\n") == (0, once * 2, "")


def test_the_models_end_token_ends_its_text(fbiedge: Run, tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_config(), small_tensors(tiny_config()))
    tensors["output.weight"][:] = 0
    tensors["output.weight"][2] = tensors["output_norm.weight"] * 0 + 1e-6  # </s> or, where its logit is below 0, <unk>
    model = tiny_gguf(tmp_path, named=tensors)
    session = open_session(model)
    assert end_tokens(session.model, Tokenizer.from_model(session.model)) == {2}
    prompts = [fbiedge("generate", model, "-p", word, "--max-tokens", 3, *GREEDY)[2] for word in "a b c d e f".split()]
    assert any("decode 0 tokens" in err and "ended by the model" in err for err in prompts)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_ends_the_text_between_two_tokens(tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_config(), small_tensors(tiny_config()))
    tensors["output.weight"][:33] = 0  # no end of the text; printable ASCII alone
    tensors["output.weight"][33:127] *= 3
    tensors["output.weight"][127:] = 0
    model = tiny_gguf(tmp_path, named=tensors, max_position_embeddings=400_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "fbiedge.cli", "generate", str(model), "-p", "a", "--max-tokens", "390000",
         "--context", "390000", "--temperature", "2", "--top-k", "0", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    assert process.stdout and process.stderr
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 130
    assert "ended by Ctrl-C" in process.stderr.read()


def test_eval_and_verify(fbiedge: Run, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT)
    checkpoint = model.parent / "checkpoint"
    reports = [
        json.loads(fbiedge("eval", path, "--text", text, "--json", *ONE)[1].splitlines()[-1])
        for path in (checkpoint, model)
    ]
    assert reports[1]["engine"].startswith("llama.cpp") and reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[0]["perplexity"] == pytest.approx(reports[1]["perplexity"], rel=1e-2)
    for pair in ([checkpoint, model], [model, checkpoint], [model, model]):
        code, out, err = fbiedge("verify", *pair, "--max-tokens", 200, *ONE)
        assert (code, err) == (0, ""), out
    adapted = tiny_gguf(tmp_path, metadata={"fbiedge.weights_sha256": HASH}, max_position_embeddings=512)
    tiny_adapter(tmp_path / "model.beta.gguf")
    code, out, _ = fbiedge("verify", model, adapted, "--max-tokens", 50, *ONE)
    assert code == 1 and "F32 layers with model.beta.gguf" in out and "8 bits" not in out


def test_an_export_and_its_adapter_are_what_was_exported(fbiedge: Run, tmp_path: Path) -> None:
    """Q1_0 and the adapter beside it, loaded by itself. llama.cpp rounds activations to Q8_0, which costs random
    weights far more than trained ones."""
    tiny_checkpoint(
        tmp_path / "checkpoint", scaling_pattern="row", hidden_size=128, intermediate_size=200, num_attention_heads=4,
        head_dim=32,
    )  # fmt: skip
    model, bounds = tmp_path / "model.gguf", ["--max-kl", 0.1, "--min-agreement", 0.8]
    upper = tmp_path / "UP.GGUF"
    for output in (model, upper, upper):  # which replaces itself
        assert fbiedge("export", tmp_path / "checkpoint", "-o", output)[0] == 0
    assert upper.read_bytes()[:4] == b"GGUF" and (tmp_path / "UP.beta.gguf").is_file()
    code, out, err = fbiedge("verify", tmp_path / "checkpoint", model, *bounds, *ONE)
    assert (code, err) == (0, "") and "Q1_0 layers with model.beta.gguf" in out and "8 bits" not in out
    code, out, _ = fbiedge("verify", tmp_path / "checkpoint", model, *ONE)
    assert code == 1 and out.count("llama.cpp rounds the inputs of Q1_0 layers to 8 bits") == 1
    (tmp_path / "model.beta.gguf").rename(tmp_path / "away")
    code, out, err = fbiedge("verify", tmp_path / "checkpoint", model, *bounds, *ONE)
    assert code == 1 and "KL divergence" in out and "warning" in err
    generated = ["generate", model, "-p", "Hello", "--max-tokens", 8, *GREEDY]
    without = fbiedge(*generated)[1]
    (tmp_path / "away").rename(tmp_path / "model.beta.gguf")
    code, out, err = fbiedge(*generated)
    assert code == 0 and out != without and "Q1_0 layers with model.beta.gguf" in err


def test_inspect(fbiedge: Run, model: Path) -> None:
    code, out, err = fbiedge("inspect", model, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["kind"] == "gguf" and found["files"] == {"model.gguf": model.stat().st_size}
    groups = {group["group"]: group for group in found["groups"]}
    assert set(groups) == {"embedding", "head", "norms", "attention", "mlp"}
    config = tiny_config()
    linears = sum(n * k for n, k in config.linear_shapes().values())
    assert groups["attention"]["parameters"] + groups["mlp"]["parameters"] == 2 * linears
    assert groups["attention"]["form"] == "F32" and groups["attention"]["bits_per_weight"] == 32
    assert re.search(r"^architecture +Llama, 2 layers", fbiedge("inspect", model)[1], re.MULTILINE)


def test_weights_that_a_token_reads(model: Path, tmp_path: Path) -> None:
    """All but the embedding's other rows; a tied embedding is read whole, as the head."""
    config = tiny_config()
    table = 4 * config.vocab_size * config.hidden_size
    whole = sum(group.bytes for group in inspect(model).groups)
    assert weight_bytes_per_token(inspect(model)) == whole - table + 4 * config.hidden_size
    tensors = gguf_tensors(config, small_tensors(config))
    del tensors["output.weight"]
    assert weight_bytes_per_token(inspect(tiny_gguf(tmp_path, named=tensors))) == whole - table


def test_bench(fbiedge: Run, model: Path) -> None:
    arguments = "--prompt-tokens 4 --gen-tokens 2 --depth 0,9 --threads 1 --repetitions 1 --json".split()
    code, out, err = fbiedge("bench", model, *arguments)
    assert (code, err) == (0, "")
    *table, last = out.splitlines()
    report = json.loads(last)
    assert report["engine"].startswith("llama.cpp (llama-cpp-python") and report["isa"] is None
    assert report["accuracy_level"] is None and report["weight_bytes_per_token"] == weight_bytes_per_token(
        inspect(model)
    )
    decode = report["measurements"][-1]
    row = 2 * 2 * 2 * 2 * 16  # key and value, fp16, 2 layers, 2 KV heads of 16
    assert (decode["depth"], decode["kv_cache_bytes"]) == (9, 10 * row)
    assert decode["weights_gb_per_second"] > 0 and decode["share_of_bandwidth"] > 0
    assert any(re.match(r"decode 2 at depth 9 +1 +[\d.]+ +[\d.]+–[\d.]+ +[\d.]+ +\d+ %", line) for line in table), out


# Every way to be wrong.

COMMANDS = ("chat", "generate", "bench", "inspect", "eval", "verify")


def run_all(fbiedge: Run, path: Path, text: Path) -> dict[str, str]:
    """The error of each command on `path`."""
    extra = {"eval": ["--text", text], "verify": [path]}
    return {name: one_error_line(fbiedge(name, path, *extra.get(name, []), stdin="Hello")) for name in COMMANDS}


def test_truncated_and_foreign_files(fbiedge: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(SAMPLE_TEXT)
    (tmp_path / "short.gguf").write_bytes(model.read_bytes()[:5000])
    (tmp_path / "foreign.gguf").write_bytes(tiny_model(tmp_path).read_bytes())
    for name, message in (("short", "cut short"), ("foreign", "is not a GGUF file"), ("absent", "does not exist")):
        for error in run_all(fbiedge, tmp_path / f"{name}.gguf", tmp_path / "text.txt").values():
            assert message in error and f"{name}.gguf" in error


def test_a_gguf_by_any_name_is_one(fbiedge: Run, model: Path, tmp_path: Path) -> None:
    named = tmp_path / "model.bin"
    named.write_bytes(model.read_bytes())
    assert is_gguf(named) and not is_gguf(tmp_path) and not is_gguf(tmp_path / "absent")
    arguments = ["-p", "Hello", "--max-tokens", 5, *GREEDY]
    assert fbiedge("generate", named, *arguments)[1] == fbiedge("generate", model, *arguments)[1]
    code, _, err = fbiedge("export", named, "-o", tmp_path / "model.onnx")
    assert (code, err) == (0, ""), err
    assert fbiedge("verify", named, tmp_path / "model.onnx", "--max-kl", 0.1, "--min-agreement", 0.5, *ONE)[0] == 0
    assert "is a GGUF already" in one_error_line(fbiedge("export", named, "-o", tmp_path / "again.gguf"))


@pytest.mark.parametrize("name", ["chat", "generate", "bench"])
def test_an_accuracy_level_is_refused(fbiedge: Run, model: Path, name: str) -> None:
    message = one_error_line(fbiedge(name, model, "--accuracy-level", "int8", stdin="Hello"))
    assert "--accuracy-level int8 can't be had for" in message and "llama.cpp" in message


def test_the_adapter_itself_is_no_model(fbiedge: Run, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "model.beta.gguf")
    assert "is no model but of type 'adapter'" in one_error_line(fbiedge("generate", adapter, "-p", "a"))


def test_an_adapter_of_another_model(fbiedge: Run, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    tiny_adapter(tmp_path / "model.beta.gguf")
    for name in ("generate", "inspect"):
        assert "was not made for it" in one_error_line(fbiedge(name, model, stdin="a"))


def test_an_adapter_that_was_left_behind(fbiedge: Run, tmp_path: Path) -> None:
    entries = {"fbiedge.weights_sha256": HASH, "fbiedge.scaling_pattern": "column"}
    model = tiny_gguf(tmp_path, metadata=entries)
    (tmp_path / "text.txt").write_text("some text")
    for arguments in (
        ["generate", model, "-p", "a", "--max-tokens", 1],
        ["eval", model, "--text", tmp_path / "text.txt"],
    ):
        code, _, err = fbiedge(*arguments, *ONE)
        assert code == 0
        assert err.startswith("warning: model.gguf: its offsets (model.beta.gguf beside it) are missing; without them")
    tiny_adapter(tmp_path / "model.beta.gguf")
    assert "warning" not in fbiedge("generate", model, "-p", "a", "--max-tokens", 1, *ONE)[2]


def test_logits_that_are_no_numbers(fbiedge: Run, tmp_path: Path) -> None:
    tensors = gguf_tensors(tiny_config(), small_tensors(tiny_config()))
    tensors["output.weight"] *= np.float32(np.nan)
    model = tiny_gguf(tmp_path, named=tensors)
    assert "error: " in one_error_line(fbiedge("generate", model, "-p", "a"))
    (tmp_path / "text.txt").write_text(SAMPLE_TEXT)
    assert "not finite" in one_error_line(fbiedge("eval", model, "--text", tmp_path / "text.txt", *ONE))
    assert fbiedge("verify", model, model, "--max-tokens", 20, *ONE)[0] == 1


def test_a_model_without_tokenizer(fbiedge: Run, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path, metadata={"tokenizer.ggml.model": "no_vocab"})
    assert fbiedge("inspect", model)[0] == 0
    for name in ("chat", "generate"):
        assert "no tokenizer" in one_error_line(fbiedge(name, model, stdin="Hello"))


def test_llama_cpp_is_not_installed(fbiedge: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert "pip install 'fbiedge[gguf]'" in one_error_line(fbiedge("generate", model, "-p", "a"))
    assert fbiedge("inspect", model)[0] == 0


def test_nothing_is_printed_by_llama_cpp(model: Path) -> None:
    """Not even to the file descriptors: a process of its own, opened, run and ended."""
    result = subprocess.run(
        [sys.executable, "-m", "fbiedge.cli", "generate", str(model), "-p", "a", "--max-tokens", "3"],
        check=False, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr.count("\n") == 1 and result.stderr.startswith("prefill 2 tokens")

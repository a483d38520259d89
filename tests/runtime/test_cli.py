"""The command line: whole transcripts, and every way to be wrong as one line with exit code 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support.stories260k import GOLDEN, PROMPT

from fbiedge import __version__

from .conftest import NO_LIBRARY, Run, command, one_error_line


def test_version(fbiedge: Run) -> None:
    assert fbiedge("--version") == (0, f"fbiedge {__version__}\n", "")


def test_no_command_shows_the_commands(fbiedge: Run) -> None:
    code, out, err = fbiedge()
    assert (code, err) == (0, "")
    for name in ("chat", "generate", "inspect", "eval", "verify", "bench", "library", "init", "export", "train"):
        assert re.search(rf"^  {name}  ", out, re.MULTILINE)
    assert fbiedge("--help")[1] == out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["generate", "--nonsense"], ["inspect"], ["generate", "--top-k", "x"]]
)
def test_usage_errors(fbiedge: Run, arguments: list[str]) -> None:
    assert "fbiedge --help" in one_error_line(fbiedge(*arguments))


def test_from_random_weights_to_text(fbiedge: Run, tmp_path: Path) -> None:
    """init -> export -> inspect -> generate, by the commands alone."""
    code, out, err = fbiedge("init", "--preset", "tiny", "--scaling-pattern", "row", "--seed", 1, "-o", tmp_path / "c")
    assert (code, out, err) == (0, f"wrote {tmp_path / 'c'}\n", "")
    model = tmp_path / "model.onnx"
    code, out, err = fbiedge(
        "export",
        tmp_path / "c",
        "--to",
        "onnx",
        "-o",
        model,
        "--accuracy-level",
        "fp32",
        "--head",
        "fp32",
        "--kv-cache",
        "fp32",
    )
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {model} ({model.stat().st_size:,} bytes)\n")
    loss = re.search(r"max logit error (\S+), KL divergence (\S+) nats, top-1 agreement (\S+) %\n$", out)
    assert loss and float(loss[1]) < 1e-3 and float(loss[2]) < 1e-6 and float(loss[3]) == 100
    code, out, err = fbiedge("inspect", model)
    assert (code, err) == (0, "")
    assert re.search(r"^scale form +row$", out, re.MULTILINE)
    assert re.search(r"^mlp +1-bit row .* 1\.\d+$", out, re.MULTILINE)
    code, out, err = fbiedge("generate", model, "-p", "Hello", "--max-tokens", 5, "--temperature", 0)
    assert code == 0
    assert re.fullmatch(
        r"prefill 6 tokens, \d+ tok/s · decode \d tokens, [\d.]+ tok/s · context \d+/256 · ended by [^·]+"
        r" · \S+ kernels, fp32 activations, \d+ threads?, context 256\n",
        err,
    )


def test_stories260k_tells_its_story(fbiedge: Run, stories260k: Path, tmp_path: Path) -> None:
    model = tmp_path / "stories.onnx"
    fbiedge("export", stories260k, "-o", model, "--accuracy-level", "fp32", "--head", "fp32")
    for options in ([], ["--threads", 1]):
        code, out, _ = fbiedge("generate", model, "-p", PROMPT, "--temperature", 0, "--max-tokens", 80, *options)
        assert code == 0
        assert (PROMPT + out).startswith(GOLDEN)


def test_a_seed_repeats_its_text(fbiedge: Run, plain_model: Path) -> None:
    arguments = ["generate", plain_model, "-p", "Hi", "--max-tokens", 20, "--temperature", 1.5, "--top-k", 0]
    texts = [fbiedge(*arguments, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_may_come_from_a_pipe(fbiedge: Run, plain_model: Path) -> None:
    arguments = ["generate", plain_model, "--max-tokens", 8, "--temperature", 0]
    expected = fbiedge(*arguments, "-p", "Once upon\na time")[1]
    assert fbiedge(*arguments, stdin="Once upon\na time\n")[1] == expected
    assert fbiedge(*arguments, "-p", "-", stdin="Once upon\na time")[1] == expected


def test_an_empty_prompt_starts_a_text(fbiedge: Run, plain_model: Path) -> None:
    code, _, err = fbiedge("generate", plain_model, "-p", "", "--max-tokens", 3)
    assert code == 0
    assert err.startswith("prefill 1 tokens")


def test_stop_option(fbiedge: Run, plain_model: Path) -> None:
    arguments = [
        "generate",
        plain_model,
        "-p",
        "a",
        "--max-tokens",
        30,
        "--temperature",
        1.5,
        "--top-k",
        0,
        "--seed",
        3,
    ]
    full = fbiedge(*arguments)[1]
    stop = full[4:6]
    _, out, err = fbiedge(*arguments, "--stop", "never this", "--stop", stop)
    assert out == full[: full.index(stop)] + "\n"
    assert "ended by a stop string" in err


def test_generation_config_is_the_default(fbiedge: Run, tmp_path: Path) -> None:
    from support.tiny_model import tiny_model

    model = tiny_model(tmp_path, generation_config={"do_sample": False})
    arguments = ["generate", model, "-p", "a", "--max-tokens", 10]
    assert fbiedge(*arguments)[1] == fbiedge(*arguments)[1] == fbiedge(*arguments, "--temperature", 0)[1]


def test_inspect_as_json(fbiedge: Run, plain_model: Path) -> None:
    code, out, err = fbiedge("inspect", plain_model, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["config"]["vocab_size"] == 259
    assert found["files"] == {"model.onnx": plain_model.stat().st_size}
    assert {group["group"] for group in found["groups"]} >= {"embedding", "attention", "mlp", "norms", "head"}
    assert found["parameters"] == sum(group["parameters"] for group in found["groups"])


def test_inspect_a_checkpoint(fbiedge: Run, plain_model: Path) -> None:
    code, out, _ = fbiedge("inspect", plain_model.parent / "checkpoint")
    assert code == 0
    assert re.search(r"^kind +checkpoint$", out, re.MULTILINE)


def test_library(fbiedge: Run) -> None:
    code, out, _ = fbiedge("library")
    assert code == 0 and Path(out.strip()).is_file()
    code, out, _ = fbiedge("library", "--isa")
    names = out.splitlines()
    assert code == 0 and any(name.startswith("scalar") for name in names)
    assert sum(name.endswith(" (runs)") for name in names) == 1


# A turn a line: chat in a pipe.


def test_chat_in_a_pipe(fbiedge: Run, chat_model: Path) -> None:
    arguments = ["chat", chat_model, "--max-tokens", 10, "--seed", 5, "--stop", "\n"]
    code, out, err = fbiedge(*arguments, stdin="Hello\n\nagain\n")
    assert (code, err) == (0, "")
    first = fbiedge(*arguments, stdin="Hello")[1]
    assert out.startswith(first) and len(out) > len(first)


def test_commands_in_a_pipe(fbiedge: Run, chat_model: Path) -> None:
    arguments = ["chat", chat_model, "--max-tokens", 10, "--temperature", 0]
    once = fbiedge(*arguments, stdin="Hello\n")[1]
    assert fbiedge(*arguments, stdin="Hello\n/reset\nHello\n/help\n/exit\nHello\n") == (0, once * 2, "")


def test_a_full_context_in_a_pipe(fbiedge: Run, chat_model: Path) -> None:
    message = one_error_line(fbiedge("chat", chat_model, "--context", 30, stdin="x" * 50))
    assert "no longer fits the context of 30" in message


# Every way to be wrong.


def test_missing_file(fbiedge: Run, tmp_path: Path) -> None:
    for name in ("chat", "generate", "inspect"):
        assert "does not exist" in one_error_line(fbiedge(name, tmp_path / "no.onnx", stdin="Hello"))


def test_truncated_file(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.onnx"
    path.write_bytes(plain_model.read_bytes()[:5000])
    for name in ("chat", "generate", "inspect"):
        assert "is cut short: 5000 bytes" in one_error_line(fbiedge(name, path, stdin="Hello"))


def test_not_onnx(fbiedge: Run, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("Once upon a time")
    for name in ("chat", "generate", "inspect"):
        assert "is not an ONNX file" in one_error_line(fbiedge(name, path, stdin="Hello"))


def test_onnx_but_not_ours(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    model = onnx.load(plain_model)
    del model.metadata_props[:]
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    for name in ("chat", "generate", "inspect"):
        assert "not one of fbiedge's" in one_error_line(fbiedge(name, path, stdin="Hello"))


def test_a_model_without_a_tokenizer(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    model = onnx.load(plain_model)
    kept = [entry for entry in model.metadata_props if entry.key != "fbiedge.tokenizer"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    path = tmp_path / "mute.onnx"
    onnx.save(model, path)
    assert fbiedge("inspect", path)[0] == 0
    for name in ("chat", "generate"):
        assert "no tokenizer" in one_error_line(fbiedge(name, path, stdin="Hello"))


def test_prompt_longer_than_the_context(fbiedge: Run, plain_model: Path) -> None:
    message = one_error_line(fbiedge("generate", plain_model, "-p", "x" * 100))
    assert message == "error: prompt of 101 tokens is longer than the context of 64\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--temperature", "-1"], ["--temperature", "nan"], ["--top-p", "1.5"], ["--top-k", "-2"], ["--min-p", "nan"],
        ["--repetition-penalty", "0"], ["--seed", "-1"], ["--max-tokens", "0"], ["--stop", ""], ["--threads", "0"],
        ["--context", "65"], ["--accuracy-level", "int4"],
    ],
)  # fmt: skip
def test_unusable_options(fbiedge: Run, plain_model: Path, arguments: list[str]) -> None:
    message = one_error_line(fbiedge("generate", plain_model, "-p", "a", *arguments))
    assert arguments[0].strip("-").split("-")[0] in message
    assert "expected" in message


def test_unknown_preset_pattern_and_format(fbiedge: Run, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert "unknown preset '9b'" in one_error_line(fbiedge("init", "--preset", "9b", "-o", target))
    wrong = ["init", "--preset", "tiny", "--scaling-pattern", "diagonal", "-o", target]
    assert "expected one of column, row, single, block" in one_error_line(fbiedge(*wrong))
    assert "expected onnx or gguf" in one_error_line(fbiedge("export", tmp_path, "--to", "mlx", "-o", target))
    assert list(tmp_path.iterdir()) == []


def test_export_of_what_is_no_checkpoint(fbiedge: Run, tmp_path: Path) -> None:
    one_error_line(fbiedge("export", tmp_path / "no", "-o", tmp_path / "model.onnx"))
    one_error_line(fbiedge("export", tmp_path, "-o", tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


def test_verify_text_that_can_not_be_read(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for text in (tmp_path / "no.txt", tmp_path / "latin.txt", tmp_path):
        arguments = ["export", plain_model.parent / "checkpoint", "-o", tmp_path / "model.onnx", "--verify-text", text]
        assert "can't read the text" in one_error_line(fbiedge(*arguments))
    assert not (tmp_path / "model.onnx").exists()


def test_an_op_library_that_can_not_be_loaded(fbiedge: Run, plain_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["generate", plain_model, "-p", "Hello", "--max-tokens", 12, "--temperature", 0]
    expected = fbiedge(*arguments)
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", NO_LIBRARY)
    code, out, err = fbiedge(*arguments)
    assert (code, out) == (0, expected[1])
    warning, stats = err.splitlines()
    assert re.fullmatch(rf"warning: .*{NO_LIBRARY}.*; running on stock ops, which are slower", warning)
    assert "stock ops fallback" in stats
    assert NO_LIBRARY in one_error_line(fbiedge("library"))


def test_no_bundled_model(fbiedge: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.resources

    monkeypatch.setattr(importlib.resources, "files", lambda package: Path("/nonexistent"))
    assert "no bundled model" in one_error_line(fbiedge("generate", "-p", "Hello"))


def test_packages_that_are_not_installed(
    fbiedge: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain_model: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'fbiedge[train]'" in one_error_line(fbiedge("train", "--help"))
    monkeypatch.setitem(sys.modules, "fbiedge.exporters.onnx", None)
    arguments = ["export", plain_model.parent / "checkpoint", "-o", tmp_path / "model.onnx"]
    monkeypatch.delitem(sys.modules, "fbiedge.exporters.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in [name for name in sys.modules if name.startswith("fbiedge.exporters")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'fbiedge[export]'" in one_error_line(fbiedge(*arguments))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_stdout_on_a_full_disk(plain_model: Path) -> None:
    for arguments in (["generate", plain_model, "-p", "a", "--max-tokens", "5"], ["inspect", plain_model]):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [sys.executable, "-m", "fbiedge.cli", *map(str, arguments)],
                check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
            )  # fmt: skip
        assert result.returncode == 2
        assert result.stderr == "error: No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
@pytest.mark.parametrize("arguments", [["init", "--preset", "tiny"], ["export", "CHECKPOINT"]])
def test_an_output_that_does_not_fit(arguments: list[str], plain_model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; it fails the same system call."""
    import resource

    filled = [str(plain_model.parent / "checkpoint") if word == "CHECKPOINT" else word for word in arguments]
    result = command(
        *filled, "-o", tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert one_error_line((result.returncode, result.stdout, result.stderr)).startswith("error: can't write")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves(plain_model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fbiedge.cli", "inspect", str(plain_model), "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == ""


def test_a_chat_imports_nothing_large_that_it_does_not_use(plain_model: Path) -> None:
    """pydantic, numpy.random and secrets cost 11 MB; typer from 0.29 on brings the first."""
    program = (
        "import sys\n"
        "from fbiedge.cli import run\n"
        f"code = run(['chat', {str(plain_model)!r}, '--max-tokens', '3', '--temperature', '1'])\n"
        "loaded = {'pydantic', 'numpy.random', 'secrets', 'rich.progress', 'torch', 'onnx'} & set(sys.modules)\n"
        "sys.exit(str(sorted(loaded)) if loaded else code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60, input="a\n"
    )
    assert result.returncode == 0, result.stderr


def test_what_a_device_lacks_is_not_imported(plain_model: Path) -> None:
    """The runtime works, and nothing of it tries, where torch, onnx and safetensors are missing."""
    program = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxscript', 'safetensors', 'transformers', 'ml_dtypes', 'gguf', 'llama_cpp'): sys.modules[name] = None\n"
        "from fbiedge.cli import run\n"
        f"codes = [run(['generate', {str(plain_model)!r}, '-p', 'a', '--max-tokens', '3']), run(['inspect', {str(plain_model)!r}])]\n"
        "assert not [name for name in sys.modules if name.startswith(('fbiedge.exporters', 'fbiedge.training'))]\n"
        "sys.exit(max(codes))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr

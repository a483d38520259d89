"""`--genai`: the folder runs in onnxruntime-genai as it is and with our library, and says what our own runtime says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundled import MODEL
from support.checkpoints import small_config
from support.gguf_files import write_gguf
from support.gguf_models import write_model
from support.random_weights import random_weights
from support.rope import SCALINGS
from support.tiny_model import CHAT_TEMPLATE, tiny_checkpoint
from support.vocabularies import TEXTS, byte_level_metadata, sentence_piece_metadata

from fbiedge import cli
from fbiedge.chat_template import ChatTemplate
from fbiedge.errors import OutputError, UsageError
from fbiedge.exporters.onnx import export_genai, open_onnx
from fbiedge.exporters.onnx.genai import genai_config
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_tokenizer import sidecars_from_gguf
from fbiedge.ops_library import library_path
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import open_checkpoint

og = pytest.importorskip("onnxruntime_genai")

EXACT: dict[str, Any] = {"accuracy_level": "fp32", "head": "fp32", "block_scales": "fp32"}
PROMPTS = ("The cat", "¿Qué? 日本", "x")
NEW_TOKENS = 24


def genai_ids(folder: Path, prompt: Sequence[int], *, library: bool = False, **search: Any) -> list[int]:
    """Greedy ids after `prompt`."""
    config = og.Config(str(folder))
    if library:
        config.overlay(
            json.dumps({"model": {"decoder": {"session_options": {"custom_ops_library": library_path().name}}}})
        )
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(**({"do_sample": False, "max_length": len(prompt) + NEW_TOKENS} | search))
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def our_ids(path: Path, prompt: Sequence[int], ends: Sequence[int] = (2,)) -> list[int]:
    """The same from our runtime; the end token isn't among them, as genai has it."""
    session = Session.open(path, threads=1)
    ids, token = [], int(session.forward(prompt).argmax())
    while len(ids) < NEW_TOKENS and token not in ends:
        ids.append(token)
        token = int(session.forward([token]).argmax())
    return ids


def with_library(folder: Path) -> Path:
    """A copy of `folder` with the op library in it: from nowhere else does genai load one."""
    copy = folder.with_name(f"{folder.name}-with-library")
    shutil.copytree(folder, copy)
    shutil.copy(library_path(), copy)
    return copy


def assert_same(folder: Path, library: bool) -> None:
    """Every prompt, one of them ids that no text has."""
    model = Session.open(folder / "model.onnx").model
    tokenizer = Tokenizer.from_model(model)
    prompts = [tokenizer.encode(text) for text in PROMPTS] + [[1, 40, 41, 7, 7, 7]]
    place = with_library(folder) if library else folder
    for prompt in prompts:
        expected = our_ids(folder / "model.onnx", prompt)
        assert genai_ids(place, prompt, library=library) == expected
    assert len(set(expected)) > 1


SHAPES: dict[str, dict[str, Any]] = {
    "column": {},
    "row": {"scaling_pattern": "row"},
    "single": {"scaling_pattern": "single"},
    "block": {"scaling_pattern": "block"},
    "full-precision": {"scaling_pattern": "none"},
    "tied": {"tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "heads of 8": {"head_dim": 8},
    **{f"rope {name}": {"rope_scaling": scaling} for name, scaling in SCALINGS.items() if scaling},
}


@pytest.mark.parametrize("library", [False, True], ids=["as-it-is", "with-library"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_those_of_our_runtime(shape: str, library: bool, tmp_path: Path) -> None:
    changes = SHAPES[shape]
    weights = open_checkpoint(tiny_checkpoint(tmp_path / "in", **({"scaling_pattern": "column"} | changes)))
    folder = tmp_path / "out"
    export_genai(weights, folder, **EXACT)
    assert_same(folder, library)


@pytest.mark.parametrize("bits", [1, 4])
def test_stock_operators(bits: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    weights = open_checkpoint(tiny_checkpoint(tmp_path / "in"))
    export_genai(weights, folder, operators="stock", stock_bits=bits, **EXACT)
    assert_same(folder, library=False)


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_an_embedding_of_4_bits(tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    weights = open_checkpoint(tiny_checkpoint(tmp_path / "in", tie_word_embeddings=tied))
    export_genai(weights, folder, **{**EXACT, "head": "int4"}, embedding="int4")
    assert_same(folder, library=False)


def test_a_tied_qwen3_of_1_bit_with_external_data(tmp_path: Path) -> None:
    config = small_config(
        "block", vocab_size=259, head_dim=16, hidden_size=128, model_type="qwen3", tie_word_embeddings=True
    )
    files = open_checkpoint(tiny_checkpoint(tmp_path / "in")).files
    weights = replace(random_weights(config, binary_head=True), files=files)
    folder = tmp_path / "out"
    report = export_genai(weights, folder, accuracy_level="fp32", embed_limit_bytes=0)
    assert report.data == folder / "model.onnx.data" and report.data.stat().st_size == report.data_bytes
    assert report.model == folder / "model.onnx" and (folder / "genai_config.json") in report.others
    assert_same(folder, library=True)


def test_int8_activations_and_head(tmp_path: Path) -> None:
    """As most will export: our kernels in both runtimes give the same integers."""
    folder = tmp_path / "out"
    export_genai(open_checkpoint(tiny_checkpoint(tmp_path / "in")), folder)
    assert_same(folder, library=True)


def test_the_config_says_what_the_files_say(tmp_path: Path) -> None:
    generation = {
        "eos_token_id": [2, 9], "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    source = tiny_checkpoint(tmp_path / "in", generation_config=generation, chat_template=CHAT_TEMPLATE)
    folder = tmp_path / "out"
    export_genai(open_checkpoint(source), folder)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [2, 9] and config["model"]["context_length"] == 64
    assert "custom_ops_library" not in json.dumps(config)
    model = og.Model(str(folder))
    options = og.GeneratorParams(model).get_search_options()
    expected = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    assert {name: options[name] for name in expected} == pytest.approx(expected)
    assert options["max_length"] == 64
    assert sorted(og.Tokenizer(model).eos_token_ids) == [2, 9]


@pytest.mark.parametrize(
    "generation", [{}, {"do_sample": False, "temperature": 0.7}, {"do_sample": True, "temperature": 0}]
)
def test_a_model_that_does_not_sample_is_greedy(generation: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_genai(open_checkpoint(tiny_checkpoint(tmp_path / "in", generation_config=generation)), folder)
    assert og.GeneratorParams(og.Model(str(folder))).get_search_options()["do_sample"] is False


@pytest.mark.parametrize(
    ("said", "search"),
    [
        ({"top_k": 0}, {"top_k": 0}),  # all tokens, where genai's own default is 50
        ({"top_k": -1, "temperature": 1e9, "top_p": 2.0}, {}),
        ({"top_k": True, "temperature": True, "top_p": "high", "repetition_penalty": None}, {}),
    ],
)
def test_values_that_genai_takes(said: dict[str, Any], search: dict[str, Any]) -> None:
    config = genai_config(small_config(), [2], {"do_sample": True, **said})["search"]
    assert {
        name: config[name] for name in ("top_k", "temperature", "top_p", "repetition_penalty") if name in config
    } == search


def test_generation_stops_at_an_end_token(tmp_path: Path) -> None:
    """One of generation_config.json that is neither the config's nor the tokenizer's."""
    folder, prompt = tmp_path / "plain", [1, 40, 41, 7]
    export_genai(open_checkpoint(tiny_checkpoint(tmp_path / "in")), folder, **EXACT)
    ids = our_ids(folder / "model.onnx", prompt)
    end = ids[5]
    source = tiny_checkpoint(tmp_path / "in-2", generation_config={"eos_token_id": [2, end]})
    export_genai(open_checkpoint(source), tmp_path / "ends", **EXACT)
    got = genai_ids(tmp_path / "ends", prompt)
    assert got == ids[: ids.index(end)]


def test_a_text_up_to_the_end_of_the_context(tmp_path: Path) -> None:
    folder, prompt = tmp_path / "out", [1, 40, 41, 7]
    export_genai(open_checkpoint(tiny_checkpoint(tmp_path / "in", eos_token_id=258)), folder, **EXACT)
    ids = genai_ids(folder, prompt, max_length=64)
    assert len(ids) == 60 and ids[:NEW_TOKENS] == our_ids(folder / "model.onnx", prompt, ends=[2, 258])


def test_the_chat_template_works_there_too(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "in", chat_template=CHAT_TEMPLATE)
    folder = tmp_path / "out"
    export_genai(open_checkpoint(source), folder)
    messages: Any = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    tokenizer = og.Tokenizer(og.Model(str(folder)))
    got = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
    ours = ChatTemplate.from_model(Session.open(folder / "model.onnx").model).render(messages)
    assert got == ours == "<s>[user]Hi</s>[assistant]Ho</s>[assistant]"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt-2", "llama-bpe", "qwen2"])
def test_texts_have_the_same_ids(kind: str, tmp_path: Path) -> None:
    """But for rare characters, which genai's tables of Unicode don't know: the last text has those."""
    weights = open_checkpoint(tiny_checkpoint(tmp_path / "in", vocab_size=1200))
    if kind != "bytes":
        metadata = sentence_piece_metadata() if kind == "sentencepiece" else byte_level_metadata(kind)
        path = write_gguf(tmp_path / "vocabulary.gguf", {"general.architecture": "llama", **metadata}, {})
        weights = replace(weights, files=sidecars_from_gguf(GgufFile.open(path).metadata))
    folder = tmp_path / "out"
    export_genai(weights, folder)
    theirs = og.Tokenizer(og.Model(str(folder)))
    theirs.update_options(add_special_tokens="true")  # which it leaves out otherwise, as templates spell them
    ours = Tokenizer.from_model(Session.open(folder / "model.onnx").model)
    for text in TEXTS[1:-1]:
        if kind == "sentencepiece" and ("ſ" in text):
            continue  # not in the vocabulary: other bytes of the same character
        ids = ours.encode(text)
        assert [int(token) for token in theirs.encode(text)] == ids
        if "<unk>" not in text and "<|user|>" not in text:  # of which genai drops spaces
            assert theirs.decode(ids) == ours.decode(ids)


def test_a_gguf_goes_to_genai(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(
        "block", vocab_size=608, head_dim=16, hidden_size=128, intermediate_size=256, num_attention_heads=8,
        model_type="qwen3",
    )  # fmt: skip
    source = tmp_path / "model.gguf"
    write_model(source, config, byte_level_metadata("qwen2"))
    folder = tmp_path / "out"
    assert (
        cli.run(["export", str(source), "--genai", "--accuracy-level", "fp32", "--head", "fp32", "-o", str(folder)])
        == 0
    )
    assert "wrote beside it tokenizer.json" in capsys.readouterr().out
    assert_same(folder, library=False)


def test_the_command_and_what_it_wrote_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, folder = tiny_checkpoint(tmp_path / "in"), tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        assert cli.run(["export", str(source), "--genai", "-o", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx", "genai_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    again = tmp_path / "again"
    assert cli.run(["export", str(folder / "model.onnx"), "--genai", "-o", str(again)]) == 0
    assert (again / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert cli.run(["generate", str(folder), "-p", "x", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert cli.run(["export", str(folder / "model.onnx"), "--genai", "-o", str(folder)]) == 2
    assert "holds the model that is exported; choose another folder" in capsys.readouterr().err
    assert cli.run(["export", str(source), "--genai", "--to", "gguf", "-o", str(folder)]) == 2
    assert "--genai is for --to onnx, and this goes to gguf" in capsys.readouterr().err


def test_the_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model by exporters/onnx/README.md's own lines: the text that our runtime writes with the same file,
    without our library, whose stock operators round elsewhere, and with it."""

    def ours() -> str:
        session = Session.open(tmp_path / "folder" / "model.onnx")
        tokenizer = Tokenizer.from_model(session.model)
        ids = tokenizer.encode("One day")
        while len(ids) < 60:
            ids.append(int(session.forward(ids[session.position :]).argmax()))
        return tokenizer.decode(ids)

    readme = (Path(__file__).parents[2] / "exporters/onnx/README.md").read_text(encoding="utf-8")
    section = readme.partition("## onnxruntime-genai")[2]
    command, plain, copy, overlay = [
        textwrap.dedent(block) for block in re.findall(r"(?:^    .+\n)+", section, flags=re.MULTILINE)
    ]
    assert command == "fbiedge export model.gguf --genai -o folder\n" and copy == 'cp "$(fbiedge library)" folder/\n'
    assert cli.run(["export", str(MODEL), "--genai", "-o", str(tmp_path / "folder")]) == 0
    shutil.copy(library_path(), tmp_path / "folder")
    _, model, rest = plain.partition('model = og.Model("folder")\n')
    assert model
    asked = "parameters = og.GeneratorParams(model)\nparameters.set_search_options(do_sample=False, max_length=60)\n"
    rest = asked + rest.replace("og.GeneratorParams(model)", "parameters")
    texts = []
    for opening in (model, overlay):
        done = subprocess.run(
            [sys.executable, "-c", "import onnxruntime_genai as og\n" + opening + rest],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout.removesuffix("\n"))
    with_library = ours()
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", "/nonexistent")
    assert texts == [ours(), with_library]


def test_what_can_not_be_had(tmp_path: Path) -> None:
    weights = open_checkpoint(tiny_checkpoint(tmp_path / "in"))
    with pytest.raises(UsageError, match="a KV cache of int8 is nothing for onnxruntime-genai"):
        export_genai(weights, tmp_path / "out", kv_cache="int8")
    with pytest.raises(UsageError, match="there is no tokenizer.json, which onnxruntime-genai needs"):
        export_genai(replace(weights, files={}), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds thesis.txt, which is no part of an export for onnxruntime-genai"):
        export_genai(weights, tmp_path / "mine")
    assert not (tmp_path / "out").exists()
    assert open_onnx(Path(export_genai(weights, tmp_path / "out").model)).config == weights.config

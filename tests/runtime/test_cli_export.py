"""`fbiedge export` refuses before it writes: a source as output, a wrong file, sidecars that the runtime couldn't use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from support.tiny_model import CHAT_TEMPLATE, tiny_checkpoint

from fbiedge.initialize import byte_tokenizer

from .conftest import Run, one_error_line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return tiny_checkpoint(tmp_path / "in/checkpoint", chat_template=CHAT_TEMPLATE)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("output", ["model.onnx", "model.onnx.data", "./model.onnx", "link.onnx", "model"])
def test_a_model_is_not_exported_onto_itself(
    fbiedge: Run, external_model: Path, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data is read while the new one is written, so the result would be another model."""
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(external_model.with_name(name), tmp_path / name)
    if output == "link.onnx":
        (tmp_path / output).symlink_to(tmp_path / "model.onnx")
    if output == "model":  # whose data file would be the source
        (tmp_path / "model.data").symlink_to(tmp_path / "model.onnx")
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)
    message = one_error_line(fbiedge("export", tmp_path / "model.onnx", "-o", output, "--head", "fp32"))
    assert "choose another name for the" in message
    assert content(tmp_path) == before


def test_an_export_that_comes_out_wrong_is_dropped(
    fbiedge: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fbiedge.exporters.onnx import sources

    tile_bits = sources.tile_bits
    monkeypatch.setattr(sources, "tile_bits", lambda packed: tile_bits(~packed))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("an earlier one")
    message = one_error_line(fbiedge("export", checkpoint, "-o", out / "model.onnx"))
    assert "the export came out wrong and was dropped" in message and "nats, expected below 1" in message
    assert content(out) == {"model.onnx": b"an earlier one"}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("tokenizer.json", "{", "tokenizer.json can't be used"),
        ("tokenizer.json", '{"version": "1.0"}', "tokenizer.json can't be used"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list, expected an object"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is not JSON (nested too deeply)"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% for %}"}), "tokenizer_config.json can't be used: the"),
        ("special_tokens_map.json", "{", "special_tokens_map.json is not JSON"),
        ("chat_template.jinja", "{{ messages", "chat_template.jinja can't be used: the chat template can't be read: line"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("generation_config.json", "[]", "generation_config.json holds a JSON list"),
        ("generation_config.json", '{"temperature": "hot"}', "generation_config.json can't be used: temperature is 'hot'"),
        ("generation_config.json", '{"eos_token_id": [[1]]}', "generation_config.json can't be used: eos_token_id is [[1]]"),
    ],
)  # fmt: skip
def test_files_that_the_runtime_could_not_use(
    fbiedge: Run, checkpoint: Path, tmp_path: Path, name: str, text: str, reason: str
) -> None:
    (checkpoint / name).write_text(text)
    assert reason in one_error_line(fbiedge("export", checkpoint, "-o", tmp_path / "out.onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_without_a_tokenizer_it_says_what_to_do(fbiedge: Run, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").rename(tmp_path / "mine.json")
    arguments = ["export", checkpoint, "-o", tmp_path / "model.onnx"]
    code, _, err = fbiedge(*arguments)
    assert code == 0 and err.count("\n") == 1
    assert "warning: " in err and "has no tokenizer.json" in err and err.endswith("give one with --tokenizer FILE\n")
    (checkpoint / "tokenizer.model").write_bytes(b"SentencePiece")
    assert "--tokenizer FILE, made from tokenizer.model (SentencePiece)" in fbiedge(*arguments)[2]
    code, _, err = fbiedge(*arguments, "--tokenizer", tmp_path / "mine.json")
    assert (code, err) == (0, "")
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert stored["fbiedge.tokenizer"] == byte_tokenizer()
    (tmp_path / "mine.json").write_text("{")
    wrong = fbiedge("export", checkpoint, "-o", tmp_path / "new.onnx", "--tokenizer", tmp_path / "mine.json")
    assert "tokenizer.json can't be used" in one_error_line(wrong)
    missing = fbiedge("export", checkpoint, "-o", tmp_path / "new.onnx", "--tokenizer", tmp_path / "no.json")
    assert "no.json: No such file" in one_error_line(missing)
    assert not (tmp_path / "new.onnx").exists()


@pytest.mark.skipif(os.name != "posix", reason="needs a pipe with a name")
def test_onto_what_is_no_file(fbiedge: Run, checkpoint: Path, tmp_path: Path) -> None:
    """A pipe stands in for /dev/null, which a failing test would break for everyone."""
    os.mkfifo(tmp_path / "pipe")
    assert "it is a device, pipe or" in one_error_line(fbiedge("export", checkpoint, "-o", tmp_path / "pipe"))
    assert (tmp_path / "pipe").is_fifo()


def test_names_that_are_not_utf8(fbiedge: Run, checkpoint: Path, tmp_path: Path) -> None:
    """ONNX files and ONNX Runtime know no other names."""
    name = Path(os.fsdecode(b"b\xff"))
    assert "b\ufffd.onnx is not valid UTF-8" in one_error_line(
        fbiedge("export", checkpoint, "-o", tmp_path / f"{name}.onnx")
    )
    checkpoint.rename(tmp_path / name)
    assert "is not valid UTF-8" in one_error_line(fbiedge("inspect", tmp_path / name))
    assert "is not valid UTF-8" in one_error_line(fbiedge("export", tmp_path / name, "-o", tmp_path / "model.onnx"))
    for command in ("generate", "inspect"):
        assert "is not valid UTF-8" in one_error_line(fbiedge(command, tmp_path / f"{name}.onnx"))
    assert not (tmp_path / "model.onnx").exists()


SLOW_EXPORT = """
import sys, time
from fbiedge import cli
from fbiedge.exporters.onnx import export
def check(*arguments):
    print("written", flush=True)
    time.sleep(100)
export.check_export = check
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_sigterm_leaves_nothing_half_written(checkpoint: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_EXPORT, "export", str(checkpoint), "-o", str(tmp_path / "model.onnx")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout and process.stderr and process.stdout.readline() == "written\n"
    assert len(list(tmp_path.iterdir())) == 2
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert time.monotonic() - started < 60 and process.stderr.read() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_of_another_kind_is_not_replaced(fbiedge: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "stories.txt"
    text.write_text("mine")
    line = one_error_line(fbiedge("export", checkpoint, "-o", text))
    assert "exists and is not a .onnx file" in line and text.read_text() == "mine"


def test_init_does_not_replace_a_checkpoint(fbiedge: Run, checkpoint: Path) -> None:
    before = content(checkpoint)
    assert "holds a checkpoint already" in one_error_line(fbiedge("init", "--preset", "tiny", "-o", checkpoint))
    assert content(checkpoint) == before

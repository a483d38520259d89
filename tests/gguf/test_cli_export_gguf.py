"""`fbiedge export … -o model.gguf`: what it prints, what it refuses, from any source; and the way from GGUF to ONNX."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises_line
from support.gguf_checkpoints import FILES, IDS, gguf_checkpoint, gguf_config

from fbiedge import cli
from fbiedge.errors import UsageError
from fbiedge.exporters.gguf import Provenance
from fbiedge.gguf_file import GgufFile
from fbiedge.session import Session
from fbiedge.weights import open_checkpoint

CARD = "---\nlanguage: en\nlicense: apache-2.0\nbase_model:\n- Somebody/Base-7B\n---\n# A model\nlicense: other\n"
Run = Callable[..., tuple[int, str, str]]
LIMITED = """
import resource, sys
from fbiedge import cli
from fbiedge.errors import UsageError
from fbiedge.exporters.gguf import Provenance
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Run:
    """export(*arguments) -> exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run(["export", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    """A checkpoint folder that GGUF holds exactly."""
    gguf_checkpoint(tmp_path / "in/exact", gguf_config())
    return tmp_path / "in/exact"


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A checkpoint folder with scales of its own in each linear."""
    gguf_checkpoint(tmp_path / "in/official", gguf_config(), shared=False)
    return tmp_path / "in/official"


def line(result: tuple[int, str, str]) -> str:
    """The message of a failed command."""
    code, out, err = result
    assert code == 2 and out == "" and re.fullmatch(r"error: [^\n]+\n", err), result
    return err


def test_an_exact_model(export: Run, exact: Path, tmp_path: Path) -> None:
    code, out, err = export(exact, "-o", tmp_path / "model.gguf", "--license", "mit", "--name", "tiny")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    size, beta = ((tmp_path / name).stat().st_size for name in ("model.gguf", "model.beta.gguf"))
    assert lines[0] == f"wrote {tmp_path / 'model.gguf'} ({size:,} bytes)"
    assert lines[1].startswith(f"wrote {tmp_path / 'model.beta.gguf'} ({beta:,} bytes): the offsets beta, as a LoRA")
    assert lines[2].split() == ["group", "form", "tensors", "parameters", "bytes", "bits/weight"]
    assert any(entry.split() == ["attention", "Q1_0", "8", "98,304", "13,824", "1.125"] for entry in lines)
    assert "its linears are exact, but for rounding scales to fp16" in lines
    assert re.fullmatch(r"of the source: perplexity \S+ on \d+ tokens", lines[-4])
    with_adapter = re.fullmatch(r"of the GGUF: perplexity .*, KL divergence (\S+) nats, top-1 .*", lines[-3])
    without = re.fullmatch(r"without its adapter: perplexity .*, KL divergence (\S+) nats, top-1 .*", lines[-2])
    assert re.fullmatch(r"of the GGUF in llama.cpp: perplexity .*, KL divergence (\S+) nats, top-1 .*", lines[-1])
    assert with_adapter and without and float(with_adapter[1]) < 1e-3
    assert float(without[1]) > 1e-2
    metadata = GgufFile.open(tmp_path / "model.gguf").metadata
    assert (metadata["general.name"], metadata["general.license"]) == ("tiny", "mit")


def test_a_lossy_model(export: Run, official: Path, tmp_path: Path) -> None:
    out_path = tmp_path / "model.gguf"
    message = line(export(official, "-o", out_path))
    assert re.search(r"fitted to [\d,]+ tokens, .* on 128 others", message)  # of two built-in texts
    assert "12 linears" in message and "--allow-lossy" in message and "--scaling column-shared" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "text.txt").write_text("A text to fit to. " * 5)
    code, out, err = export(official, "-o", out_path, "--allow-lossy", "--calibration-text", tmp_path / "text.txt")
    assert (code, err) == (0, "")
    assert len(re.findall(r"^model\.layers\.\d\.\S+_proj +\d+\.\d\d %$", out, re.MULTILINE)) == 12
    assert re.search(r"^lossy: 12 linears were fitted to 91 tokens and measured on 128 others$", out, re.MULTILINE)
    assert "note: 91 tokens are few for a fit of 128 inputs; --calibration-text FILE gives a better one" in out
    (tmp_path / "empty.txt").write_text("")
    message = line(export(official, "-o", out_path, "--allow-lossy", "--calibration-text", tmp_path / "empty.txt"))
    assert "empty.txt holds no text; give one of a few sentences" in message
    same = ("--calibration-text", tmp_path / "text.txt", "--verify-text", tmp_path / "text.txt")
    code, out, _ = export(official, "-o", out_path, "--allow-lossy", *same)
    assert code == 0 and "were fitted to 45 tokens and measured on 46 others" in out
    assert re.search(r"^of the GGUF: perplexity .*, KL divergence .* nats", out, re.MULTILINE)


def test_provenance_is_the_model_cards(export: Run, exact: Path, tmp_path: Path) -> None:
    (exact / "README.md").write_text(CARD)
    (exact.parent / "run.json").write_text('{"training": {"steps": 3}, "teacher": "/home/me/teacher"}')
    assert export(exact, "-o", tmp_path / "tiny-one.gguf")[0] == 0
    metadata = GgufFile.open(tmp_path / "tiny-one.gguf").metadata
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.base_model.0.name"] == "Somebody/Base-7B"
    assert metadata["fbiedge.recipe"] == '{"steps": 3}' and metadata["general.name"] == "tiny-one"


def test_round_about(export: Run, exact: Path, tmp_path: Path) -> None:
    """Checkpoint -> ONNX -> GGUF is the same file as checkpoint -> GGUF; and GGUF -> ONNX computes the same."""
    fp32 = ("--head", "fp32", "--accuracy-level", "fp32", "--kv-cache", "fp32")
    assert export(exact, "-o", tmp_path / "model.onnx", *fp32)[0] == 0
    assert export(exact, "-o", tmp_path / "model.gguf", "--embedding", "f32", "--head", "f32")[0] == 0
    assert (
        export(tmp_path / "model.onnx", "-o", tmp_path / "b/model.gguf", "--embedding", "f32", "--head", "f32")[0] == 0
    )
    straight, around = (GgufFile.open(tmp_path / name) for name in ("model.gguf", "b/model.gguf"))
    assert straight.metadata["fbiedge.weights_sha256"] == around.metadata["fbiedge.weights_sha256"]
    assert export(tmp_path / "model.gguf", "-o", tmp_path / "back.onnx", *fp32)[0] == 0
    first, back = (Session.open(tmp_path / name, threads=1).all_logits(IDS) for name in ("model.onnx", "back.onnx"))
    np.testing.assert_allclose(back, first, atol=1e-4 * np.abs(first).max())


def test_options_of_the_other_format(export: Run, exact: Path, tmp_path: Path) -> None:
    for option in (["--accuracy-level", "int8"], ["--kv-cache", "fp32"]):
        message = line(export(exact, "-o", tmp_path / "model.gguf", *option))
        assert f"{option[0]} is for --to onnx, and this goes to gguf" in message
    for option in (["--allow-lossy"], ["--calibration-text", exact / "config.json"], ["--name", "x"]):
        message = line(export(exact, "-o", tmp_path / "model.onnx", *option))
        assert f"{option[0]} is for --to gguf, and this goes to onnx" in message
    assert "format is 'gml', expected onnx or gguf" in line(export(exact, "-o", tmp_path / "model.onnx", "--to", "gml"))
    message = line(export(exact, "-o", tmp_path / "model.gguf", "--head", "int8"))
    assert "head is 'int8', expected one of f16, q8_0, q1_0, f32" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_options_without_effect(export: Run, exact: Path, tmp_path: Path) -> None:
    gguf_checkpoint(tmp_path / "in/tied", gguf_config("block", tie_word_embeddings=True))
    message = line(export(tmp_path / "in/tied", "-o", tmp_path / "model.gguf", "--head", "q8_0"))
    assert "--head has no effect" in message and "--embedding decides" in message
    message = line(export(exact, "-o", tmp_path / "model.gguf", "--calibration-text", exact / "config.json"))
    assert "--calibration-text has no effect: nothing of this model needs a fit" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_head_of_a_full_precision_model_is_the_form_of_its_linears(export: Run, tmp_path: Path) -> None:
    gguf_checkpoint(tmp_path / "in", gguf_config("none", tie_word_embeddings=True, intermediate_size=256))
    code, out, _ = export(tmp_path / "in", "-o", tmp_path / "model.gguf", "--head", "q8_0")
    assert code == 0 and re.search(r"^mlp +Q8_0 ", out, re.MULTILINE) and "its linears are exact" not in out
    tensors = GgufFile.open(tmp_path / "model.gguf").tensors
    assert (tensors["blk.0.ffn_up.weight"].ggml_type, tensors["token_embd.weight"].ggml_type) == ("Q8_0", "F16")


@pytest.mark.parametrize("text", ["two\nlines", "a\x1b[31m", "bytes \udcff", "a\u2028b"])
def test_provenance_is_one_line_of_text(text: str) -> None:
    for field in ("name", "license", "base_model"):
        with raises_line(UsageError, f"{field} is ", "expected one line of valid UTF-8 without control characters"):
            Provenance(**{field: text})
    assert Provenance(name="Ünï 👩‍🔬").name == "Ünï 👩‍🔬"


@pytest.mark.parametrize("option", ["name", "license", "base-model"])
def test_a_text_of_two_lines_or_no_utf8(export: Run, exact: Path, tmp_path: Path, option: str) -> None:
    for text in ("two\nlines", "\udcff"):
        message = line(export(exact, "-o", tmp_path / "model.gguf", f"--{option}", text))
        assert f"{option.replace('-', '_')} is {text!r}, expected one line" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_without_llama_cpp(export: Run, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, out, _ = export(exact, "-o", tmp_path / "model.gguf")
    assert code == 0 and re.search(
        r"^not run in llama.cpp: .*isn't installed.* pip install 'fbiedge\[gguf\]'$", out, re.MULTILINE
    )


def test_gguf_to_gguf(export: Run, exact: Path, tmp_path: Path) -> None:
    assert export(exact, "-o", tmp_path / "model.gguf")[0] == 0
    message = line(export(tmp_path / "model.gguf", "-o", tmp_path / "other.gguf"))
    assert "is a GGUF already" in message and not (tmp_path / "other.gguf").exists()


def test_without_a_tokenizer(export: Run, exact: Path, tmp_path: Path) -> None:
    (exact / "tokenizer.json").unlink()
    message = line(export(exact, "-o", tmp_path / "model.gguf"))
    assert "has no tokenizer.json, which a GGUF must carry; give one with --tokenizer FILE" in message
    (tmp_path / "mine.json").write_text(FILES["tokenizer.json"])
    assert export(exact, "-o", tmp_path / "model.gguf", "--tokenizer", tmp_path / "mine.json")[0] == 0
    (tmp_path / "mine.json").write_text("{")
    message = line(export(exact, "-o", tmp_path / "new.gguf", "--tokenizer", tmp_path / "mine.json"))
    assert "tokenizer.json can't be used" in message and not (tmp_path / "new.gguf").exists()


def test_a_file_of_another_kind_is_not_replaced(export: Run, exact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    message = line(export(exact, "-o", tmp_path / "mine.txt", "--to", "gguf"))
    assert "exists and is not a .gguf file" in message and (tmp_path / "mine.txt").read_text() == "mine"


def test_inputs_that_fill_no_blocks(export: Run, tmp_path: Path) -> None:
    gguf_checkpoint(tmp_path / "in", gguf_config(hidden_size=192))
    message = line(export(tmp_path / "in", "-o", tmp_path / "model.gguf"))
    assert "model.layers.0.self_attn.q_proj has 192 inputs" in message and "multiple of 128" in message


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_disk_that_fills_up(exact: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk."""
    command = [sys.executable, "-c", LIMITED, "export", str(exact), "-o", str(tmp_path / "model.gguf")]
    found = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and found.stdout == "", found.stderr
    assert re.fullmatch(r"error: can't write \S+model\.gguf: [^\n]+; nothing was left there\n", found.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs permissions")
def test_a_folder_that_can_not_be_written(export: Run, exact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = line(export(exact, "-o", tmp_path / "file/model.gguf"))
    assert "can't write" in message and "nothing was left there" in message
    assert "it is a folder" in line(export(exact, "-o", tmp_path))


def test_the_checkpoint_is_as_it_was(export: Run, exact: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in exact.iterdir()}
    assert export(exact, "-o", tmp_path / "model.gguf")[0] == 0
    assert {path.name: path.read_bytes() for path in exact.iterdir()} == before
    assert open_checkpoint(exact).config == gguf_config()

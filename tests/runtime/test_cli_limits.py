"""Input that no one meant: closed streams, numbers at the edge, metadata made to hurt. One line each, never a traceback."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import onnx
import pytest
from support.tiny_model import tiny_model

from .conftest import NO_LIBRARY, Run, command, one_error_line


def with_metadata(model: Path, out: Path, key: str, value: str) -> Path:
    """A copy of `model` that says `value` under `key`."""
    changed = onnx.load(model)
    kept = [entry for entry in changed.metadata_props if entry.key != f"fbiedge.{key}"]
    del changed.metadata_props[:]
    changed.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=f"fbiedge.{key}", value=value)])
    onnx.save(changed, out)
    return out


@pytest.mark.skipif(os.name != "posix", reason="needs preexec_fn")
@pytest.mark.parametrize(
    ("name", "message"), [("generate", "there is no prompt"), ("chat", "there is no input, stdin is closed")]
)
def test_a_closed_stdin(plain_model: Path, name: str, message: str) -> None:
    result = command(name, plain_model, preexec_fn=lambda: os.close(0))
    assert message in one_error_line((result.returncode, result.stdout, result.stderr))


@pytest.mark.skipif(os.name != "posix", reason="needs preexec_fn")
def test_a_closed_stdout(plain_model: Path) -> None:
    result = command("generate", plain_model, "-p", "a", "--max-tokens", 2, preexec_fn=lambda: os.close(1))
    assert result.returncode == 0 and "Traceback" not in result.stderr


@pytest.mark.parametrize("option", [["--temperature", "1e-310"], ["--temperature", "1e300"],
                                    ["--repetition-penalty", "1e-320"], ["--repetition-penalty", "1e300"]])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_numbers_at_the_edge(fbiedge: Run, plain_model: Path, option: list[str]) -> None:
    message = one_error_line(fbiedge("generate", plain_model, "-p", "a", *option))
    assert re.search(r"expected .*a number from \S+ to \S+", message)


@pytest.mark.parametrize("ids", ["[[1]]", '"</s>"', "[true]", "-1", "1.5"])
def test_end_tokens_that_are_no_ids(fbiedge: Run, plain_model: Path, tmp_path: Path, ids: str) -> None:
    model = with_metadata(plain_model, tmp_path / "m.onnx", "generation_config", f'{{"eos_token_id": {ids}}}')
    for name in ("chat", "generate"):
        message = one_error_line(fbiedge(name, model, stdin="Hello"))
        assert "unusable fbiedge.generation_config: eos_token_id is" in message and "expected a token id" in message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", "[" * 100_000, "unusable fbiedge.config: nested too deeply"),
        ("tokenizer_config", "[" * 100_000, "unreadable JSON in fbiedge.tokenizer_config (nested too deeply)"),
        ("inventory", "[" * 100_000, "unreadable JSON in fbiedge.inventory (nested too deeply)"),
        ("chat_template", "{{" + "(" * 10_000, "the chat template can't be read"),
    ],
)
def test_metadata_nested_too_deeply(
    fbiedge: Run, plain_model: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    model = with_metadata(plain_model, tmp_path / "m.onnx", key, value)
    assert message in one_error_line(fbiedge("inspect" if key == "inventory" else "chat", model, stdin="Hello"))
    if key == "config":
        assert "nested too deeply" in one_error_line(fbiedge("export", model, "-o", tmp_path / "new.onnx"))


def test_a_context_beyond_all_memory(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    config = json.loads({e.key: e.value for e in onnx.load(plain_model).metadata_props}["fbiedge.config"])
    longest = json.dumps(config | {"max_position_embeddings": 2**31 - 1})
    model = with_metadata(plain_model, tmp_path / "m.onnx", "config", longest)

    def refuse(_shape: object) -> None:
        raise MemoryError  # some systems would promise it, and kill the process when it is used

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fbiedge.kv_cache._zeros", refuse)
        message = one_error_line(fbiedge("generate", model, "-p", "a"))
    assert "a context of 2147483647 tokens takes" in message and "choose a smaller one with --context" in message
    assert fbiedge("generate", model, "-p", "a", "--context", 64, "--max-tokens", 2)[0] == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory: Unable to"),
        (RecursionError(), "nested too deeply"),
    ],
)
def test_what_nobody_foresaw(fbiedge: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(_path: Path) -> None:
        raise error

    monkeypatch.setattr("fbiedge.inspection.inspect", fail)
    assert message in one_error_line(fbiedge("inspect", "model.onnx"))


def test_the_accuracy_level_of_the_head_is_told(fbiedge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of stock operators, as files of old have it, stays as exported; and the fallback can't change anything."""
    model = tiny_model(tmp_path, export={"accuracy_level": "int8", "head": "int8"})
    (tmp_path / "dense").mkdir()
    stock = tiny_model(tmp_path / "dense", scaling_pattern="none", export={"accuracy_level": "int8", "head": "int8"})
    arguments = ["generate", model, "-p", "a", "--max-tokens", 2]
    assert "kernels, int8 activations, " in fbiedge(*arguments)[2]
    assert "kernels, fp32 activations, " in fbiedge(*arguments, "--accuracy-level", "fp32")[2]
    told = fbiedge("generate", stock, *arguments[2:], "--accuracy-level", "fp32")[2]
    assert "kernels, fp32 activations (int8 in the head), " in told
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", NO_LIBRARY)
    assert "has no effect" not in fbiedge(*arguments, "--accuracy-level", "int8")[2]
    code, _, err = fbiedge(*arguments, "--accuracy-level", "fp32")
    assert code == 0
    assert "warning: --accuracy-level fp32 has no effect on stock ops" in err and "fallback, int8 activations, " in err

"""The published texts by name: what the hub's rows become, and that a local file gives the same."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest

from fbiedge import hub
from fbiedge.benchmark_texts import TEXTS, read_benchmark_text
from fbiedge.engines import open_logits
from fbiedge.errors import UsageError
from fbiedge.tokenizer import Tokenizer

from .conftest import Run, one_error_line

ROWS = {
    "wikitext2": [{"text": ""}, {"text": " = A title = \n"}, {"text": ""}, {"text": " One line . \n"}],
    "ptb": [{"sentence": "no it was n't"}, {"sentence": "<unk> rose N N"}],
    "c4": [{"text": f"Document\n{number}", "url": "x"} for number in range(1200)],
}
FILES = {
    "wikitext2": " \n = A title = \n \n One line . \n",
    "ptb": " no it was n't \n <unk> rose N N \n",
    "c4": "".join(json.dumps(row) + "\n" for row in ROWS["c4"]),
}
TEXT = {
    "wikitext2": "\n\n = A title = \n\n\n\n\n One line . \n",
    "ptb": "no it was n't <unk> rose N N",
    "c4": " ".join(f"Document\n{number}" for number in range(1100)),
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_rows_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**arguments: Any) -> datasets.Dataset:
        asked.append(arguments)
        return datasets.Dataset.from_list(ROWS[name])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_benchmark_text(name) == TEXT[name]
    assert asked == [TEXTS[name].dataset] and asked[0]["split"] in ("test", "validation")


@pytest.mark.parametrize("name", list(TEXTS))
def test_the_same_from_a_file(name: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / "file.txt", tmp_path / "file.json.gz"
    plain.write_text(FILES[name])
    packed.write_bytes(gzip.compress(FILES[name].encode()))
    assert read_benchmark_text(name, plain) == read_benchmark_text(name, packed) == TEXT[name]


def test_wikitext2_has_as_many_tokens_as_is_published(shared_data: Path) -> None:
    """341,469 with Llama's tokenizer, which are GPTQ's 166 windows."""
    packed = (shared_data / "tokenizers/llama2/tokenizer.json.xz").read_bytes()
    tokenizer = Tokenizer(lzma.decompress(packed).decode(), {"bos_token": "<s>", "add_bos_token": True})
    ids = tokenizer.encode(read_benchmark_text("wikitext2", shared_data / "corpora/wikitext2/wiki.test.raw.xz"))
    assert len(ids) == 341_469


def test_the_command(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    """Of C4, 256 windows, whatever the window is; of the others, all."""
    engine = open_logits(plain_model, tokens=64)
    assert engine.tokenizer is not None
    for name in TEXTS:
        file = tmp_path / name
        file.write_text(FILES[name])
        code, out, err = fbiedge(
            "eval", plain_model, "--dataset", name, "--dataset-file", file, "--window", 16, "--json"
        )
        assert (code, err) == (0, "")
        report = json.loads(out.splitlines()[-1])
        every = len(engine.tokenizer.encode(TEXT[name])) // 16
        assert report["windows"] == (256 if name == "c4" else every)


def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a network swallows what is sent, connecting has a time limit, but the question for the address has none."""
    done = threading.Event()

    def swallowed(*_: object, **__: object) -> None:
        done.wait(60)
        raise OSError

    monkeypatch.setenv("HF_HUB_OFFLINE", "to be restored")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(hub, "_SECONDS", 0.05)
    monkeypatch.setattr("socket.create_connection", swallowed)
    hub.offline_if_unreachable()
    assert not done.is_set() and os.environ["HF_HUB_OFFLINE"] == "1"
    done.set()


def test_errors(fbiedge: Run, plain_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text('{"text": "one"}\n{"url": "x"}\n')
    with pytest.raises(UsageError, match='file: line 2 is no JSON object with a "text"'):
        read_benchmark_text("c4", file)
    (tmp_path / "file.xz").write_bytes(lzma.compress(file.read_bytes()))
    with pytest.raises(UsageError, match='file.xz: line 2 is no JSON object with a "text"'):
        read_benchmark_text("c4", tmp_path / "file.xz")
    packed = gzip.compress(bytes(1000))
    (tmp_path / "file.gz").write_bytes(packed[:12] + b"\xff" * 4 + packed[16:])
    file.write_bytes(b"\xff")
    for options, message in (
        (["--dataset", "c5"], "--dataset is 'c5', expected one of wikitext2, ptb, c4"),
        (["--dataset", "ptb", "--dataset-file", file], "can't read the text"),
        (["--dataset", "ptb", "--dataset-file", tmp_path / "file.gz"], "can't read the text"),
        (["--dataset", "ptb", "--dataset-file", tmp_path / "none"], "can't read the text"),
        (["--dataset", "ptb", "--dataset-file", "/dev/zero"], "/dev/zero: line 1 is longer than 16 million characters"),
        (["--text", file, "--dataset-file", file], "--dataset-file has a meaning only with --dataset"),
        (["--text", file, "--dataset", "ptb"], "expected one of --text, --dataset"),
    ):
        assert message in one_error_line(fbiedge("eval", plain_model, *options))

    def unreachable(**_: object) -> None:
        raise ConnectionError("no route")

    def another_form(**_: object) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"lines": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", another_form)
    assert "can't get ptb from" in one_error_line(fbiedge("eval", plain_model, "--dataset", "ptb"))
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for name, text in TEXTS.items():
        error = one_error_line(fbiedge("eval", plain_model, "--dataset", name))
        assert f"can't get {name} from the Hugging Face hub or its cache (no route); give {text.file}" in error

"""What --data may name, read in streams: nothing is lost, and what can't be read is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises_line

from fbiedge.errors import UsageError
from fbiedge.training import documents, records
from fbiedge.training.records import Corrupt, HuggingFaceRows, JsonLines, samples
from fbiedge.training.sources import open_sources

STORIES = [f"Story number {i}.\nIt has two lines." for i in range(7)]


def lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def documents_of(*named: str | Path, **options: object) -> list[str]:
    return list(open_sources(named, Corrupt(), **options).documents(Corrupt()))  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1, 3, 7, 1 << 20])
def test_text_is_cut_at_markers_wherever_the_blocks_end(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes("été one\r\n<|endoftext|>\r\ntwo<|endofdoc|> <|endoftext|>three <| four".encode())
    assert documents_of(path) == ["été one", "two", "three <| four"]


def test_a_long_document_becomes_several_and_loses_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST", 50)
    monkeypatch.setattr(documents, "_BLOCK", 16)
    words = [f"word{i}" for i in range(100)]
    (tmp_path / "a.txt").write_text(" ".join(words) + "x" * 120)
    parts = documents_of(tmp_path / "a.txt")
    assert all(len(part) <= 50 for part in parts)
    assert "".join(part.replace(" ", "") for part in parts) == "".join(words) + "x" * 120


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a"])
def test_jsonl_is_found_out_whatever_its_name(name: str, tmp_path: Path) -> None:
    rows = [{"id": i, "lang": "en", "text": story} for i, story in enumerate(STORIES)]
    assert documents_of(lines(tmp_path / name, rows)) == STORIES


def test_the_field_of_the_text_is_the_one_named_or_the_only_one(tmp_path: Path) -> None:
    only = lines(tmp_path / "only.jsonl", [{"n": 1, "story": story} for story in STORIES])
    assert documents_of(only) == STORIES
    both = lines(tmp_path / "both.jsonl", [{"title": "T", "body": story} for story in STORIES])
    assert documents_of(both, text_field="body") == STORIES
    with raises_line(UsageError, "has the fields title, body", "--text-field"):
        documents_of(both)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": "torn', "line 2 is not JSON"),
        ("[1, 2]", "line 2 holds a JSON list, expected an object"),
        ('{"text": 5}', "line 2 has no text in the field 'text'"),
        (r'{"text": "\ud83d"}', "line 2 has half a surrogate pair"),
        ('{"other": "a"}', "line 2 has no text in the field 'text'"),
        ('{"text": "' + "x" * 300 + '"}', "line 2 is longer than"),
    ],
)
def test_a_corrupt_line_is_named_or_skipped_and_counted(
    line: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 256)
    path = lines(tmp_path / "a.jsonl", [{"text": "first"}, line, {"text": "last"}])
    with raises_line(UsageError, f"{path}: {why}", "--skip-corrupt"):
        documents_of(path)
    corrupt = Corrupt(skip=True)
    assert list(open_sources([path], corrupt).documents(corrupt)) == ["first", "last"]
    assert corrupt.counts == {str(path): 1}


def test_bytes_that_are_no_text_are_a_corrupt_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "caf\xe9"}\n')
    with raises_line(UsageError, "line 2 is not JSON"):
        documents_of(path)


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        ([1, 2, 3], "line 2 has 3 token ids, those before it 5"),
        ([1, 2, 3, 4, "5"], "line 2 has no list of token ids"),
        ([1, 2, 3, 4, 5.5], "line 2 has no list of token ids"),
        ([1, 2, [3], 4, 5], "line 2 has no list of token ids"),
        ([1, 2, 3, 4, 1 << 70], "line 2 has no list of token ids"),
        (None, "line 2 has no list of token ids"),
    ],
)
def test_a_corrupt_sample_is_named_or_skipped_and_counted(ids: object, why: str, tmp_path: Path) -> None:
    good = {"token_ids": [1, 2, 3, 4, 5], "source": "x"}
    path = lines(tmp_path / "train_000.jsonl", [good, {"token_ids": ids}, good])
    with raises_line(UsageError, f"{path}: {why}", "--skip-corrupt"):
        list(samples(JsonLines(path), 300, Corrupt()))
    corrupt = Corrupt(skip=True)
    assert [row.tolist() for row in samples(JsonLines(path), 300, corrupt)] == [[1, 2, 3, 4, 5]] * 2
    assert corrupt.counts == {str(path): 1}


@pytest.mark.parametrize("wrong", [300, -1])
def test_ids_of_another_vocabulary_are_an_error_that_nothing_skips(wrong: int, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"token_ids": [1, 2]}, {"token_ids": [1, wrong]}])
    with raises_line(UsageError, f"line 2 has the token id {wrong}, the model's vocabulary 300"):
        list(samples(JsonLines(path), 300, Corrupt(skip=True)))


def test_amber_chunks_of_a_folder_come_in_order_without_those_skipped(tmp_path: Path) -> None:
    for chunk in (2, 0, 1, 3):
        lines(tmp_path / f"train_{chunk:03}.jsonl", [{"token_ids": [chunk] * 9}])
    found = open_sources([tmp_path], Corrupt(), skip_chunks=(1, 7)).samples
    assert [Path(source.name).name for source in found] == ["train_000.jsonl", "train_002.jsonl", "train_003.jsonl"]
    (tmp_path / "train_002.jsonl").unlink()
    with raises_line(UsageError, "lacks train_002.jsonl of train_000 to train_003", "--skip-chunks 2"):
        open_sources([tmp_path], Corrupt(), skip_chunks=(1, 7))


def test_folders_of_text_files_need_no_library(tmp_path: Path) -> None:
    for i, story in enumerate(STORIES):
        (tmp_path / f"{i}.txt").write_text(story)
    assert documents_of(tmp_path) == STORIES


def test_kinds_do_not_mix_and_what_is_missing_is_named(tmp_path: Path) -> None:
    ids = lines(tmp_path / "ids.jsonl", [{"token_ids": [1, 2]}])
    (tmp_path / "a.txt").write_text("text")
    with raises_line(UsageError, "the data are of several kinds"):
        open_sources([ids, tmp_path / "a.txt"], Corrupt())
    with raises_line(UsageError, "missing.txt: No such file"):
        open_sources([tmp_path / "missing.txt"], Corrupt())
    with raises_line(UsageError, "empty.jsonl holds no records"):
        open_sources([lines(tmp_path / "empty.jsonl", [])], Corrupt())


@pytest.mark.parametrize("kind", ["parquet", "json", "saved", "saved-splits"])
def test_hugging_face_datasets_stream_from_local_folders(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": STORIES, "n": list(range(len(STORIES)))})
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "parquet":
        made.to_parquet(folder / "train-00000-of-00001.parquet")
    elif kind == "json":
        made.to_json(folder / "train.json")
    else:
        (datasets.DatasetDict({"train": made}) if kind == "saved-splits" else made).save_to_disk(folder)
    assert documents_of(folder) == STORIES
    assert documents_of(f"hf:{folder}") == documents_of(f"hf:{folder}:train") == STORIES


def test_a_dataset_with_token_ids_gives_samples(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [[i, i + 1, i + 2] for i in range(6)]
    datasets.Dataset.from_dict({"token_ids": rows}).to_parquet(tmp_path / "train.parquet")
    (source,) = open_sources([f"hf:{tmp_path}"], Corrupt()).samples
    assert np.array_equal(np.stack(list(samples(source, 300, Corrupt()))), rows)


def test_a_dataset_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with raises_line(UsageError, "can't read hf:", "hf:NAME[@CONFIG][:SPLIT]"):
        documents_of(f"hf:{tmp_path / 'empty'}")
    rows = HuggingFaceRows("org/name@en:validation")
    assert (rows.path, rows.config, rows.split) == ("org/name", "en", "validation")

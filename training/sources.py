"""What `--data` may name.

    FILE               plain text, or JSONL with a text or with token ids: found out from its beginning
    FOLDER             of Amber chunks train_000.jsonl … train_359.jsonl, of *.jsonl or *.txt files, of token shards
                       (see prepare.py), or a Hugging Face dataset
    hf:NAME[@CONFIG][:SPLIT]   a Hugging Face dataset, by streaming

Several of one kind may be given: texts, samples of token ids (which are never cut or joined), or one folder of shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fbiedge.errors import UsageError

from .documents import read_documents, split_documents
from .records import Corrupt, HuggingFaceRows, JsonLines, Records, holds_samples, texts
from .shards import SUFFIX

HUGGING_FACE = "hf:"
_CHUNK = re.compile(r"train_(\d{3})\.jsonl")
_PEEKED = 1 << 16  # bytes of a file's beginning


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What was named: texts (in the order named), else samples, else a folder of shards."""

    texts: list[Path | Records] = field(default_factory=list)
    samples: list[Records] = field(default_factory=list)
    shards: Path | None = None
    text_field: str | None = None

    def documents(self, corrupt: Corrupt) -> Iterator[str]:
        """The documents of the texts. Raises UsageError."""
        for text in self.texts:
            if isinstance(text, Path):
                yield from read_documents([text])
            else:
                for whole in texts(text, self.text_field, corrupt):
                    yield from split_documents([whole])


def open_sources(
    named: Sequence[str | Path], corrupt: Corrupt, text_field: str | None = None, skip_chunks: Sequence[int] = ()
) -> Sources:
    """Find out what each name is. `skip_chunks`: numbers of Amber chunks to leave out of a folder. Raises UsageError."""
    found = Sources(text_field=text_field)
    folders: list[Path] = []
    for name in map(str, named):
        for one in _expanded(name, skip_chunks):
            if isinstance(one, Path) and one.is_dir():
                folders.append(one)
            elif isinstance(one, Path) and not _is_jsonl(one):
                found.texts.append(one)
            else:
                records = JsonLines(one) if isinstance(one, Path) else one
                if text_field is None and holds_samples(records, corrupt):
                    found.samples.append(records)
                else:
                    found.texts.append(records)
    if bool(found.texts) + bool(found.samples) + len(folders) > 1:
        raise UsageError("the data are of several kinds; give texts, files of token ids, or one folder of shards")
    return Sources(texts=found.texts, samples=found.samples, shards=next(iter(folders), None), text_field=text_field)


def has_shards(folder: Path) -> bool:
    """Whether token shards lie in `folder` or in its `train`."""
    return any(next(place.glob(f"*{SUFFIX}*"), None) for place in (folder, folder / "train"))


def _expanded(name: str, skip_chunks: Sequence[int]) -> list[Path | Records]:
    """Files, records, or a folder of shards."""
    if name.startswith(HUGGING_FACE):
        return [HuggingFaceRows(name.removeprefix(HUGGING_FACE))]
    path = Path(name)
    if not path.is_dir() or has_shards(path):
        return [path]
    if chunks := {int(match[1]): file for file in path.iterdir() if (match := _CHUNK.fullmatch(file.name))}:
        return _chunks(path, chunks, skip_chunks)
    for suffix in (".jsonl", ".txt"):
        if files := sorted(path.glob(f"*{suffix}")):
            return list(files)
    return [HuggingFaceRows(name)]


def _chunks(folder: Path, chunks: dict[int, Path], skip: Sequence[int]) -> list[Path | Records]:
    wanted = [number for number in range(min(chunks), max(chunks) + 1) if number not in skip]
    for number in wanted:
        if number not in chunks:
            raise UsageError(
                f"{folder} lacks train_{number:03}.jsonl of train_{min(chunks):03} to train_{max(chunks):03}; "
                f"copy it there, or go without it with --skip-chunks {number}"
            )
    if not wanted:
        raise UsageError(f"{folder} holds only chunks that are skipped; see --skip-chunks")
    return [chunks[number] for number in wanted]


def _is_jsonl(path: Path) -> bool:
    if path.suffix in (".jsonl", ".ndjson"):
        return True
    try:
        with open(path, "rb") as file:
            line = file.readline(_PEEKED)
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from error
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return len(line) == _PEEKED and line.startswith((b'{"token_ids"', b'{"text"'))

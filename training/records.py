"""Records with a text or with token ids: the lines of JSONL files, and the rows of Hugging Face datasets by streaming.

A line that is no such record is an error that names file and line; with `skip` it is left out and counted.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fbiedge.errors import UsageError, printable

LONGEST_LINE = 1 << 26  # bytes; a line of Amber has about 12,000
TOKEN_IDS, TEXT = "token_ids", "text"
Record = dict[str, Any]
_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 can't


@dataclass(kw_only=True)
class Corrupt:
    """What happens to lines that can't be used, and how many there were of each file."""

    skip: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def found(self, source: str, where: str, why: str) -> None:
        """Raises UsageError, or counts."""
        if not self.skip:
            raise UsageError(
                f"{source}: {where} {printable(why)}; mend it, or leave such lines out with --skip-corrupt"
            )
        self.counts[source] += 1


class Records(Protocol):
    """Records in an order that is always the same; may be read again and again."""

    name: str  # for messages

    def read(self, corrupt: Corrupt) -> Iterator[tuple[str, Record]]:
        """Each record with where it is in its source, such as "line 7". Raises UsageError."""
        ...


class JsonLines:
    """The objects of a JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def read(self, corrupt: Corrupt) -> Iterator[tuple[str, Record]]:
        try:
            with open(self.path, "rb") as file:
                for number in itertools.count(1):
                    line = file.readline(LONGEST_LINE)
                    if not line:
                        return
                    if (record := self._parsed(line, f"line {number}", corrupt)) is not None:
                        yield f"line {number}", record
                    while len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                        line = file.readline(LONGEST_LINE)
        except OSError as error:
            raise UsageError(f"can't read {self.path}: {error.strerror}") from error

    def _parsed(self, line: bytes, where: str, corrupt: Corrupt) -> Record | None:
        if not line.strip():
            return None
        why = f"is longer than {LONGEST_LINE >> 20} MB"
        if len(line) < LONGEST_LINE:
            try:
                record = json.loads(line)
                if isinstance(record, dict):
                    return record
                why = f"holds a JSON {type(record).__name__}, expected an object"
            except (ValueError, RecursionError) as error:
                why = f"is not JSON ({error})"
        corrupt.found(self.name, where, why)
        return None


class HuggingFaceRows:
    """The rows of one split of a dataset: a name of the hub, or a local folder, also one of `save_to_disk`."""

    def __init__(self, spec: str) -> None:
        """`spec`: NAME[@CONFIG][:SPLIT]; the split is "train" where none is named."""
        path, self.split = (spec, "train") if ":" not in spec else tuple(spec.rsplit(":", 1))
        self.path, _, config = path.partition("@")
        self.config, self.name = config or None, f"hf:{spec}"

    def read(self, corrupt: Corrupt) -> Iterator[tuple[str, Record]]:
        """See Records. Rows come as they are stored, none is corrupt in itself."""
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"reading {self.name} needs {error.name}, which is not installed: pip install 'fbiedge[data]'"
            ) from error
        try:
            if any((Path(self.path) / name).exists() for name in ("state.json", "dataset_dict.json")):
                saved = datasets.load_from_disk(self.path)
                rows: Iterable[Record] = saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            else:
                rows = datasets.load_dataset(self.path, self.config, split=self.split, streaming=True)
            for number, row in enumerate(rows, 1):
                yield f"row {number}", row
        except Exception as error:  # of a dozen libraries below, for the network, the name and the files
            why = printable(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise UsageError(
                f"can't read {self.name}: {why}; name a dataset of the hub or a folder, as hf:NAME[@CONFIG][:SPLIT]"
            ) from error


def holds_samples(records: Records, corrupt: Corrupt) -> bool:
    """Whether they are token ids, to be trained on as they are; from the first record."""
    return TOKEN_IDS in _first(records, corrupt)


def texts(records: Records, text_field: str | None, corrupt: Corrupt) -> Iterator[str]:
    """The text of each record: of the field named, else of `text`, else of the only one with a string."""
    chosen = text_field or _text_field(records, _first(records, corrupt))
    for where, record in records.read(corrupt):
        text = record.get(chosen)
        if not isinstance(text, str):
            corrupt.found(records.name, where, f"has no text in the field {chosen!r}")
        elif _HALF_A_CHARACTER.search(text):
            corrupt.found(records.name, where, "has half a surrogate pair, which is no text")
        else:
            yield text


def samples(records: Records, vocab_size: int, corrupt: Corrupt) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """The `token_ids` of each record, all as many as the first has. Raises UsageError for ids beyond the vocabulary."""
    length = None
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    for where, record in records.read(corrupt):
        try:
            ids = np.array(record.get(TOKEN_IDS))
        except (ValueError, OverflowError):  # lists of several lengths, numbers beyond 64 bits
            ids = np.empty(0, object)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.size < 2:
            corrupt.found(records.name, where, f"has no list of token ids in {TOKEN_IDS!r}")
        elif ids.size != (length := length or ids.size):
            corrupt.found(records.name, where, f"has {ids.size} token ids, those before it {length}")
        elif not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            wrong = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise UsageError(
                f"{records.name}: {where} has the token id {wrong}, the model's vocabulary {vocab_size}; "
                "choose the model or the teacher whose tokenizer made this data"
            )
        else:
            yield ids.astype(dtype)


def _first(records: Records, corrupt: Corrupt) -> Record:
    for _, record in records.read(Corrupt(skip=corrupt.skip)):
        return record
    raise UsageError(f"{records.name} holds no records; name a file or dataset with some")


def _text_field(records: Records, record: Record) -> str:
    strings = [name for name, value in record.items() if isinstance(value, str)]
    if TEXT in strings or len(strings) == 1:
        return TEXT if TEXT in strings else strings[0]
    shown = ", ".join(printable(name) for name in record) or "none"
    raise UsageError(f"{records.name} has the fields {shown}; say which is the text with --text-field")

"""The texts that perplexities are published for, prepared as GPTQ and FBI-LLM prepare them.

    wikitext2   WikiText-2's raw test split, its lines joined by blank lines
    ptb         the Penn Treebank's test split, its sentences joined by spaces
    c4          the first 1100 documents of C4's first validation shard, joined by spaces; of these 256 windows

They come from the Hugging Face hub, or from its cache, or from a file of the same content beside `--dataset-file`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import UsageError, printable
from .hub import open_datasets, unreachable

C4_DOCUMENTS = 1100
C4_WINDOWS = 256
_LONGEST_LINE = 1 << 24  # characters; what is longer is no text, and may have no end


@dataclass(frozen=True, kw_only=True)
class BenchmarkText:
    """Where a text comes from, and how its rows become one."""

    dataset: dict[str, Any]  # arguments of datasets.load_dataset
    field: str  # of a row
    separator: str
    file: str  # what to give where the hub can't be reached
    rows_of: Callable[[Path], Iterable[str]]  # the same rows from that file
    most_rows: int | None = None
    most_windows: int | None = None


def text_lines(path: Path, what: str) -> Iterator[str]:
    """Lines of a UTF-8 file, unpacked where its name ends in .gz or .xz. Raises UsageError, which calls it `what`."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:  # an editor may have put a mark of UTF-8 in front
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise UsageError(f"{path}: line {number} is longer than {_LONGEST_LINE >> 20} million characters")
                yield line
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        why = getattr(error, "strerror", None) or printable(str(error))
        raise UsageError(f"can't read the {what} {path}: {why}") from error


def _wikitext_rows(path: Path) -> Iterator[str]:
    """A row is a line with its end, or nothing for an empty one, as in the hub's copy."""
    return (line if line.strip() else "" for line in text_lines(path, "text"))


def _ptb_rows(path: Path) -> Iterator[str]:
    return (line.strip() for line in text_lines(path, "text"))


def _c4_rows(path: Path) -> Iterator[str]:
    for number, line in enumerate(text_lines(path, "text"), 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f'{path}: line {number} is no JSON object with a "text"')
        yield text


TEXTS = {
    "wikitext2": BenchmarkText(
        dataset={"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        field="text",
        separator="\n\n",
        file="wiki.test.raw, WikiText-2's raw test file",
        rows_of=_wikitext_rows,
    ),
    "ptb": BenchmarkText(
        # The branch that the hub makes by itself: the dataset is a script, which `datasets` 4 and later doesn't run.
        dataset={
            "path": "ptb-text-only/ptb_text_only",
            "data_files": {"test": "penn_treebank/test/*.parquet"},
            "revision": "refs/convert/parquet",
            "split": "test",
        },
        field="sentence",
        separator=" ",
        file="ptb.test.txt, Mikolov's test file of one sentence a line",
        rows_of=_ptb_rows,
    ),
    "c4": BenchmarkText(
        dataset={
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        field="text",
        separator=" ",
        file="c4-validation.00000-of-00008.json.gz",
        rows_of=_c4_rows,
        most_rows=C4_DOCUMENTS,
        most_windows=C4_WINDOWS,
    ),
}


def benchmark_text(name: str) -> BenchmarkText:
    """The text called `name`. Raises UsageError with the known names."""
    if name not in TEXTS:
        raise UsageError(f"--dataset is {name!r}, expected one of {', '.join(TEXTS)}")
    return TEXTS[name]


def read_benchmark_text(name: str, file: Path | None = None) -> str:
    """The text called `name`, from the hub or from `file`. Raises UsageError."""
    text = benchmark_text(name)
    rows: Iterable[str] = _rows_from_hub(name, text) if file is None else text.rows_of(file)
    return text.separator.join(islice(rows, text.most_rows))


def _rows_from_hub(name: str, text: BenchmarkText) -> list[str]:
    datasets = open_datasets()
    try:
        rows = datasets.load_dataset(**text.dataset)
        return [str(row[text.field]) for row in islice(rows, text.most_rows)]
    except Exception as error:  # of a dozen libraries below, for the network, the cache and the files
        raise unreachable(name, error, f"give {text.file}, by --dataset-file FILE") from error

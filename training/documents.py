"""Texts -> documents -> token ids, in streams: no file is ever held whole.

A document of a text file ends at a marker `<|endoftext|>` or `<|endofdoc|>`, or with its file. One that is longer than
LONGEST characters becomes several, cut at a space. Each document becomes bos + tokens + eos.
"""

from __future__ import annotations

import itertools
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fbiedge.errors import UsageError
from fbiedge.tokenizer import DOCUMENT_END

from .shards import Ids

LONGEST = 1 << 22  # characters
_BLOCK = 1 << 20  # characters read at once
_HELD_OUT_EVERY = 50
_ENCODE_BATCH = 512  # documents given to the tokenizer at once: its threads have work, memory stays small


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The non-empty documents of UTF-8 text files. Raises UsageError naming the file."""
    for file in files:
        try:
            with open(file, encoding="utf-8") as text:
                yield from split_documents(iter(lambda: text.read(_BLOCK), ""))
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: not UTF-8 text (byte {_first_bad_byte(file)}); convert it first") from error
        except OSError as error:
            raise UsageError(f"can't read {file}: {error.strerror}") from error


def split_documents(blocks: Iterable[str]) -> Iterator[str]:
    """The non-empty documents of a text that comes in blocks, cut anywhere."""
    return (document.strip() for document in _split_at_markers(blocks) if document.strip())


def split_held_out(documents: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each document as (what is trained on, what is held out): every 50th is held out; of fewer, the last 1/20 of each."""
    start = list(itertools.islice(iterator := iter(documents), _HELD_OUT_EVERY))
    for index, document in enumerate(itertools.chain(start, iterator)):
        if len(start) == _HELD_OUT_EVERY:
            yield ("", document) if index % _HELD_OUT_EVERY == 0 else (document, "")
        else:
            cut = document.rfind(" ", 0, len(document) * 19 // 20) + 1
            yield document[:cut], document[cut:]


def encode(
    documents: Iterable[str], tokenizer: Tokenizer, bos: int, eos: int, dtype: npt.DTypeLike | None = None
) -> Iterator[Ids]:
    """The ids of each document between `bos` and `eos`, in `dtype`, else in that of `ids_dtype`."""
    dtype = dtype or ids_dtype(tokenizer, bos, eos)
    iterator = iter(documents)
    while batch := list(itertools.islice(iterator, _ENCODE_BATCH)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield np.array([bos, *encoding.ids, eos], dtype)


def ids_dtype(tokenizer: Tokenizer, *ids: int) -> type[np.uint16 | np.uint32]:
    """The smallest dtype that holds every id of `tokenizer`, and `ids`; 30 ms for 32,000 pieces."""
    return np.uint16 if max(0, *ids, *tokenizer.get_vocab().values()) < 1 << 16 else np.uint32


def _split_at_markers(blocks: Iterable[str]) -> Iterator[str]:
    held = ""  # begins a document
    for block in blocks:
        *whole, held = DOCUMENT_END.split(held + block)
        yield from whole
        while len(held) > LONGEST:
            cut = held.rfind(" ", 1, LONGEST) + 1 or LONGEST
            yield held[:cut]
            held = held[cut:]
    yield held


def _first_bad_byte(file: Path) -> int:
    decoder, before = getincrementaldecoder("utf-8")(), 0
    with open(file, "rb") as raw:
        while True:
            pending = len(decoder.getstate()[0])
            block = raw.read(_BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return before - pending + error.start
            before += len(block)

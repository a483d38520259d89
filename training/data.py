"""Text files -> token shards -> batches in an order that (seed, step) alone decides.

A document ends at a marker `<|endoftext|>` or `<|endofdoc|>`, or with its file. Each becomes bos + tokens + eos in a
flat uint16 or uint32 file `NAME.tokens`; `NAME.tokens.json` beside it says the dtype and how many tokens it must hold.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fbiedge.errors import UsageError
from fbiedge.files import atomic_file

_DOCUMENT_END = re.compile(r"<\|endoftext\|>|<\|endofdoc\|>")
_HELD_OUT_EVERY = 50
_ENCODE_BATCH = 512  # documents given to the tokenizer at once: its threads have work, memory stays small


def read_documents(files: Iterable[Path]) -> Iterator[str]:
    """The non-empty documents of UTF-8 text files. Raises UsageError naming the file."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file}: not UTF-8 text (byte {error.start}); convert it first") from error
        except OSError as error:
            raise UsageError(f"can't read {file}: {error.strerror}") from error
        for document in _DOCUMENT_END.split(text):
            if document.strip():
                yield document.strip()


def without_held_out(documents: Iterable[str]) -> Iterator[str]:
    """All but every 50th document; of texts with fewer, the first 19/20 of each document."""
    return (train for train, _ in _split(documents) if train)


def held_out(documents: Iterable[str]) -> Iterator[str]:
    """What `without_held_out` leaves out."""
    return (kept for _, kept in _split(documents) if kept)


def _split(documents: Iterable[str]) -> Iterator[tuple[str, str]]:
    start = list(itertools.islice(iterator := iter(documents), _HELD_OUT_EVERY))
    for index, document in enumerate(itertools.chain(start, iterator)):
        if len(start) == _HELD_OUT_EVERY:
            yield ("", document) if index % _HELD_OUT_EVERY == 0 else (document, "")
        else:
            cut = document.rfind(" ", 0, len(document) * 19 // 20) + 1
            yield document[:cut], document[cut:]


def write_shard(documents: Iterable[str], tokenizer: Tokenizer, bos: int, eos: int, out: Path) -> int:
    """Tokenise documents into the shard `out`; returns its number of tokens."""
    dtype = np.uint16 if max(bos, eos, *tokenizer.get_vocab().values()) < 1 << 16 else np.uint32
    total = 0
    with atomic_file(out) as temporary, open(temporary, "wb") as shard:
        for batch in _batched(documents, _ENCODE_BATCH):
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                ids = np.array([bos, *encoding.ids, eos], dtype)
                shard.write(ids.tobytes())
                total += ids.size
    with atomic_file(out.with_name(out.name + ".json")) as temporary:
        temporary.write_text(json.dumps({"dtype": np.dtype(dtype).name, "tokens": total}))
    return total


def open_shard(path: Path) -> npt.NDArray[np.unsignedinteger]:
    """The shard as a memory-mapped [tokens] array. Raises UsageError where it is missing or its length is wrong."""
    try:
        header = json.loads(path.with_name(path.name + ".json").read_text())
        dtype, tokens = np.dtype(header["dtype"]), int(header["tokens"])
        found = path.stat().st_size // dtype.itemsize
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a token shard ({error}); make it again from the text files") from error
    if found != tokens:
        raise UsageError(f"{path}: {found} tokens found, {tokens} expected; make it again from the text files")
    return np.memmap(path, dtype, "r", shape=(tokens,)) if tokens else np.empty(0, dtype)


class Batches:
    """Batch number `step` of an endless shuffled stream: windows of sequence_length + 1 tokens, no state to save.

    Epoch e cuts the shard at a random phase into non-overlapping windows and visits them in a random order, both drawn
    from (seed, e). Sample number i is window i mod windows of epoch i div windows, so any step can be rebuilt alone.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        batch_size: int,
        sequence_length: int,
        seed: int,
        name: str = "training text",
    ) -> None:
        self.windows = (len(tokens) - 1) // sequence_length - 1  # one is lost to the phase
        if self.windows < 1:
            raise UsageError(
                f"the {name} has {len(tokens)} tokens, expected {2 * sequence_length + 1} or more for sequences of "
                f"{sequence_length}; give more text or shorter sequences"
            )
        self.tokens, self.batch_size, self.sequence_length, self.seed = tokens, batch_size, sequence_length, seed
        self._epoch, self._phase, self._order = -1, 0, np.empty(0, np.int64)

    def batch(self, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and next-token targets of optimizer step `step`, each int64 [batch_size, sequence_length]."""
        first = step * self.batch_size
        rows = np.stack([self._window(i) for i in range(first, first + self.batch_size)])
        return rows[:, :-1], rows[:, 1:]

    def _window(self, sample: int) -> npt.NDArray[np.int64]:
        epoch, index = divmod(sample, self.windows)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._phase = epoch, int(rng.integers(self.sequence_length))
            self._order = rng.permutation(self.windows)
        start = self._phase + int(self._order[index]) * self.sequence_length
        return self.tokens[start : start + self.sequence_length + 1].astype(np.int64)


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

"""A corpus in token shards: made once by streaming, trained on many times.

    FOLDER/train/00000.tokens …       what is trained on (shards.py)
    FOLDER/held_out/00000.tokens …    what is not
    FOLDER/tokenizer.json             whose ids they are; may be missing where the data came as ids
    FOLDER/data.json                  where it all came from, tokens of each shard, lines left out as corrupt

A run's folder is such a corpus. `fbiedge train --data FOLDER` reads one in place; without a run it is made by

    python -m fbiedge.training.corpus --data TEXT --tokenizer tokenizer.json -o FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer

from fbiedge.errors import FbiEdgeError, UsageError
from fbiedge.files import atomic_file

from .documents import encode, ids_dtype, split_held_out
from .records import Corrupt
from .sample_shards import write_sample_shards
from .shards import SHARD_TOKENS, SUFFIX, Shard, ShardWriter, open_shard, open_shards, remove_shards
from .sources import Sources, open_sources
from .tokenizer import BOS, EOS, read_tokenizer

PARTS = {"train": "training text", "held_out": "held-out text"}
MANIFEST = "data.json"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How `--data` is read."""

    text_field: str | None = None
    skip_corrupt: bool = False
    skip_chunks: tuple[int, ...] = ()  # numbers of Amber chunks left out of a folder
    most_tokens: int | None = None  # to train on; reading stops there

    def __post_init__(self) -> None:
        if self.most_tokens is not None and self.most_tokens <= 0:
            raise UsageError(f"data_tokens is {self.most_tokens}, expected a positive integer")

    def open(self, named: Sequence[str | Path], corrupt: Corrupt) -> Sources:
        """Find out what the names are. Raises UsageError."""
        return open_sources(named, corrupt, self.text_field, self.skip_chunks)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What turns documents into ids: `bos` + tokens + `eos`. Samples of ids need none but the size."""

    size: int  # of the model; ids lie below
    tokenizer: Tokenizer | None = None
    bos: int = 1
    eos: int = 2


def write_corpus(
    folder: Path,
    data: Sources,
    held_out: Sources | None,
    vocabulary: Vocabulary,
    options: DataOptions,
    corrupt: Corrupt,
) -> dict[str, Any]:
    """Write `data` into `folder`; returns data.json's contents.

    Without `held_out`: of texts every 50th document is held out, of samples a part of one source (sample_shards.py).
    Raises UsageError. What an earlier, unfinished attempt left is removed, or used where samples note it as done.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    written: dict[str, list[int]] = {}
    if data.shards is None:
        written["train"], written["held_out"] = _write(folder, data, held_out is None, vocabulary, options, corrupt)
    if held_out is not None:
        if held_out.shards is not None:
            raise UsageError(f"{held_out.shards}: held-out data are texts or samples, not a folder of shards")
        written["held_out"], _ = _write(folder, held_out, False, vocabulary, DataOptions(), corrupt, into="held_out")
    manifest = {"tokens": written, "skipped_lines": dict(corrupt.counts)}
    with atomic_file(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))
    return manifest


def open_part(folder: Path, part: str) -> list[Shard]:
    """The shards of one of PARTS. Raises UsageError for missing or damaged ones."""
    single = folder / f"{part}{SUFFIX}"  # of runs begun by early versions
    if single.exists():
        return [open_shard(single)]
    bare = part == "train" and not (folder / part).exists()  # shards of other makers
    place = folder if bare else folder / part
    shards = open_shards(place)
    try:
        noted = json.loads((folder / MANIFEST).read_text())["tokens"].get(part)
        promised = sum(noted or ())
    except FileNotFoundError:
        noted = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / MANIFEST} is damaged ({error}); make the shards again") from error
    if noted is not None and noted != [len(shard.tokens) for shard in shards]:
        raise UsageError(
            f"{place} holds {len(shards)} shards of {sum(len(shard.tokens) for shard in shards)} tokens, {MANIFEST} notes "
            f"{len(noted)} of {promised}; copy the missing ones there or make the shards again"
        )
    return shards


def check_ids(shards: Sequence[Shard], vocab_size: int) -> None:
    """Raises UsageError where an id has no row in the model."""
    for shard in shards:
        if shard.largest_id is not None and shard.largest_id >= vocab_size:
            raise UsageError(
                f"{shard.path} has token ids up to {shard.largest_id}, the model's vocabulary {vocab_size}; choose the "
                "model or the teacher whose tokenizer made this data"
            )


def _write(
    folder: Path, data: Sources, hold_out: bool, vocabulary: Vocabulary, options: DataOptions, corrupt: Corrupt,
    into: str = "train",
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Tokens of each shard of `into` and, where `hold_out`, of held_out."""
    if data.samples:
        kept_in = folder / "held_out" if hold_out else None
        return write_sample_shards(folder / into, kept_in, data.samples, vocabulary.size, corrupt, options.most_tokens)
    tokenizer = vocabulary.tokenizer
    assert tokenizer is not None
    remove_shards(folder / into)
    if hold_out:
        remove_shards(folder / "held_out")
    bos, eos = vocabulary.bos, vocabulary.eos
    dtype = ids_dtype(tokenizer, bos, eos)
    documents = data.documents(corrupt)
    with (
        ShardWriter(folder / into, dtype, shard_tokens=SHARD_TOKENS) as train,
        ShardWriter(folder / "held_out", dtype, shard_tokens=SHARD_TOKENS) as kept,
    ):

        def training_part() -> Iterator[str]:
            for document, left_out in split_held_out(documents):
                if left_out:
                    for ids in encode([left_out], tokenizer, bos, eos, dtype):
                        kept.add(ids)
                if document:
                    yield document

        for ids in encode(training_part() if hold_out else documents, tokenizer, bos, eos, dtype):
            train.add(ids)
            if options.most_tokens is not None and sum(train.written) >= options.most_tokens:
                break
    return train.written, kept.written


def main(
    data: Annotated[list[str], typer.Option(help="As for fbiedge train; repeat for more.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the model or its teacher.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the shards.")],
    held_out: Annotated[list[str] | None, typer.Option(help="By default a small part of the data.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of the text in JSONL files and datasets.")] = None,
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Leave corrupt lines out, and count.")] = False,
    skip_chunks: Annotated[str, typer.Option(help="Numbers of Amber chunks to leave out, such as 7,12.")] = "",
    data_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
) -> None:
    """Make the token shards that any number of runs can read."""
    if (out / MANIFEST).exists():
        raise UsageError(f"{out} holds shards already; choose another folder")
    read = read_tokenizer(tokenizer)
    bos, eos = read.token_to_id(BOS), read.token_to_id(EOS)
    if bos is None or eos is None:
        raise UsageError(f"{tokenizer} has no {BOS} and {EOS}, between which documents are put")
    vocabulary = Vocabulary(size=max(read.get_vocab().values()) + 1, tokenizer=read, bos=bos, eos=eos)
    options = DataOptions(
        text_field=text_field, skip_corrupt=skip_corrupt, skip_chunks=numbers(skip_chunks), most_tokens=data_tokens
    )
    corrupt = Corrupt(skip=skip_corrupt)
    sources = options.open(data, corrupt)
    if sources.shards is not None:
        raise UsageError(f"{sources.shards} holds shards already; give it to fbiedge train --data as it is")
    apart = options.open(held_out, corrupt) if held_out else None
    manifest = write_corpus(out, sources, apart, vocabulary, options, corrupt)
    with atomic_file(out / "tokenizer.json") as temporary:
        temporary.write_text(read.to_str())
    print(summary(manifest))


def summary(manifest: dict[str, Any]) -> str:
    """One line for people: how much was read, and what was left out."""
    parts = [f"{sum(tokens):,} tokens of {PARTS[part]}" for part, tokens in manifest["tokens"].items()]
    for source, count in manifest["skipped_lines"].items():
        parts.append(f"{count} corrupt line{'s' if count > 1 else ''} of {source} left out")
    return ", ".join(parts)


def numbers(text: str) -> tuple[int, ...]:
    """The list "7,12" as numbers. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of numbers such as 7,12") from error


if __name__ == "__main__":
    try:
        typer.run(main)
    except FbiEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

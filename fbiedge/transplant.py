"""A full-precision Llama with another vocabulary: `fbiedge transplant MODEL TOKENIZER -o DIR`.

Distillation needs a teacher with the student's vocabulary, and few have a small one. All but embedding and head is kept.
A piece's new row is the row of the same bytes in the model's own vocabulary, else the mean of the rows of the pieces that
spell it, the longest first; <s> and </s> are the model's own begin and end of a text. Such a model says little at first:
it reads and writes other pieces than it learned. A short fine-tune (`fbiedge train --scaling-pattern none --init DIR`)
lets it learn them, far sooner than a new model would learn the language.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .cli_support import read_text
from .errors import ModelFileError, UsageError
from .tokenizer import Tokenizer
from .weights import Weights, expected_shapes, json_sidecar, open_checkpoint, read_sidecars, write_checkpoint

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, kw_only=True)
class Transplant:
    """Where the rows of the new vocabulary came from."""

    pieces: int
    own: int  # one row of the model's
    spelled: int  # the mean of several; the rest has no bytes in the model's vocabulary and gets the mean of all


def transplant(model: Path, tokenizer: Path, out: Path) -> Transplant:
    """Write `model` (a checkpoint folder) with the vocabulary of `tokenizer` (a tokenizer.json or its folder) to `out`.

    What lies beside the tokenizer (its configuration, a chat template) comes along. Raises CheckpointError, UsageError
    for a model that can't be trained and for tokenizers that can't be read, and OutputError.
    """
    source, theirs = _read_source(model)
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = {name: text for name, text in read_sidecars(folder).items() if name != "generation_config.json"}
    if not tokenizer.is_dir():
        files = files | {"tokenizer.json": read_text(tokenizer)}
    if "tokenizer.json" not in files:
        raise UsageError(f"{tokenizer} has no tokenizer.json; name one")
    ours = _tokenizer(files, tokenizer)
    ends = _ends(ours, tokenizer)
    own_ends = (source.config.bos_token_id, source.config.eos_token_id)
    rows = _rows(theirs, ours, source.config.vocab_size) | {
        new: [old] for new, old in zip(ends, own_ends, strict=True) if old < source.config.vocab_size
    }
    config = replace(source.config, vocab_size=len(rows), bos_token_id=ends[0], eos_token_id=ends[1])
    write_checkpoint(out, config, _tensors(source, rows), files)
    return Transplant(
        pieces=len(rows),
        own=sum(len(old) == 1 for old in rows.values()),
        spelled=sum(len(old) > 1 for old in rows.values()),
    )


def _read_source(model: Path) -> tuple[Weights, Tokenizer]:
    """What `transplant` takes. Raises CheckpointError, and UsageError where it can't be transplanted, or not be trained then."""
    source = open_checkpoint(model)
    config = source.config
    if config.scaling_pattern != "none":
        raise UsageError(
            f"{model} is binary ({config.scaling_pattern}), expected full precision; transplant its teacher"
        )
    config.check_trainable(str(model))
    if "tokenizer.json" not in source.files:
        raise UsageError(f"{model} has no tokenizer.json, which says what its rows stand for; put it there")
    return source, _tokenizer(source.files, model)


def _rows(theirs: Tokenizer, ours: Tokenizer, own_rows: int) -> dict[int, list[int]]:
    """For each new id the ids whose rows it is the mean of; none where none of its bytes can be spelled.

    Where two spell the same, the later one is meant: Llama-2's <0x41> stands before its A, and no text has it.
    """
    own = {theirs.token_bytes(token_id): token_id for token_id in range(min(theirs.vocab_size, own_rows))}
    own.pop(b"", None)
    longest = max(map(len, own), default=0)
    rows: dict[int, list[int]] = {}
    for new in range(ours.vocab_size):
        text, rows[new] = ours.token_bytes(new), []
        while text:
            length = next((size for size in range(min(longest, len(text)), 0, -1) if text[:size] in own), 0)
            if length:
                rows[new].append(own[text[:length]])
            text = text[max(length, 1) :]
    return rows


def _tensors(source: Weights, rows: Mapping[int, list[int]]) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for name in expected_shapes(source.config):
        tensor = source.tensor(name)
        if name in _VOCABULARY:
            everything = tensor.mean(axis=0)
            tensor = np.stack([tensor[old].mean(axis=0) if old else everything for old in rows.values()])
        yield name, tensor


def _ends(tokenizer: Tokenizer, path: Path) -> tuple[int, int]:
    """The ids that begin and end a text: as its configuration names them, else <s> and </s>."""
    names = tokenizer.bos_token or "<s>", tokenizer.eos_token or "</s>"
    bos, eos = map(tokenizer.token_id, names)
    if bos is None or eos is None:
        raise UsageError(
            f"{path} has no {names[0] if bos is None else names[1]}; name both ends in tokenizer_config.json"
        )
    return bos, eos


def _tokenizer(files: Mapping[str, str], path: Path) -> Tokenizer:
    config = json_sidecar(files, "special_tokens_map.json") | json_sidecar(files, "tokenizer_config.json")
    try:
        return Tokenizer(files["tokenizer.json"], config)
    except ModelFileError as error:
        raise UsageError(
            f"the tokenizer of {path} can't be read; name a tokenizer.json of Hugging Face's form"
        ) from error

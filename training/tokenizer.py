"""Byte-level BPE tokenizers: every text is representable, nothing is unknown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fbiedge.errors import UsageError

UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2, as in Llama-2


def train_tokenizer(documents: Iterable[str], vocab_size: int, special_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` pieces: <unk> <s> </s>, `special_tokens`, 256 bytes, then merges.

    Raises UsageError where the texts are too small to fill the vocabulary.
    """
    specials = [UNK, BOS, EOS, *special_tokens]
    if vocab_size < 256 + len(specials):
        raise UsageError(
            f"vocabulary of {vocab_size} is too small; bytes and special tokens need {256 + len(specials)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Markers written in the texts are atomic later; their letters must not earn merges here.
    markers = re.compile("|".join(map(re.escape, specials)))
    tokenizer.train_from_iterator((markers.sub("\n", document) for document in documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UsageError(
            f"the texts gave {tokenizer.get_vocab_size()} pieces, {vocab_size} were asked for; "
            "give more text or a smaller vocabulary"
        )
    # Every document began with <s> in training, so every prompt does; chat templates write it themselves.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, specials.index(BOS))]
    )
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UsageError."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UsageError(f"can't read the tokenizer {path}: {error}") from error


def tokenizer_config(
    chat_template: str | None = None, unk: str | None = UNK, bos: str | None = BOS, eos: str | None = EOS
) -> dict[str, object]:
    """tokenizer_config.json's contents, as Hugging Face reads them."""
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unk,
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    return config

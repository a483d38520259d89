"""Streamed pieces joined are the text of all ids, and no piece ends in the middle of a character."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from fbiedge.errors import ModelFileError
from fbiedge.initialize import byte_tokenizer
from fbiedge.tokenizer import DetokenizeStream, Tokenizer

TEXTS = [
    "Once upon a time, there was a little girl.",
    "naïve café, Übung, Ænima",
    "你好,世界。汉字可以。",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈 and 🇫🇷, then 😀😀😀",
    "mixed: é 漢 😀 \t\n  two spaces,\u00a0nbsp\u200b zero width",
    "\ufffd is itself a character",
    " leading space",
    "",
]


def byte_level() -> Library:
    """GPT-2's kind, trained so that tokens end in the middle of characters."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS * 3, trainer)
    library.add_tokens(["<|user|>", "two words"])
    return library


def byte_fallback() -> Library:
    """Llama's kind: a few pieces, and bytes for everything else."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    pieces += ["▁", "▁a", "▁and", "é", "漢", *"abcdefghijklmnopqrstuvwxyzOT.,:"]
    library = Library(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    library.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


LIBRARIES = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "bytes": Library.from_str(byte_tokenizer())}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]


def wrap(library: Library, **config: Any) -> Tokenizer:
    return Tokenizer(library.to_str(), config)


def stream(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> list[str]:
    """One piece an id, and the rest."""
    detokenizer = DetokenizeStream(tokenizer, context)
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(library: Library, text: str) -> None:
    ids = library.encode(text, add_special_tokens=False).ids
    pieces = stream(wrap(library), ids)
    assert "".join(pieces) == text == library.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert wrap(library).decode(ids) == text


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = wrap(LIBRARIES["bytes"])
    ids = tokenizer.encode_rendered("a😀b")
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_of_a_byte_level_tokenizer_decode_as_its_library_does(seed: int) -> None:
    library = LIBRARIES["byte_level"]
    ids = np.random.default_rng(seed).integers(0, library.get_vocab_size(), 200).tolist()
    assert "".join(stream(wrap(library), ids)) == library.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_replaced_as_utf8_decoders_do(seed: int) -> None:
    # Llama's own decoder gives up the valid characters of a run of bytes that has an invalid one; a stream can't, they
    # are out already. So the standard is Unicode's practice, which Python's decoder follows.
    library = LIBRARIES["byte_fallback"]
    first = library.token_to_id("a")
    data = np.random.default_rng(seed).integers(0, 256, 60, dtype=np.uint8).tobytes()
    data += "é漢😀".encode() + data[:7]
    ids = [first, *(library.token_to_id(f"<0x{byte:02X}>") for byte in data)]
    assert "".join(stream(wrap(library), ids)) == "a" + data.decode("utf-8", "replace")


def test_held_back_bytes_are_few() -> None:
    # An endless run of invalid bytes must not silence the stream: at most three bytes can still become a character.
    tokenizer = wrap(LIBRARIES["bytes"])
    ids = [tokenizer.token_id("Ģ")] * 50  # byte 0x80, which starts nothing
    pieces = stream(tokenizer, ids)  # type: ignore[arg-type]
    assert pieces[:50] == ["\ufffd"] * 50


def test_special_tokens_and_padding_have_no_text(library: Library) -> None:
    tokenizer = wrap(library)
    start, beyond = library.token_to_id("<s>"), library.get_vocab_size() + 5
    ids = library.encode("ab", add_special_tokens=False).ids
    assert "".join(stream(tokenizer, [start, *ids, beyond, start])) == "ab"


def test_a_continuation_keeps_its_leading_space() -> None:
    library = LIBRARIES["byte_fallback"]
    tokenizer = wrap(library)
    word = library.token_to_id("▁and")
    assert stream(tokenizer, [word]) == ["and", ""]
    assert stream(tokenizer, [word], context=(library.token_to_id("a"),)) == [" and", ""]


def test_text_spliced_into_a_text_gets_no_space_of_its_own() -> None:
    tokenizer = wrap(LIBRARIES["byte_fallback"])
    before, after = tokenizer.encode_rendered("a"), tokenizer.encode_rendered("é", continues=True)
    assert tokenizer.decode([*before, *after]) == "aé"


def test_the_beginning_of_text_token_comes_once() -> None:
    library = LIBRARIES["byte_fallback"]  # its post-processor adds none
    start = library.token_to_id("<s>")
    assert wrap(library, bos_token="<s>").encode("a")[0] != start
    assert wrap(library, bos_token="<s>", add_bos_token=True).encode("a")[:2].count(start) == 1
    assert wrap(library, bos_token={"content": "<s>"}).encode("") == [start]
    bytes_library = LIBRARIES["bytes"]  # its post-processor adds one
    assert wrap(bytes_library, bos_token="<s>", add_bos_token=True).encode("a").count(1) == 1


def test_undecodable_arguments_are_encoded_all_the_same(library: Library) -> None:
    assert wrap(library).encode("ab\udcff")  # how Python spells byte 0xff of an argument


def test_a_broken_tokenizer_is_reported() -> None:
    with pytest.raises(ModelFileError, match="tokenizer"):
        Tokenizer(json.dumps({"model": {"type": "no such"}}))

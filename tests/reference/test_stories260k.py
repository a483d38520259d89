"""A real trained Llama that nobody here made continues its prompt exactly as llama2.c does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.huggingface import HuggingFaceLlama
from support.stories260k import GOLDEN, PROMPT
from tokenizers import Tokenizer

from fbiedge.reference import Reference
from fbiedge.weights import open_checkpoint


def test_reference_continues_once_upon_a_time(stories260k: Path) -> None:
    weights = open_checkpoint(stories260k)
    tokenizer = Tokenizer.from_str(weights.files["tokenizer.json"])
    prompt, golden = tokenizer.encode(PROMPT).ids, tokenizer.encode(GOLDEN).ids
    generated = Reference(weights).greedy(prompt, len(golden) - len(prompt))
    assert tokenizer.decode(prompt + generated) == GOLDEN
    assert prompt + generated == golden


def test_reference_equals_hugging_face_on_real_weights(stories260k: Path) -> None:
    weights = open_checkpoint(stories260k)
    ids = Tokenizer.from_str(weights.files["tokenizer.json"]).encode(GOLDEN).ids
    expected = HuggingFaceLlama(weights).logits(ids)
    np.testing.assert_allclose(Reference(weights).logits(ids), expected, rtol=1e-4, atol=1e-4)


def test_tokenizer_falls_back_to_bytes(stories260k: Path) -> None:
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    text = "a\né€😀"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["<s>", "▁a", "<0x0A>", "é", "€", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]
    assert tokenizer.decode(encoded.ids) == text

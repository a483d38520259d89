"""What the tests of GGUF share: llama.cpp as the judge, and texts on which tokenizers go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.gguf_files import write_gguf

# What llama.cpp needs to take a file for a model before it reads the vocabulary.
SHAPE = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 128,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}

Tokenize = Callable[..., list[int]]


@pytest.fixture
def llama_tokenizer(tmp_path: Path) -> Iterator[Callable[[Path | dict[str, Any]], Tokenize]]:
    """A function: GGUF file, or the tokenizer's metadata of one -> llama.cpp's tokenizer for it."""
    from llama_cpp import Llama

    opened: list[Llama] = []

    def open_vocabulary(source: Path | dict[str, Any]) -> Tokenize:
        path = source if isinstance(source, Path) else write_gguf(tmp_path / "vocabulary.gguf", SHAPE | source)
        model = Llama(str(path), vocab_only=True, verbose=False)
        opened.append(model)

        def tokenize(text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
            return model.tokenize(text.encode(), add_bos=add_bos, special=special) if text or add_bos else []

        return tokenize

    yield open_vocabulary
    for model in opened:
        model.close()

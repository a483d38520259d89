"""The reference with the rounding that llama.cpp adds: inputs of Q1_0 products in ggml's Q8_0."""

from __future__ import annotations

import numpy as np

from fbiedge.reference import Reference


def q8_0(x: np.ndarray) -> np.ndarray:
    """x [..., K] in blocks of 32: codes of 8 bits times an fp16 scale, max |x| / 127 of the block."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks * (1 / np.where(scale > 0, scale, np.float32(1))))
    return (codes * scale.astype(np.float16).astype(np.float32)).reshape(x.shape)


class RoundedReference(Reference):
    """A model all of whose matrices are Q1_0, the head too."""

    def _project(self, name: str, x: np.ndarray) -> np.ndarray:
        return super()._project(name, q8_0(x))

    def _head(self, x: np.ndarray) -> np.ndarray:
        return super()._head(q8_0(x))

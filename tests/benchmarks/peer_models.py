"""Random weights of any shape and scaling for what `make bench-peers` compares, so that it needs no checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.weights import BinaryLinear


@dataclass(frozen=True)
class RandomWeights:
    """Weights of `config`, drawn when they are read; the same every time."""

    config: ModelConfig
    files: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Norms are 1, tables normal(0, 0.02)."""
        if name.endswith("norm.weight"):
            return np.ones(self.config.hidden_size, np.float32)
        shape = (self.config.vocab_size, self.config.hidden_size)
        return _generator(name).standard_normal(shape, np.float32) * np.float32(0.02)

    def linear(self, name: str) -> BinaryLinear:
        """Random signs; scales about as large as FBI-LLM's, so that activations neither vanish nor overflow."""
        n, k = self.config.linear_shapes()[name.split(".", 3)[3]]
        pattern, generator = self.config.scaling_pattern, _generator(name)
        shape = {"column": (k,), "row": (n,), "single": (1,), "block": (n, -(-k // BLOCK_SIZE))}[pattern]
        packed = np.frombuffer(generator.bytes(n * (-(-k // 8))), np.uint8).reshape(n, -1).copy()
        if k % 8:
            packed[:, -1] &= (1 << k % 8) - 1  # padding bits are 0
        alpha = generator.uniform(0.01, 0.03, shape).astype(np.float32)
        beta = None if pattern == "block" else generator.normal(0, 1e-4, shape).astype(np.float32)
        return BinaryLinear(packed=packed, n=n, k=k, pattern=pattern, alpha=alpha, beta=beta, zeros=0)


def parameters(config: ModelConfig) -> int:
    """Weights of a model, for the headline."""
    linears = config.num_hidden_layers * sum(prod(shape) for shape in config.linear_shapes().values())
    return linears + 2 * config.vocab_size * config.hidden_size


def tensor_names(config: ModelConfig) -> Iterator[str]:
    """Every linear of `config`."""
    for layer in range(config.num_hidden_layers):
        for name in config.linear_shapes():
            yield f"model.layers.{layer}.{name}"


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")))

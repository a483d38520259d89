"""Random weights of any size that need no checkpoint: each tensor is made when it is read, from its name and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fbiedge.config import ModelConfig
from fbiedge.weights import BinaryLinear


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """As Weights, in `block` scaling with fp16 scales; with `binary_rows` embedding and head are of the same form."""

    config: ModelConfig
    seed: int = 0
    binary_rows: bool = False
    files: Mapping[str, str] = field(default_factory=dict)

    def tensor(self, name: str) -> np.ndarray:
        config = self.config
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            if self.binary_rows:
                return self._rows(name.removesuffix(".weight")).dense()
            name = "model.embed_tokens.weight" if config.tie_word_embeddings else name
            return self._generator(name).normal(0, 0.3, (config.vocab_size, config.hidden_size)).astype(np.float32)
        size = config.head_dim if name.endswith(("q_norm.weight", "k_norm.weight")) else config.hidden_size
        return self._generator(name).uniform(0.5, 1.5, size).astype(np.float32)

    def linear(self, name: str) -> BinaryLinear:
        return self._binary(name, *self.config.linear_shapes()[name.split(".", 3)[3]])

    def binary_embedding(self) -> BinaryLinear | None:
        return self._rows("model.embed_tokens") if self.binary_rows else None

    def binary_head(self) -> BinaryLinear | None:
        return self._rows("lm_head") if self.binary_rows else None

    def _rows(self, name: str) -> BinaryLinear:
        name = "model.embed_tokens" if self.config.tie_word_embeddings else name
        return self._binary(name, self.config.vocab_size, self.config.hidden_size)

    def _binary(self, name: str, n: int, k: int) -> BinaryLinear:
        """W_eff whose rows have a norm of about 1."""
        generator = self._generator(name)
        packed = np.frombuffer(generator.bytes(n * -(-k // 8)), np.uint8).reshape(n, -1).copy()
        if k % 8:
            packed[:, -1] &= (1 << k % 8) - 1
        alpha = generator.uniform(0.5, 1.5, (n, -(-k // 128))) / k**0.5
        alpha = alpha.astype(np.float16).astype(np.float32)
        return BinaryLinear(packed=packed, n=n, k=k, pattern="block", alpha=alpha, beta=None, zeros=0)

    def _generator(self, name: str) -> np.random.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def random_weights(config: ModelConfig, seed: int = 0, *, binary_head: bool = False) -> RandomWeights:
    """Random weights of `config`, whose pattern must be `block`; embedding and head of 1 bit or full precision."""
    assert config.scaling_pattern == "block"
    return RandomWeights(config=config, seed=seed, binary_rows=binary_head)

"""The model that a GGUF file and its adapter hold: the weights with their scales folded, rows in llama.cpp's order later.

W'[n, k] = d[n, k / 128] · s[n, k] + b[n] · a[k]           (fold.py derives it; b · aᵀ is the adapter)

pattern   d                        a, b
column    c, or what fit.py found  beta / gamma, c
row       alpha[n]                 ones, beta[n]
single    alpha                    ones, beta
block     alpha[n, g]              none
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fbiedge.bits import unpack_bits
from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.weights import BinaryLinear, Weights

from .fit import Fit
from .fold import LayerFold, Vector
from .q1_0 import half
from .storage import UNROUNDED, GgufOptions, as_stored

_FOLDED_NORMS = {"input_layernorm": "attn", "post_attention_layernorm": "ffn"}


@dataclass(frozen=True, kw_only=True)
class FoldedLinear:
    """W' of one linear."""

    packed: npt.NDArray[np.uint8]  # sign bits [N, ceil(K/8)]
    k: int
    d: npt.NDArray[np.float32]  # [N, ceil(K/128)] or what broadcasts to it
    b: Vector | None  # [N]
    a: Vector | None  # [K]; both None where there is no beta
    zeros: int  # latent weights that were exactly 0

    def dense(self, *, adapter: bool = True) -> npt.NDArray[np.float32]:
        """W' [N, K] as llama.cpp multiplies with it: d rounded to fp16, the adapter in float32."""
        weight = unpack_bits(self.packed, self.k).astype(np.float32)
        weight *= np.repeat(self._blocks(), BLOCK_SIZE, axis=1)[:, : self.k]
        if adapter and self.a is not None and self.b is not None:
            weight += self.b[:, None] * self.a
        return weight

    def _blocks(self) -> npt.NDArray[np.float32]:
        shape = (len(self.packed), -(-self.k // BLOCK_SIZE))
        return np.broadcast_to(half(self.d, "a scale").astype(np.float32), shape)


@dataclass(frozen=True, kw_only=True)
class FoldedModel:
    """Reads weights folded, one tensor at a time. `folds`: one a layer for pattern `column`, else none."""

    weights: Weights
    folds: tuple[LayerFold, ...] = ()
    fitted: Mapping[str, Fit]  # of the lossy linears; d without c

    def linear(self, name: str) -> FoldedLinear:
        """W' of a binary linear."""
        linear = self.weights.linear(name)
        if not isinstance(linear, BinaryLinear) or linear.pattern != self.weights.config.scaling_pattern:
            raise CheckpointError(f"{name} is not binary with the scaling_pattern that the config says")
        if linear.pattern == "column":
            return self._column(name, linear)
        d = linear.alpha if linear.pattern == "block" else linear.alpha[:, None]  # single: [1, 1]
        a = b = None
        if linear.beta is not None:  # of zeros, too: so a model whose adapter was left behind is known by its pattern
            a, b = np.ones(linear.k, np.float32), np.broadcast_to(linear.beta, linear.n)
        return FoldedLinear(packed=linear.packed, k=linear.k, d=d, a=a, b=b, zeros=linear.zeros)

    def norm(self, name: str) -> Vector:
        """A norm's weight, with the gamma of the linears behind it."""
        weight = self.weights.tensor(name)
        parts = name.split(".")
        if not self.folds or parts[1] != "layers" or parts[3] not in _FOLDED_NORMS:
            return weight
        return weight * self.folds[int(parts[2])].gamma[_FOLDED_NORMS[parts[3]]]

    def _column(self, name: str, linear: BinaryLinear) -> FoldedLinear:
        _, _, layer, short = name.split(".", 3)
        packed, _, rows, a = self.folds[int(layer)].parts(short, linear)
        d, fit = rows[:, None], self.fitted.get(name)
        if fit is not None:
            d, packed = d * fit.d, packed if fit.packed is None else fit.packed
        return FoldedLinear(packed=packed, k=linear.k, d=d, a=a, b=rows, zeros=linear.zeros)


@dataclass(frozen=True, kw_only=True)
class DenseWeights:
    """A file's model as ordinary Weights, for the reference: the tensors of an ordinary Llama, rounded as they are stored."""

    model: FoldedModel
    options: GgufOptions = UNROUNDED
    adapter: bool = True  # False: what llama.cpp computes without it

    @property
    def config(self) -> ModelConfig:
        return replace(self.model.weights.config, scaling_pattern="none")

    @property
    def files(self) -> Mapping[str, str]:
        return self.model.weights.files

    def tensor(self, name: str) -> Vector:
        """See Weights."""
        if name.endswith("norm.weight"):
            return self.model.norm(name)
        is_head = name == "lm_head.weight" and not self.config.tie_word_embeddings
        return as_stored(
            self.model.weights.tensor(name), self.options.head if is_head else self.options.embedding, name
        )

    def linear(self, name: str) -> npt.NDArray[np.float32]:
        """See Weights."""
        if self.model.weights.config.scaling_pattern == "none":  # nothing to fold
            dense = self.model.weights.linear(name)
            assert not isinstance(dense, BinaryLinear)
            return as_stored(dense, self.options.head, name)
        return self.model.linear(name).dense(adapter=self.adapter)

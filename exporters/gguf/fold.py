"""Where scales per input go in a format that has none: into the tensors before and behind.

Q1_0 holds one scale for 128 inputs of a row; FBI-LLM has one for each input. But a layer computes the same when the
inputs k of a linear come multiplied by gamma[k] and its columns are divided by it:

    W'[n, k] = c[n] · W[n, k] / gamma[k] = c[n] · (ratio[k] · s[n, k]) + c[n] · a[k]
    ratio = |alpha| / gamma,   a = beta / gamma,   s = sign(W) · sign(alpha)

    tensor      gamma                                c, the factor of its rows
    q, k        attn: into the attention norm        1
    v           attn                                 gamma of o, which attention only mixes by channel
    o           o: a value for each channel of v     1
    gate        ffn: into the FFN norm               1
    up          ffn                                  gamma of down: it multiplies what gate lets through
    down        down                                 1

With gamma = |alpha| every ratio is 1, and d = c holds W' but for beta exactly (up to fp16). o and down allow it always,
the norms where q, k and v (or gate and up) have one alpha, o with grouped queries where the heads of a group share it.
Elsewhere gamma is the common part: in each 128 inputs the alphas are matrices [tensors, 128], each tensor's weighted by
the size of its inputs and relative to its own size, and the best approximation by  size of the tensor × gamma  is their
first singular vector. What remains is left to fit.py. beta is c · aᵀ, a matrix of rank 1: a LoRA adapter (adapter.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.weights import BinaryLinear, HasScales, Weights

Vector = npt.NDArray[np.float32]

_READERS = {  # linears that read one vector, by what its gamma folds into
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "ffn": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
INPUT_OF = {linear: place for place, linears in _READERS.items() for linear in linears}
# A smaller gamma, beside the largest, would make its column of the adapter too large; 2^-20 of W is nobody's loss.
_SMALLEST = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class LayerFold:
    """The gammas of one layer with scales per input."""

    gamma: Mapping[str, Vector]  # by place: attn [hidden], o [heads · head_dim], ffn [hidden], down [FFN]
    rows: Mapping[str, Vector]  # c of v and up
    lossy: tuple[str, ...]  # linears whose ratio isn't 1 throughout
    clamped: int  # gammas that were 0 or nearly so

    def parts(self, linear: str, scales: BinaryLinear) -> tuple[npt.NDArray[np.uint8], Vector, Vector, Vector]:
        """Of W' as above: sign bits of s, ratio [K], c [N], a [K]."""
        gamma = self.gamma[INPUT_OF[linear]]
        rows = self.rows.get(linear, np.ones(scales.n, np.float32))
        if linear in self.lossy:
            ratio = np.asarray(np.abs(scales.alpha) / gamma, np.float32)
        else:
            ratio = np.ones(scales.k, np.float32)
        beta = np.zeros(scales.k, np.float32) if scales.beta is None else scales.beta
        return flip_columns(scales.packed, scales.alpha < 0), ratio, rows, beta / gamma


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Whether Q1_0 and an adapter hold a model exactly, and if not, which linears they don't."""

    folds: tuple[LayerFold, ...]  # one a layer with scales per input, else none

    @property
    def lossy(self) -> tuple[str, ...]:
        """Whole names."""
        return tuple(f"{_prefix(layer)}{linear}" for layer, fold in enumerate(self.folds) for linear in fold.lossy)

    @property
    def exact(self) -> bool:
        return not self.lossy


def exactness(weights: Weights) -> Exactness:
    """By the scales that are there, whatever a config says. A full-precision model has nothing to lose here."""
    layers = range(weights.config.num_hidden_layers if weights.config.scaling_pattern == "column" else 0)
    return Exactness(folds=tuple(column_fold(weights, layer) for layer in layers))


def column_fold(weights: Weights, layer: int, sizes: Mapping[str, Vector] = MappingProxyType({})) -> LayerFold:
    """The fold of a layer with scales per input; `sizes`, by place, where known: how large the inputs are (rms)."""
    config = weights.config
    alpha = {name: np.abs(_alpha(weights, f"{_prefix(layer)}{name}")) for name in INPUT_OF}
    gamma, lossy = {}, []
    for place in ("attn", "ffn"):
        alphas = [alpha[name] for name in _READERS[place]]
        gamma[place], same = _common(alphas, sizes.get(place))
        lossy += [] if same else [*_READERS[place]]
    channels, same = _by_channel(alpha["self_attn.o_proj"], config, sizes.get("o"))
    lossy += [] if same else [*_READERS["o"]]
    gamma |= {"o": _repeated(channels, config), "down": alpha["mlp.down_proj"]}
    clamped = sum(int((values < values.max() * _SMALLEST).sum()) for values in gamma.values())
    gamma = {place: _clamp(values) for place, values in gamma.items()}
    rows = {"self_attn.v_proj": _clamp(channels), "mlp.up_proj": gamma["down"]}
    return LayerFold(gamma=gamma, rows=rows, lossy=tuple(lossy), clamped=clamped)


def flip_columns(packed: npt.NDArray[np.uint8], columns: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Plain sign bits [N, K/8] with the signs of the chosen inputs turned over."""
    return packed ^ np.packbits(columns, bitorder="little") if columns.any() else packed


def _common(alphas: Sequence[Vector], size: Vector | None) -> tuple[Vector, bool]:
    """What the alphas [K] have in common, and whether that is all of them."""
    if all(np.array_equal(alphas[0], other) for other in alphas[1:]):
        return alphas[0], True
    stacked = np.stack(alphas).astype(np.float64)
    scale = np.maximum(np.ones(stacked.shape[1]) if size is None else size.astype(np.float64), 1e-12)
    common = np.empty(stacked.shape[1])
    for start in range(0, len(common), BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        matrix = stacked[:, block] * scale[block]
        length = np.linalg.norm(matrix, axis=1, keepdims=True)
        _, _, rows = np.linalg.svd(matrix / np.where(length > 0, length, 1), full_matrices=False)
        # Only ratios within a block count; with the alphas' size the norm keeps its own.
        direction = np.abs(rows[0]) / scale[block]
        common[block] = direction * np.linalg.norm(stacked[:, block]) / max(np.linalg.norm(direction), 1e-30)
    return common.astype(np.float32), False


def _by_channel(alpha: Vector, config: ModelConfig, size: Vector | None) -> tuple[Vector, bool]:
    """o's alpha [heads · head_dim] as one number a channel of v [KV heads · head_dim], and whether that is exact."""
    groups = alpha.reshape(config.num_key_value_heads, -1, config.head_dim)  # [G, H/G, D]
    if (groups == groups[:, :1]).all():
        return groups[:, 0].reshape(-1), True
    weight = (np.ones_like(alpha) if size is None else size**2 + np.float32(1e-12)).reshape(groups.shape)
    mean = (groups * weight).sum(axis=1) / weight.sum(axis=1)
    return mean.reshape(-1), False


def _repeated(channels: Vector, config: ModelConfig) -> Vector:
    """A value for each channel of v [KV heads · head_dim] -> one for each input of o [heads · head_dim]."""
    by_head = channels.reshape(config.num_key_value_heads, 1, config.head_dim)
    group = config.num_attention_heads // config.num_key_value_heads
    return np.repeat(by_head, group, axis=1).reshape(-1)


def _clamp(gamma: Vector) -> Vector:
    largest = gamma.max()
    return np.maximum(gamma, largest * np.float32(_SMALLEST)) if largest > 0 else np.ones_like(gamma)


def _alpha(weights: Weights, name: str) -> Vector:
    if isinstance(weights, HasScales):  # without the bits, which take a hundred times as long to read
        return weights.scales(name)[0]
    linear = weights.linear(name)
    if not isinstance(linear, BinaryLinear):
        raise CheckpointError(f"{name} is not binary, but the config's scaling_pattern says so")
    return linear.alpha


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."

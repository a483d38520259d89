"""Least squares for what doesn't fold: the d and the signs that change a linear's outputs least, on a text.

With x' the inputs as they arrive, gamma · x (fold.py), a row computes  y = Σ_k ratio[k] · s[k] · x'[k], and what can be had
is  ŷ = Σ_g d[g] · z[g],  z[g] = Σ_{k in g} s[k] · x'[k].  Over the positions of a text, d minimises  mean (y - ŷ)²: a system
of K/128 equations a row, all groups at once, since inputs of different groups are correlated. Positions may be few, so
d is held near its value for uncorrelated inputs, the mean of ratio weighted by x'², by a ridge.

With at least 2 positions an input, signs are chosen too: inputs in the order of their size, each gets the sign nearest to
what is wanted of it, and what is left over is made up by the inputs after it, as far as they are correlated with it
(GPTQ's way of rounding; arXiv 2210.17323). With fewer positions that would fit the text and not the language.

Inputs are those of the original model: `record_inputs` runs the reference and keeps them. `fit_model` does it all. What it
costs must be measured on another text: a fit looks too good on its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fbiedge.bits import pack_bits, unpack_bits
from fbiedge.config import BLOCK_SIZE
from fbiedge.errors import UsageError
from fbiedge.reference import Reference
from fbiedge.weights import Weights

from ..onnx.verify import matrix_parameters
from .fold import INPUT_OF, Exactness, LayerFold, column_fold

Matrix = npt.NDArray[np.float32]

_RIDGE = 1e-3  # of the mean diagonal of a row's system
_SIGN_RIDGE = 1e-2  # of the mean square of the inputs
_TOKENS_AN_INPUT = 2  # from which on signs are chosen
_ROUNDS = 2  # of choosing signs and fitting d to them
_ROWS_AT_ONCE = 256
# What a fit may take: the inputs it keeps, and the multiply-adds of the pass that records them (7B: about 240 tokens).
_INPUT_BYTES = 256 * 1000**2
_MULTIPLY_ADDS = 4 * 1000**4
_MOST_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What stands for a linear that doesn't fold."""

    d: Matrix  # [N, K/128]
    packed: npt.NDArray[np.uint8] | None  # other sign bits [N, K/8], where some were chosen
    error: float  # rms of the outputs' error, relative to the outputs with the adapter's part


@dataclass(frozen=True, kw_only=True)
class ModelFit:
    """What stands for all that doesn't fold; nothing, where all folds."""

    folds: tuple[LayerFold, ...]
    linears: Mapping[str, Fit] = field(default_factory=dict)
    tokens: int = 0  # of the text that was fitted to
    most_tokens: int = 0  # that a fit of this model may take
    widest: int = 0  # inputs of the widest linear among them

    def advice(self) -> str | None:
        """What would make it better."""
        wanted, text = _TOKENS_AN_INPUT * self.widest, "--calibration-text FILE gives a better one"
        if self.tokens < self.widest and self.tokens == self.most_tokens:
            return f"a fit of a model of this size takes {self.tokens:,} tokens, fewer than its {self.widest:,} inputs"
        if self.tokens < self.widest:
            return f"{self.tokens:,} tokens are few for a fit of {self.widest:,} inputs; {text}"
        if self.tokens < wanted <= self.most_tokens:
            return f"from {wanted:,} tokens on signs are fitted too, which may halve the loss; {text}"
        return None


def fit_model(weights: Weights, found: Exactness, ids: Sequence[int] | None, *, resident: bool) -> ModelFit:
    """Fit what doesn't fold to as many of `ids` as are affordable. Raises UsageError where there are none, but needed."""
    if found.exact:
        return ModelFit(folds=found.folds)
    if not ids:
        raise UsageError("scales that differ between linears must be fitted to a text; give one of at least one token")
    # 1. Inputs of the lossy linears; those that share one are named by the first.
    first = {place: name for name, place in reversed(INPUT_OF.items())}
    watched = {
        f"model.layers.{layer}.{first[INPUT_OF[name]]}" for layer, fold in enumerate(found.folds) for name in fold.lossy
    }
    most_tokens = _affordable(weights, watched)
    ids = list(ids)[:most_tokens]
    inputs = record_inputs(weights, ids, watched, resident=resident)
    # 2. Gammas, now that the size of inputs is known, and d.
    folds: list[LayerFold] = []
    fitted: dict[str, Fit] = {}
    for layer in range(len(found.folds)):
        prefix = f"model.layers.{layer}."
        known = {place: inputs[f"{prefix}{name}"] for place, name in first.items() if f"{prefix}{name}" in inputs}
        fold = column_fold(weights, layer, {place: rms(x) for place, x in known.items()})
        folds.append(fold)
        for name in fold.lossy:
            place = INPUT_OF[name]
            linear: Any = weights.linear(f"{prefix}{name}")
            packed, ratio, _, a = fold.parts(name, linear)
            fitted[f"{prefix}{name}"] = fit_linear(packed, ratio, a, known[place] * fold.gamma[place])
    widest = max(x.shape[1] for x in inputs.values())
    return ModelFit(folds=tuple(folds), linears=fitted, tokens=len(ids), most_tokens=most_tokens, widest=widest)


def record_inputs(weights: Weights, ids: Sequence[int], names: Collection[str], *, resident: bool) -> dict[str, Matrix]:
    """Inputs [tokens, K] of the linears `names` on `ids`, which are read in windows of the model's context."""
    recorder = _Recorder(weights, names, resident)
    window = weights.config.max_position_embeddings
    for start in range(0, len(ids), window):
        recorder.reset()
        recorder.logits(ids[start : start + window])
    return {name: np.concatenate(parts) for name, parts in recorder.inputs.items()}


def fit_linear(
    packed: npt.NDArray[np.uint8], ratio: npt.NDArray[np.float32], a: npt.NDArray[np.float32], inputs: Matrix
) -> Fit:
    """The fit for sign bits [N, K/8], ratio [K] and the adapter's a [K]; `inputs` [tokens, K] are x', so with gamma."""
    d, error = fit_scales(packed, packed, ratio, a, inputs)
    chosen = None
    if len(inputs) >= _TOKENS_AN_INPUT * inputs.shape[1]:
        for _ in range(_ROUNDS):
            signs = choose_signs(packed, ratio, d, inputs)
            new_d, new_error = fit_scales(signs, packed, ratio, a, inputs)
            if new_error >= error:
                break
            d, error, chosen = new_d, new_error, signs
    return Fit(d=d, packed=chosen, error=error)


def fit_scales(
    stored: npt.NDArray[np.uint8],
    packed: npt.NDArray[np.uint8],
    ratio: npt.NDArray[np.float32],
    a: npt.NDArray[np.float32],
    inputs: Matrix,
) -> tuple[Matrix, float]:
    """d [N, K/128] for the bits `stored` in place of `packed` with ratio, and the error that is left (see Fit)."""
    tokens, k = inputs.shape
    groups = k // BLOCK_SIZE
    by_group = np.ascontiguousarray(inputs.reshape(tokens, groups, BLOCK_SIZE).transpose(1, 0, 2))  # [G, T, 128]
    uncorrelated = _uncorrelated(ratio, inputs)  # [G]
    offset = inputs @ a  # [T]
    d = np.empty((len(packed), groups), np.float32)
    left = total = 0.0
    for start in range(0, len(packed), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        signs = unpack_bits(stored[rows], k).astype(np.float32)  # [R, K]
        z = by_group @ signs.reshape(-1, groups, BLOCK_SIZE).transpose(1, 2, 0)  # [G, T, R]
        z = np.ascontiguousarray(z.transpose(2, 0, 1))  # [R, G, T]
        y = (unpack_bits(packed[rows], k) * ratio) @ inputs.T  # [R, T]
        rest = y - np.einsum("rgt,g->rt", z, uncorrelated)
        system = (z @ z.transpose(0, 2, 1)).astype(np.float64)  # [R, G, G]
        diagonal = np.einsum("rgg->rg", system)
        diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + 1e-30
        step = np.linalg.solve(system, (z @ rest[..., None]).astype(np.float64))[..., 0]  # [R, G]
        found = (uncorrelated + step).astype(np.float32)
        d[rows] = found
        left += float(np.square(y - np.einsum("rgt,rg->rt", z, found), dtype=np.float64).sum())
        total += float(np.square(y + offset, dtype=np.float64).sum())
    return d, float(np.sqrt(left / total)) if total else 0.0


def choose_signs(
    packed: npt.NDArray[np.uint8], ratio: npt.NDArray[np.float32], d: Matrix, inputs: Matrix
) -> npt.NDArray[np.uint8]:
    """Sign bits [N, K/8] that with d [N, K/128] come nearest to those of `packed` with ratio [K]."""
    tokens, k = inputs.shape
    moments = (inputs.T @ inputs).astype(np.float64) / tokens  # [K, K]
    np.einsum("kk->k", moments)[:] += _SIGN_RIDGE * np.trace(moments) / k + 1e-30
    order = np.argsort(-np.diag(moments))
    # Row i: how an error in input i is made up by the inputs after it.
    remedy = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    wanted = (unpack_bits(packed, k) * ratio).astype(np.float64)[:, order]  # [N, K]
    size = np.repeat(d, BLOCK_SIZE, axis=1)[:, order].astype(np.float64)
    chosen = np.empty((len(packed), k), np.float32)
    for i in range(k):
        # A d below 0 turns the sign of what it is multiplied with.
        chosen[:, order[i]] = np.where(wanted[:, i] * size[:, i] >= 0, 1, -1)
        error = (wanted[:, i] - size[:, i] * chosen[:, order[i]]) / remedy[i, i]
        wanted[:, i + 1 :] -= error[:, None] * remedy[i, i + 1 :]
    return pack_bits(chosen)


def rms(inputs: Matrix) -> npt.NDArray[np.float32]:
    """How large each input is [K]."""
    size: npt.NDArray[np.float32] = np.sqrt(np.square(inputs, dtype=np.float64).mean(axis=0)).astype(np.float32)
    return size


def _uncorrelated(ratio: npt.NDArray[np.float32], inputs: Matrix) -> npt.NDArray[np.float32]:
    power = np.square(inputs, dtype=np.float64).mean(axis=0).reshape(-1, BLOCK_SIZE) + 1e-30
    weighted: npt.NDArray[np.float32] = (
        (ratio.reshape(-1, BLOCK_SIZE) * power).sum(axis=1) / power.sum(axis=1)
    ).astype(np.float32)
    return weighted


def _affordable(weights: Weights, watched: Collection[str]) -> int:
    shapes = weights.config.linear_shapes()
    token_bytes = 4 * sum(shapes[name.split(".", 3)[3]][1] for name in watched)
    by_work = _MULTIPLY_ADDS // matrix_parameters(weights.config)
    return max(16, min(_MOST_TOKENS, _INPUT_BYTES // token_bytes, by_work))


class _Recorder(Reference):
    """The reference, which keeps what some of its linears are given."""

    def __init__(self, weights: Weights, names: Collection[str], resident: bool) -> None:
        super().__init__(weights, resident=resident)
        self.inputs: dict[str, list[Matrix]] = {name: [] for name in names}

    def _project(self, name: str, x: Matrix) -> Matrix:
        if name in self.inputs:
            self.inputs[name].append(x)
        return super()._project(name, x)

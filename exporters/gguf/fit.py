"""Least squares for what doesn't fold: the d of a row and 128 inputs that changes a linear's outputs least, on a text.

With x' the inputs as they arrive, gamma · x (fold.py), a row computes  y = Σ_k ratio[k] · s[k] · x'[k], and what can be had
is  ŷ = Σ_g d[g] · z[g],  z[g] = Σ_{k in g} s[k] · x'[k].  Over the positions of a text, d minimises  mean (y - ŷ)²: a system
of K/128 equations a row, all groups at once, since inputs of different groups are correlated. Positions may be few, so
d is held near its value for uncorrelated inputs, the mean of ratio weighted by x'², by a ridge.

Inputs are those of the original model: `record_inputs` runs the reference and keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from fbiedge.bits import unpack_bits
from fbiedge.config import BLOCK_SIZE
from fbiedge.reference import Reference
from fbiedge.weights import Weights

Matrix = npt.NDArray[np.float32]

_RIDGE = 1e-3  # of the mean diagonal of a row's system
_ROWS_AT_ONCE = 256


def record_inputs(weights: Weights, ids: Sequence[int], names: Collection[str], *, resident: bool) -> dict[str, Matrix]:
    """Inputs [tokens, K] of the linears `names` on `ids`, which are read in windows of the model's context."""
    recorder = _Recorder(weights, names, resident)
    window = weights.config.max_position_embeddings
    for start in range(0, len(ids), window):
        recorder.reset()
        recorder.logits(ids[start : start + window])
    return {name: np.concatenate(parts) for name, parts in recorder.inputs.items()}


def fit_scales(
    packed: npt.NDArray[np.uint8], ratio: npt.NDArray[np.float32], a: npt.NDArray[np.float32], inputs: Matrix
) -> tuple[Matrix, float]:
    """d [N, K/128] for sign bits [N, K/8], and the error that is left: rms of ŷ - y relative to y, with the adapter's part.

    `inputs` [tokens, K] are x', so with gamma; `a` [K] is the adapter's row.
    """
    tokens, k = inputs.shape
    groups = k // BLOCK_SIZE
    by_group = np.ascontiguousarray(inputs.reshape(tokens, groups, BLOCK_SIZE).transpose(1, 0, 2))  # [G, T, 128]
    uncorrelated = _uncorrelated(ratio, inputs)  # [G]
    offset = inputs @ a  # [T]
    d = np.empty((len(packed), groups), np.float32)
    left = total = 0.0
    for start in range(0, len(packed), _ROWS_AT_ONCE):
        signs = unpack_bits(packed[start : start + _ROWS_AT_ONCE], k).astype(np.float32)  # [R, K]
        z = by_group @ signs.reshape(-1, groups, BLOCK_SIZE).transpose(1, 2, 0)  # [G, T, R]
        z = np.ascontiguousarray(z.transpose(2, 0, 1))  # [R, G, T]
        signs *= ratio
        y = signs @ inputs.T  # [R, T]
        rest = y - np.einsum("rgt,g->rt", z, uncorrelated)
        system = (z @ z.transpose(0, 2, 1)).astype(np.float64)  # [R, G, G]
        diagonal = np.einsum("rgg->rg", system)
        diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + 1e-30
        step = np.linalg.solve(system, (z @ rest[..., None]).astype(np.float64))[..., 0]  # [R, G]
        found = (uncorrelated + step).astype(np.float32)
        d[start : start + len(found)] = found
        left += float(np.square(y - np.einsum("rgt,rg->rt", z, found), dtype=np.float64).sum())
        total += float(np.square(y + offset, dtype=np.float64).sum())
    return d, float(np.sqrt(left / total)) if total else 0.0


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


class _Recorder(Reference):
    """The reference, which keeps what some of its linears are given."""

    def __init__(self, weights: Weights, names: Collection[str], resident: bool) -> None:
        super().__init__(weights, resident=resident)
        self.inputs: dict[str, list[Matrix]] = {name: [] for name in names}

    def _linear(self, name: str) -> Matrix:
        weight: Matrix = super()._linear(name)
        if name in self.inputs:
            return _Watched(weight, self.inputs[name].append)  # type: ignore[return-value]
        return weight


class _Watched:
    """A matrix that tells what it is multiplied with, in `x @ weight.T`."""

    __array_ufunc__ = None  # so that numpy leaves `x @ watched` to __rmatmul__

    def __init__(self, weight: Matrix, tell: Callable[[Matrix], None]) -> None:
        self._weight, self._tell = weight, tell

    @property
    def T(self) -> _Watched:
        return self

    def __rmatmul__(self, x: Matrix) -> Matrix:
        self._tell(x)
        product: Matrix = x @ self._weight.T
        return product

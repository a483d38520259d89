"""The operator BinaryMatMul written down a second time: random problems, the formula in float64, the int8 rule in numpy.

Nothing here calls the op library; the tests compare it with this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fbiedge.bits import pack_bits, tile_bits

FORMS = ("column", "row", "single", "block")
GROUP = 128


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operator with its weights and activations. `scales` and `offsets` are as the operator takes them."""

    m: int
    n: int
    k: int
    form: str
    x: npt.NDArray[np.float32]  # [M, K]
    signs: npt.NDArray[np.int8]  # [N, K]
    tiles: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    offsets: npt.NDArray[np.float32] | None
    bias: npt.NDArray[np.float32] | None
    weight: npt.NDArray[np.float64]  # [N, K], W_eff
    weight_magnitude: npt.NDArray[np.float64]  # [N, K], |alpha| + |beta|

    def expected(self) -> npt.NDArray[np.float64]:
        """The formula in float64: [M, N]."""
        y = self.x.astype(np.float64) @ self.weight.T
        return y if self.bias is None else y + self.bias

    def magnitude(self) -> npt.NDArray[np.float64]:
        """Sum of the magnitudes that each output adds up: what rounding errors are proportional to. [M, N]"""
        y = np.abs(self.x.astype(np.float64)) @ self.weight_magnitude.T
        return y if self.bias is None else y + np.abs(self.bias)

    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments of fbiedge.ops_library.matmul."""
        return self.x, self.tiles, self.scales, self.offsets, self.bias


def problem(
    m: int, n: int, k: int, form: str, *, seed: int = 0, fp16: bool = False, offsets: bool = True, bias: bool = True
) -> Problem:
    """A random problem. `offsets` counts outside block form, `fp16` in it."""
    rng = np.random.default_rng([seed, m, n, k])
    latent = rng.standard_normal((n, k), np.float32)
    signs = np.where(latent >= 0, 1, -1).astype(np.int8)
    beta: npt.NDArray[np.float32] | None = None
    if form == "block":
        groups = -(-k // GROUP)
        d = rng.uniform(0.5, 1.5, (n, groups)).astype(np.float16 if fp16 else np.float32)
        alpha = np.repeat(d.astype(np.float64), GROUP, axis=1)[:, :k]
        padded = np.zeros((-(-n // 16) * 16, groups), d.dtype)
        padded[:n] = d
        scales: npt.NDArray[Any] = np.ascontiguousarray(padded.reshape(-1, 16, groups).transpose(0, 2, 1))
    else:
        shape = {"column": (1, k), "row": (n, 1), "single": (1, 1)}[form]
        alpha32 = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        alpha = np.broadcast_to(alpha32.astype(np.float64), (n, k))
        scales = alpha32.reshape(-1)
        if offsets:
            beta = rng.uniform(-0.2, 0.2, shape).astype(np.float32)
    beta64 = np.zeros((1, 1)) if beta is None else beta.astype(np.float64)
    return Problem(
        m=m,
        n=n,
        k=k,
        form=form,
        x=rng.standard_normal((m, k), np.float32),
        signs=signs,
        tiles=tile_bits(pack_bits(latent)),
        scales=scales,
        offsets=None if beta is None else beta.reshape(-1),
        bias=rng.standard_normal(n, np.float32) if bias else None,
        weight=alpha * signs + beta64,
        weight_magnitude=np.abs(alpha) + np.abs(np.broadcast_to(beta64, (n, k))),
    )


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The RMS norm in front of a layer."""

    weight: npt.NDArray[np.float32]  # [K]
    epsilon: float

    def factor(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """1 / RMS of each token, exact bits: [M]."""
        mean = _lane_sum(x * x) / np.float32(x.shape[1])
        return np.float32(1) / np.sqrt(mean + np.float32(self.epsilon))

    def apply(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The formula in float64: [M, K]."""
        x64 = x.astype(np.float64)
        return x64 / np.sqrt((x64**2).mean(axis=1, keepdims=True) + self.epsilon) * self.weight


def int8_by_specification(p: Problem, *, norm: Norm | None = None) -> npt.NDArray[np.float32]:
    """The int8 level step by step as SPECIFICATION.md has it, every float operation in float32: [M, N], exact bits.

    With `norm`, as spec/BinaryQKV.md has it.
    """
    column = p.form == "column"
    alpha: Any = p.scales if column else np.float32(1)
    beta: Any = p.offsets if column and p.offsets is not None else np.float32(1)
    factor: Any = np.float32(1)
    if norm is not None:
        alpha, beta = norm.weight * alpha, norm.weight * beta
        factor = norm.factor(p.x)[:, None]
    xs = alpha * p.x
    groups = -(-p.k // GROUP)
    total = np.zeros((p.m, p.n), np.float32)
    for g in range(groups):
        part = slice(g * GROUP, min((g + 1) * GROUP, p.k))
        step = np.abs(xs[:, part]).max(axis=1, keepdims=True) / np.float32(127)
        q = np.rint(np.divide(xs[:, part], step, out=np.zeros_like(xs[:, part]), where=step > 0))
        integer = q.astype(np.int64) @ p.signs[:, part].astype(np.int64).T
        value = (factor * step) * integer.astype(np.float32)
        if p.form == "block":
            value = p.scales[:, g].reshape(-1)[: p.n].astype(np.float32) * value
        total = total + value
    if p.form in ("row", "single"):
        total = p.scales * total
    if p.offsets is not None:
        summed = factor * _lane_sum(beta * p.x)[:, None]
        total = total + (summed if column else p.offsets * summed)
    return total if p.bias is None else total + p.bias


def _lane_sum(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[M, K] -> [M]: 16 running sums of every 16th value, then lanes 8, 4, 2, 1 apart."""
    m, k = values.shape
    padded = np.zeros((m, -(-k // 16) * 16), np.float32)
    padded[:, :k] = values
    lanes = np.zeros((m, 16), np.float32)
    for row in padded.reshape(m, -1, 16).transpose(1, 0, 2):
        lanes = lanes + row
    for step in (8, 4, 2, 1):
        lanes = lanes[:, :step] + lanes[:, step : 2 * step]
    return lanes[:, 0]


def op_model(
    p: Problem,
    *,
    accuracy_level: int = 4,
    attributes: dict[str, Any] | None = None,
    tensors: dict[str, npt.NDArray[Any] | None] | None = None,
    a_shape: list[Any] | None = None,
) -> ModelProto:
    """A model of one BinaryMatMul node named `projection`, input A, output Y.

    `attributes` and `tensors` (B, scales, offsets, bias) replace the right ones; an attribute or tensor None is left out.
    """
    attrs: dict[str, Any] = {
        "K": p.k,
        "N": p.n,
        "scale_form": p.form,
        "block_size": GROUP if p.form == "block" else 0,
        "accuracy_level": accuracy_level,
        **(attributes or {}),
    }
    inputs = {"B": p.tiles, "scales": p.scales, "offsets": p.offsets, "bias": p.bias, **(tensors or {})}
    names = ["A", *(name if array is not None else "" for name, array in inputs.items())]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        "BinaryMatMul", names, ["Y"], name="projection", domain="fbiedge",
        **{name: value for name, value in attrs.items() if value is not None},
    )  # fmt: skip
    shape = a_shape if a_shape is not None else ["batch", "sequence", p.k]
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in inputs.items() if array is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("fbiedge", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)

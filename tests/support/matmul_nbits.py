"""The operator MatMulNBits written down a second time: random problems, the formula in float64, the int8 rule in numpy.

Nothing here calls the op library or the exporter; the tests compare them with this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

BLOCK, GROUP, ROWS = 32, 128, 16


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operator with its weights and activations."""

    m: int
    n: int
    k: int
    bits: int
    x: npt.NDArray[np.float32]  # [M, K]
    codes: npt.NDArray[np.uint8]  # [N, K]
    scales: npt.NDArray[np.float16]  # [N, ceil(K/32)]

    @property
    def integers(self) -> npt.NDArray[np.int64]:
        """code - z [N, K]."""
        return self.codes.astype(np.int64) - (1 << (self.bits - 1))

    @property
    def weight(self) -> npt.NDArray[np.float64]:
        """W [N, K]."""
        return self.integers * np.repeat(self.scales.astype(np.float64), BLOCK, axis=1)[:, : self.k]

    def expected(self) -> npt.NDArray[np.float64]:
        """The formula in float64: [M, N]."""
        return self.x.astype(np.float64) @ self.weight.T

    def magnitude(self) -> npt.NDArray[np.float64]:
        """Sum of the magnitudes that each output adds up: what rounding errors are proportional to. [M, N]"""
        return np.abs(self.x.astype(np.float64)) @ np.abs(self.weight).T

    def tiles(self) -> npt.NDArray[np.uint8]:
        """B, byte by byte as section 2 of the specification says it."""
        groups = -(-self.k // GROUP)
        tiles = np.zeros((-(-self.n // ROWS), groups, 128 + 256 * self.bits), np.uint8)
        for n in range(self.n):
            tile, row = divmod(n, ROWS)
            for block, scale in enumerate(self.scales[n]):
                at = 2 * (block % 4 * ROWS + row)
                tiles[tile, block // 4, at : at + 2] = np.frombuffer(scale.astype("<f2").tobytes(), np.uint8)
            for k in range(self.k):
                byte = k % GROUP * self.bits // 8
                shift = 4 * (k % 2) if self.bits == 4 else 0
                tiles[tile, k // GROUP, 128 + 64 * (byte // 4) + 4 * row + byte % 4] |= int(self.codes[n, k]) << shift
        return tiles


def problem(m: int, n: int, k: int, bits: int, *, seed: int = 0) -> Problem:
    """A random problem; all codes occur, the extreme ones too, and scales of both signs and of many sizes."""
    rng = np.random.default_rng([seed, m, n, k, bits])
    scales = rng.choice([-1, 1], (n, -(-k // BLOCK))) * np.exp(rng.uniform(-12, 1, (n, -(-k // BLOCK))))
    return Problem(
        m=m, n=n, k=k, bits=bits,
        x=rng.standard_normal((m, k), np.float32),
        codes=rng.integers(0, 1 << bits, (n, k), np.uint8),
        scales=scales.astype(np.float16),
    )  # fmt: skip


def int8_by_specification(p: Problem) -> npt.NDArray[np.float32]:
    """The int8 level step by step as spec/MatMulNBits.md has it, every float operation in float32: [M, N], exact bits."""
    total = np.zeros((p.m, p.n), np.float32)
    for g in range(-(-p.k // GROUP)):
        part = slice(g * GROUP, min((g + 1) * GROUP, p.k))
        x = p.x[:, part]
        step = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
        q = np.rint(np.divide(x, step, out=np.zeros_like(x), where=step > 0)).astype(np.int64)
        v = np.zeros((p.m, p.n), np.float32)
        for start in range(0, q.shape[1], BLOCK):
            integer = q[:, start : start + BLOCK] @ p.integers[:, part][:, start : start + BLOCK].T
            d = p.scales[:, (g * GROUP + start) // BLOCK].astype(np.float32)
            v = v + d * integer.astype(np.float32)
        total = total + step * v
    return total


def op_model(
    p: Problem,
    *,
    accuracy_level: int = 4,
    attributes: dict[str, Any] | None = None,
    tiles: npt.NDArray[Any] | None = None,
    a_shape: list[Any] | None = None,
    functions: Sequence[FunctionProto] = (),
) -> ModelProto:
    """A model of one MatMulNBits node named `head`, input A, output Y. An attribute None is left out."""
    attrs: dict[str, Any] = {
        "K": p.k, "N": p.n, "bits": p.bits, "block_size": BLOCK, "accuracy_level": accuracy_level, **(attributes or {}),
    }  # fmt: skip
    node = helper.make_node(
        "MatMulNBits", ["A", "B"], ["Y"], name="head", domain="fbiedge",
        **{name: value for name, value in attrs.items() if value is not None},
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, a_shape or ["tokens", p.k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(p.tiles() if tiles is None else tiles, "B")],
    )
    domains = (("", 21), ("com.microsoft", 1), ("fbiedge", 1))
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)

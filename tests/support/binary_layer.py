"""The operators BinaryQKV and BinarySwiGLU written down a second time, over problems of support.binary_matmul."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, ModelProto, TensorProto, helper, numpy_helper

from .binary_matmul import GROUP, Norm, Problem, int8_by_specification, problem

PARTS = {"BinaryQKV": ("q", "k", "v"), "BinarySwiGLU": ("gate", "up")}


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """One operator: matrices of one K and one form that share their activations."""

    op_type: str
    parts: tuple[Problem, ...]
    norm: Norm

    @property
    def x(self) -> npt.NDArray[np.float32]:
        return self.parts[0].x

    def expected(self) -> npt.NDArray[np.float64]:
        """The formula in float64."""
        normed = self.norm.apply(self.x)
        products = [normed @ part.weight.T for part in self.parts]
        if self.op_type == "BinaryQKV":
            return np.concatenate(products, axis=1)
        gate, up = products
        return gate / (1 + np.exp(-gate)) * up

    def magnitude(self) -> npt.NDArray[np.float64]:
        """What rounding errors of the result are proportional to."""
        normed = np.abs(self.norm.apply(self.x))
        sums = [normed @ part.weight_magnitude.T for part in self.parts]
        if self.op_type == "BinaryQKV":
            return np.concatenate(sums, axis=1)
        return 2 * sums[0] * sums[1]

    def int8_by_specification(self) -> npt.NDArray[np.float32]:
        """The int8 level step by step, exact bits."""
        products = [int8_by_specification(part, norm=self.norm) for part in self.parts]
        if self.op_type == "BinaryQKV":
            return np.concatenate(products, axis=1)
        gate, up = products
        return gate / (np.float32(1) + _exp(-gate)) * up


def layer_problem(
    op_type: str, m: int, k: int, sizes: Sequence[int], form: str, *, fp16: bool = False, offsets: bool = True
) -> LayerProblem:
    """A random problem; `sizes` has N of each part."""
    parts = [
        problem(m, n, k, form, seed=seed, fp16=fp16, offsets=offsets, bias=False)
        for seed, n in enumerate(sizes, start=1)
    ]
    rng = np.random.default_rng([m, k])
    norm = Norm(weight=rng.uniform(0.5, 1.5, k).astype(np.float32), epsilon=1e-5)
    return LayerProblem(op_type=op_type, parts=tuple(replace(part, x=parts[0].x) for part in parts), norm=norm)


def layer_model(
    p: LayerProblem,
    *,
    accuracy_level: int = 4,
    attributes: dict[str, Any] | None = None,
    tensors: dict[str, npt.NDArray[Any] | None] | None = None,
    functions: Sequence[FunctionProto] = (),
    a_shape: Sequence[Any] = ("batch", "sequence", None),
) -> ModelProto:
    """A model of one node named `layer`, input A, output Y.

    `attributes` and `tensors` replace the right ones; an attribute or tensor None is left out.
    """
    names = PARTS[p.op_type]
    rows = {f"N_{name}": part.n for name, part in zip(names, p.parts, strict=True)}
    form = p.parts[0].form
    attrs: dict[str, Any] = {
        "K": p.parts[0].k,
        **(rows if p.op_type == "BinaryQKV" else {"N": p.parts[0].n}),
        "scale_form": form,
        "block_size": GROUP if form == "block" else 0,
        "epsilon": p.norm.epsilon,
        "accuracy_level": accuracy_level,
        **(attributes or {}),
    }
    inputs: dict[str, npt.NDArray[Any] | None] = {"norm": p.norm.weight}
    for name, part in zip(names, p.parts, strict=True):
        inputs |= {f"{name}_B": part.tiles, f"{name}_scales": part.scales, f"{name}_offsets": part.offsets}
    inputs |= tensors or {}
    connected = ["A", *(name if array is not None else "" for name, array in inputs.items())]
    while not connected[-1]:
        connected.pop()
    node = helper.make_node(
        p.op_type, connected, ["Y"], name="layer", domain="fbiedge",
        **{name: value for name, value in attrs.items() if value is not None},
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, list(a_shape))],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in inputs.items() if array is not None],
    )
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("com.microsoft", 1), ("fbiedge", 1))]
    return helper.make_model(graph, functions=list(functions), opset_imports=opsets, ir_version=10)


def _exp(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """exp as spec/BinarySwiGLU.md has it: every operation in float32, exact bits."""

    def f32(value: float) -> np.float32:
        return np.float32(value)

    x = np.clip(x, f32(-87), f32(89))
    shifted = x * f32(1.44269504) + f32(12583039)
    n = shifted - f32(12583039)
    r = x - n * f32(0.693359375) + n * f32(2.12194440e-4)
    series = np.full_like(x, f32(1) / f32(5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        series = series * r + f32(1) / f32(divisor)
    with np.errstate(over="ignore"):
        return series * (shifted.view(np.uint32) << np.uint32(23)).view(np.float32)

"""A model-local function's body under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, NodeProto, helper, numpy_helper  # noqa: TID253


class Body:
    """Nodes of a function body under construction; `add` returns the name of the node's output."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []

    def add(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        """A constant, made once per name."""
        if not self._has(name):
            self.add("Constant", [], name, value=numpy_helper.from_array(array))
        return name

    def ints(self, values: Sequence[int]) -> str:
        """A 1-D int64 constant."""
        name = "ints_" + "_".join(str(value).replace("-", "minus") for value in values)
        return self.constant(name, np.array(values, np.int64))

    def attribute(self, name: str) -> str:
        """The function's integer attribute `name` as a 1-D tensor of one element."""
        if not self._has(name):
            node = helper.make_node("Constant", [], [f"{name}_scalar"])
            node.attribute.append(reference("value_int", name))
            self.nodes.append(node)
            self.add("Unsqueeze", [f"{name}_scalar", self.ints([0])], name)
        return name

    def sum_over_inputs(self, activations: str, output: str) -> str:
        return self.add("ReduceSum", [activations, self.ints([-1])], output, keepdims=1)

    def matmul_nbits(
        self, activations: str, codes: str, scales: str, output: str, *, block: int, bits: int = 4, rows: str = "N"
    ) -> str:
        """`rows` is the function's attribute that gives N."""
        inputs = [activations, codes, scales]
        node = helper.make_node("MatMulNBits", inputs, [output], domain="com.microsoft", bits=bits, block_size=block)
        names = {"K": "K", "N": rows, "accuracy_level": "accuracy_level"}
        node.attribute.extend(reference(name, attribute) for name, attribute in names.items())
        self.nodes.append(node)
        return output

    def rms_norm(self, x: str, weight: str, output: str) -> str:
        """Over the last axis, with the function's attribute `epsilon`."""
        node = helper.make_node("SimplifiedLayerNormalization", [x, weight], [output], axis=-1, stash_type=1)
        node.attribute.append(reference("epsilon", "epsilon", AttributeProto.FLOAT))
        self.nodes.append(node)
        return output

    def result(self, name: str, output: str) -> None:
        """The value `name` is the function's output `output`."""
        self.add("Identity", [name], output)

    def _has(self, name: str) -> bool:
        return any(name in node.output for node in self.nodes)


def reference(
    attribute: str, function_attribute: str, kind: AttributeProto.AttributeType = AttributeProto.INT
) -> AttributeProto:
    """A node attribute that takes its value from the function's attribute of the given name."""
    return AttributeProto(name=attribute, ref_attr_name=function_attribute, type=kind)

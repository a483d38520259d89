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
        return self.add("Constant", [], name, value=numpy_helper.from_array(array))

    def ints(self, values: Sequence[int]) -> str:
        """A 1-D int64 constant, made once per value."""
        name = "ints_" + "_".join(str(value).replace("-", "minus") for value in values)
        if not any(name in node.output for node in self.nodes):
            self.constant(name, np.array(values, np.int64))
        return name

    def attribute(self, name: str) -> str:
        """The function's integer attribute `name` as a 1-D tensor of one element."""
        if not any(name in node.output for node in self.nodes):
            node = helper.make_node("Constant", [], [f"{name}_scalar"])
            node.attribute.append(reference("value_int", name))
            self.nodes.append(node)
            self.add("Unsqueeze", [f"{name}_scalar", self.ints([0])], name)
        return name

    def sum_over_inputs(self, activations: str) -> str:
        return self.add("ReduceSum", [activations, self.ints([-1])], "sum_over_inputs", keepdims=1)

    def matmul_nbits(self, activations: str, codes: str, scales: str, block: int, *, bits: int = 4) -> str:
        inputs = [activations, codes, scales]
        node = helper.make_node("MatMulNBits", inputs, ["product"], domain="com.microsoft", bits=bits, block_size=block)
        node.attribute.extend(reference(name, name) for name in ("K", "N", "accuracy_level"))
        self.nodes.append(node)
        return "product"


def reference(attribute: str, function_attribute: str) -> AttributeProto:
    """A node attribute that takes its value from the function's attribute of the given name."""
    return AttributeProto(name=attribute, ref_attr_name=function_attribute, type=AttributeProto.INT)

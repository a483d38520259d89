"""Nodes and constants of a graph under construction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper, numpy_helper  # noqa: TID253


class Nodes:
    """Appends nodes in order; methods take and return names of values."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def node(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node called `name`; its first output, named like the node unless given, is returned."""
        outputs = list(outputs) or [name]
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, values: Sequence[int]) -> str:
        """A 1-D int64 constant."""
        return self.table(name, np.array(values, np.int64))

    def table(self, name: str, array: npt.NDArray[Any]) -> str:
        """A constant, made once per name."""
        if all(constant.name != name for constant in self.constants):
            self.constants.append(numpy_helper.from_array(array, name))
        return name

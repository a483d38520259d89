"""What a user chooses about an export: how activations, the head, the embedding and block scales are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fbiedge.config import ModelConfig
from fbiedge.errors import UsageError

AccuracyLevel = Literal["int8", "fp32"]
Head = Literal["int8", "int4", "fp32"]
Operators = Literal["fbiedge", "stock"]
Storage = Literal["fp32", "fp16"]

# ORT's MatMulNBits and our BinaryMatMul number their levels alike.
ACCURACY_LEVELS: dict[AccuracyLevel, int] = {"fp32": 1, "int8": 4}
HEAD_BITS: dict[Head, int] = {"int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Raises UsageError for a value that isn't one of those listed."""

    accuracy_level: AccuracyLevel = "int8"  # of the activations in binary linears and in a quantised head
    head: Head = "int8"
    embedding: Storage = "fp32"
    block_scales: Storage = "fp16"  # scales of pattern `block`; Q1_0 holds fp16 too
    operators: Operators = "fbiedge"  # stock: ONNX Runtime's own wherever they can hold the same, as in peers of ours

    def __post_init__(self) -> None:
        for name, allowed in (
            ("accuracy_level", AccuracyLevel),
            ("head", Head),
            ("embedding", Storage),
            ("block_scales", Storage),
            ("operators", Operators),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise UsageError(f"{name} is {value!r}, expected one of {', '.join(get_args(allowed))}")

    def ours(self, config: ModelConfig) -> bool:
        """Whether the graph is made of our operators where we have one; an ordinary Llama is made of stock ones."""
        return self.operators == "fbiedge" and config.scaling_pattern != "none"

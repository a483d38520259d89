"""What a user chooses about an export: how activations, the head, the embedding and block scales are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fbiedge.errors import UsageError

AccuracyLevel = Literal["int8", "fp32"]
Head = Literal["int8", "fp32"]
Storage = Literal["fp32", "fp16"]

# ORT's MatMulNBits and our BinaryMatMul number their levels alike.
ACCURACY_LEVELS: dict[AccuracyLevel, int] = {"fp32": 1, "int8": 4}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Raises UsageError for a value that isn't one of those listed."""

    accuracy_level: AccuracyLevel = "int8"  # of the activations in binary linears and in an int8 head
    head: Head = "int8"
    embedding: Storage = "fp32"
    block_scales: Storage = "fp16"  # scales of pattern `block`; Q1_0 holds fp16 too

    def __post_init__(self) -> None:
        for name, allowed in (
            ("accuracy_level", AccuracyLevel),
            ("head", Head),
            ("embedding", Storage),
            ("block_scales", Storage),
        ):
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise UsageError(f"{name} is {value!r}, expected one of {', '.join(get_args(allowed))}")

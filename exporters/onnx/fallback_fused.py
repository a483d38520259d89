"""`fbiedge::BinaryQKV` and `fbiedge::BinarySwiGLU` in stock operators: the norm, then products as in fallback.py.

BinaryQKV     Y = [h · W_qᵀ, h · W_kᵀ, h · W_vᵀ]         h = RMS norm of A
BinarySwiGLU  Y = silu(h · W_gateᵀ) · (h · W_upᵀ)        silu(x) = x · sigmoid(x)
"""

from __future__ import annotations

from onnx import FunctionProto  # noqa: TID253

from fbiedge.config import ScalingPattern

from .fallback import binary_product, make_function
from .function_body import Body

QKV = "BinaryQKV"
SWIGLU = "BinarySwiGLU"
_COMMON_ATTRIBUTES = ("scale_form", "block_size", "epsilon", "accuracy_level")


def binary_qkv_function(form: ScalingPattern) -> FunctionProto:
    """The function for one scale form."""
    body = Body()
    x = body.rms_norm("A", "norm", "normed")
    parts = [binary_product(body, form, x, prefix=f"{part}_", rows=f"N_{part}") for part in "qkv"]
    body.result(body.add("Concat", parts, "joined", axis=-1), "Y")
    doc = f"Y = [q, k, v] of the RMS norm of A, for sign bits and scales of the form {form!r}, in stock operators"
    return make_function(QKV, _inputs("q", "k", "v"), body, ("K", "N_q", "N_k", "N_v", *_COMMON_ATTRIBUTES), doc)


def binary_swiglu_function(form: ScalingPattern) -> FunctionProto:
    """The function for one scale form."""
    body = Body()
    x = body.rms_norm("A", "norm", "normed")
    gate, up = (binary_product(body, form, x, prefix=f"{part}_") for part in ("gate", "up"))
    silu = body.add("Mul", [gate, body.add("Sigmoid", [gate], "sigmoid")], "silu")
    body.result(body.add("Mul", [silu, up], "gated"), "Y")
    doc = f"Y = silu(gate) · up of the RMS norm of A, for sign bits and scales of the form {form!r}, in stock operators"
    return make_function(SWIGLU, _inputs("gate", "up"), body, ("K", "N", *_COMMON_ATTRIBUTES), doc)


def _inputs(*parts: str) -> list[str]:
    return ["A", "norm", *(f"{part}_{tensor}" for part in parts for tensor in ("B", "scales", "offsets"))]

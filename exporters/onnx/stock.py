"""Binary linears in ONNX Runtime's own operators, written out (`--ops stock`): for runtimes that can't load a library.

A model with our operators carries their bodies (fallback.py), which undo the tiling when the model is opened: 1 to 2
bytes a weight for a moment, and an inliner in the runtime. Here nothing is left to do: no function, no domain of ours.

    signs        com.microsoft.MatMulNBits with the zero point ± 1 as codes and blocks of 128 inputs, as in our int8 level
    column       Y = (A · alpha) · signsᵀ + Σ A · beta
    row, single  Y = (A · signsᵀ) · alpha + (Σ A) · beta
    block        Y = A · (signs · alpha)ᵀ, alpha as the scales of MatMulNBits

But for `block` these scales are 1: one tensor of ones for all linears of a size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fbiedge.config import BLOCK_SIZE, ScalingPattern
from fbiedge.errors import ModelFileError
from fbiedge.weights import BinaryLinear

from .nodes import Nodes
from .sources import Source, TensorSpec, checked

CODES = "sign_codes"
CONTRIB = "com.microsoft"
_ROWS_AT_ONCE = 2048  # keeps codes of a byte each small beside the packed ones


def stock_linear(
    nodes: Nodes,
    name: str,
    x: str,
    *,
    form: ScalingPattern,
    n: int,
    k: int,
    bits: int,
    accuracy_level: int,
    output: str,
) -> str:
    """The name of x · W_effᵀ for the tensors of `stock_source`."""
    alpha, beta = f"{name}.alpha", f"{name}.beta"
    scales = f"{name}.scales" if form == "block" else ones_name(n, k)
    factors = nodes.node("Mul", f"{name}.scaled_inputs", [x, alpha]) if form == "column" else x
    product = name if form == "block" else f"{name}.product"
    y = nodes.node(
        "MatMulNBits", product, [factors, f"{name}.{CODES}", scales], [output] if form == "block" else [], CONTRIB,
        K=k, N=n, bits=bits, block_size=BLOCK_SIZE, accuracy_level=accuracy_level,
    )  # fmt: skip
    if form == "block":
        return y
    last_axis = nodes.constant("constants.last_axis", [-1])
    if form == "column":
        weighted = nodes.node("Mul", f"{name}.weighted_inputs", [x, beta])
        offset = nodes.node("ReduceSum", f"{name}.offset", [weighted, last_axis], keepdims=1)
    else:
        y = nodes.node("Mul", f"{name}.scaled_product", [y, alpha])
        total = nodes.node("ReduceSum", f"{name}.sum_of_inputs", [x, last_axis], keepdims=1)
        offset = nodes.node("Mul", f"{name}.offset", [total, beta])
    return nodes.node("Add", name, [y, offset], [output])


def stock_source(
    name: str,
    n: int,
    k: int,
    pattern: ScalingPattern,
    read_linear: Callable[[], BinaryLinear],
    *,
    group: str,
    bits: int,
) -> Source:
    """`{name}.sign_codes`, and .alpha and .beta or, in `block`, .scales. Its read checks what `read_linear` brings."""
    groups = -(-k // BLOCK_SIZE)
    form = f"1-bit {pattern}, {bits} bits stored"

    def spec(part: str, dtype: str, shape: tuple[int, ...], parameters: int = 0) -> TensorSpec:
        return TensorSpec(
            name=f"{name}.{part}", dtype=dtype, shape=shape, group=group, form=form, parameters=parameters
        )

    codes = spec(CODES, "uint8", (n, groups, BLOCK_SIZE * bits // 8), n * k)
    if pattern == "block":
        specs = [codes, spec("scales", "float32", (n * groups,))]
    else:
        shape = {"column": (k,), "row": (n,), "single": (1,)}[pattern]
        specs = [codes, *(spec(part, "float32", shape) for part in ("alpha", "beta"))]

    def read() -> list[npt.NDArray[np.generic]]:
        linear = checked(name, read_linear(), n, k, pattern)
        packed = sign_codes(linear.packed, k, bits).reshape(codes.shape)
        return [packed, linear.alpha.reshape(-1), *([] if linear.beta is None else [linear.beta])]

    return Source(specs=tuple(specs), read=read)


def ones_source(n: int, k: int) -> Source:
    """The scales of all linears of so many blocks."""
    count = _blocks(n, k)
    spec = TensorSpec(name=ones_name(n, k), dtype="float32", shape=(count,), group="ones", form="fp32", parameters=0)
    return Source(specs=(spec,), read=lambda: [np.ones(count, np.float32)])


def ones_name(n: int, k: int) -> str:
    """What it is called."""
    return f"ones.{_blocks(n, k)}"


def sign_codes(packed: npt.NDArray[np.uint8], k: int, bits: int) -> npt.NDArray[np.uint8]:
    """Plain sign bits [N, ceil(K/8)] -> MatMulNBits' codes, zero point ± 1, low bits first: [N, ceil(K/128) · 16 · bits].

    Padding has the zero point, which is 0.
    """
    zero, per_byte = 1 << (bits - 1), 8 // bits
    width = -(-k // BLOCK_SIZE) * BLOCK_SIZE
    out = np.empty((len(packed), width // per_byte), np.uint8)
    for start in range(0, len(packed), _ROWS_AT_ONCE):
        signs = np.unpackbits(packed[start : start + _ROWS_AT_ONCE], axis=1, count=k, bitorder="little")
        codes = np.full((len(signs), width), zero, np.uint8)
        codes[:, :k] += 2 * signs - 1  # wraps: + 255 is - 1
        whole = codes.reshape(len(signs), -1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
        np.bitwise_or.reduce(whole, axis=2, out=out[start : start + len(signs)])
    return out


def packed_signs(codes: npt.NDArray[np.uint8], k: int, name: str) -> npt.NDArray[np.uint8]:
    """The inverse, from codes [N, ceil(K/128), 16 · bits]. Raises ModelFileError for codes that are no signs."""
    bits = code_bits(codes.shape[-1])
    zero = 1 << (bits - 1)
    packed = np.empty((len(codes), -(-k // 8)), np.uint8)
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        rows = codes[start : start + _ROWS_AT_ONCE].reshape(-1, codes.shape[1] * codes.shape[2], 1)
        whole = rows >> np.arange(0, 8, bits, dtype=np.uint8) & ((1 << bits) - 1)
        numbers = whole.reshape(len(rows), -1)[:, :k]
        positive = numbers == zero + 1
        if not (positive | (numbers == zero - 1)).all():
            raise ModelFileError(f"{name} holds codes other than {zero - 1} and {zero + 1}, which are no signs")
        packed[start : start + len(rows)] = np.packbits(positive, axis=1, bitorder="little")
    return packed


def code_bits(block_bytes: int) -> int:
    """Bits of a code, by the bytes of a block of codes."""
    return 2 if block_bytes == BLOCK_SIZE // 4 else 4


def _blocks(n: int, k: int) -> int:
    return n * -(-k // BLOCK_SIZE)

"""`fbiedge::MatMulNBits` in stock operators: a model-local function, for runtimes without our op library.

It undoes the tiling, which folds at load, down to the inputs of one com.microsoft.MatMulNBits with blocks of 32:

    tiles [N/16, K/128, 128 + 256 · bits] -> codes [N, K/32, 4 · bits] and float scales [N · K/32]

Scales are the bytes of fp16 numbers, which ONNX can't reinterpret. But with the sign, the exponent and 2 bits of the
fraction fixed by the high byte, a number is linear in its low byte: base[high] + low · step[high], exact in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, TensorProto, helper  # noqa: TID253

from fbiedge.bits import TILE_ROWS

from .fallback import DOMAIN, OPSET
from .function_body import Body
from .head import BLOCK, SCALE_BYTES

OP_TYPE = "MatMulNBits"
INPUTS = ("A", "B")
ATTRIBUTES = ("K", "N", "bits", "block_size", "accuracy_level")


def half_tables() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """`base` and `step` [256] of fp16 numbers by their high byte; 0 where the number is no finite one."""
    high = np.arange(256, dtype=np.uint16) << 8
    base, next_one = (words.view(np.float16).astype(np.float32) for words in (high, high + 1))
    finite = np.isfinite(base)
    step = np.subtract(next_one, base, out=np.zeros_like(base), where=finite)
    return np.where(finite, base, np.float32(0)), step


def matmul_nbits_function(bits: int) -> FunctionProto:
    """The function for `bits` of 4 or 8; the body can't choose by its attribute."""
    body = Body()
    last = body.ints([np.iinfo(np.int64).max])
    # 1. Codes: pieces of 4 bytes of 16 rows -> [N padded, K padded / 32, 4 · bits] -> [N, …].
    pieces = body.add("Slice", ["B", body.ints([SCALE_BYTES]), last, body.ints([2])], "pieces")
    by_piece = body.add("Reshape", [pieces, body.ints([0, -1, TILE_ROWS, 4])], "pieces_of_rows")
    by_row = body.add("Transpose", [by_piece], "rows_of_pieces", perm=[0, 2, 1, 3])
    rows = body.add("Flatten", [by_row], "code_rows", axis=2)
    blocks = body.add("Reshape", [rows, body.ints([0, -1, BLOCK * bits // 8])], "padded_blocks")
    rounded = body.add("Add", [body.attribute("K"), body.ints([BLOCK - 1])], "inputs_rounded_up")
    count = body.add("Div", [rounded, body.ints([BLOCK])], "block_count")
    ends = body.add("Concat", [body.attribute("N"), count], "ends", axis=0)
    start, axes = body.ints([0, 0]), body.ints([0, 1])
    codes = body.add("Slice", [blocks, start, ends, axes], "codes")
    # 2. Scales: 2 bytes of 16 rows -> [N padded, K padded / 32, 2] -> [N, …] -> numbers.
    halves = body.add("Slice", ["B", body.ints([0]), body.ints([SCALE_BYTES]), body.ints([2])], "halves")
    by_block = body.add("Reshape", [halves, body.ints([0, -1, TILE_ROWS, 2])], "halves_of_rows")
    by_scale_row = body.add("Transpose", [by_block], "rows_of_halves", perm=[0, 2, 1, 3])
    scale_rows = body.add("Flatten", [by_scale_row], "scale_rows", axis=2)
    padded = body.add("Reshape", [scale_rows, body.ints([0, -1, 2])], "padded_halves")
    bytes_ = body.add("Slice", [padded, start, ends, axes], "scale_bytes")
    low = body.add("Gather", [bytes_, body.constant("low_index", np.array(0))], "low_byte", axis=2)
    high = body.add("Gather", [bytes_, body.constant("high_index", np.array(1))], "high_byte", axis=2)
    index = body.add("Cast", [high], "high_byte_index", to=TensorProto.INT32)
    number = body.add("Cast", [low], "low_byte_number", to=TensorProto.FLOAT)
    base, step = half_tables()
    bases = body.add("Gather", [body.constant("base_by_high_byte", base), index], "bases")
    steps = body.add("Gather", [body.constant("step_by_high_byte", step), index], "steps")
    offsets = body.add("Mul", [number, steps], "scale_offsets")
    scales = body.add("Add", [bases, offsets], "scales_2d")
    flat = body.add("Reshape", [scales, body.ints([-1])], "scales_1d")
    # 3. The product.
    y = body.matmul_nbits("A", codes, flat, "product", block=BLOCK, bits=bits)
    body.nodes.append(helper.make_node("Identity", [y], ["Y"]))
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        list(INPUTS),
        ["Y"],
        body.nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        list(ATTRIBUTES),
        doc_string=f"Y = A · Wᵀ for a matrix of {bits} bits a weight in tiles, in stock operators",
    )

"""`fbiedge::BinaryMatMul` in stock operators: a model-local function, for runtimes without our op library.

Where the library is registered its kernel wins; elsewhere ONNX Runtime inlines this body. Everything that depends on
weights alone folds at load, down to the inputs of one 4-bit MatMulNBits:

    tiles -> plain bytes [N, K/8] -> each byte looked up as 4 bytes = 8 codes of 4 bits: 9 for bit 1, 7 for bit 0
    MatMulNBits computes (code - 8) · scale, so 9 and 7 are +1 and -1

    column      Y = (A · alpha) · signsᵀ + Σ A · beta
    row,single  Y = (A · signsᵀ) · alpha + (Σ A) · beta
    block       Y = A · (signs · alpha)ᵀ, the scales of MatMulNBits with blocks of 128

One body serves one scale form: function bodies can't leave out what depends on an absent input.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, TensorProto, helper, numpy_helper  # noqa: TID253

from fbiedge.bits import TILE_ROWS
from fbiedge.config import BLOCK_SIZE, ScalingPattern

from .function_body import Body

OPSET = 21
DOMAIN = "fbiedge"
OP_TYPE = "BinaryMatMul"
INPUTS = ("A", "B", "scales", "offsets", "bias")
ATTRIBUTES = ("K", "N", "scale_form", "block_size", "accuracy_level")


def nibble_table() -> npt.NDArray[np.uint8]:
    """uint8 [256, 4]: the 8 sign bits of a byte, lowest first, as 8 codes of 4 bits, low nibble first."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    codes = np.where(bits == 1, 9, 7).astype(np.uint8)
    return np.asarray(codes[:, 0::2] | codes[:, 1::2] << 4, np.uint8)


def binary_matmul_function(form: ScalingPattern, *, bias: bool = False) -> FunctionProto:
    """The function for one scale form. With `bias`, every node that uses it must give the input `bias`."""
    body = Body()
    # 1. Undo the tiling: [N/16, K/32, 64] -> [N padded, K padded / 8] -> [N, …].
    split = body.add("Reshape", ["B", body.ints([0, 0, TILE_ROWS, 4])], "tiles_by_row")
    by_row = body.add("Transpose", [split], "rows_by_tile", perm=[0, 2, 1, 3])
    padded_rows = body.add("Flatten", [by_row], "padded_plain_bytes", axis=2)
    plain = body.add("Slice", [padded_rows, body.ints([0]), body.attribute("N"), body.ints([0])], "plain_bytes")
    # 2. Block scales: [N/16, G, 16] -> [N, G].
    block = 32
    if form == "block":
        block = BLOCK_SIZE
        scale_rows = body.add("Transpose", ["scales"], "scale_rows", perm=[0, 2, 1])
        padded_scales = body.add("Flatten", [scale_rows], "padded_scales", axis=2)
        plain, block_scales = _block_scales(body, plain, padded_scales)
    # 3. Bytes -> codes [N, K/block, block/2].
    index = body.add("Cast", [plain], "byte_index", to=TensorProto.INT32)
    codes = body.add("Gather", [body.constant("nibble_table", nibble_table()), index], "codes_of_bytes")
    blocks = body.add("Reshape", [codes, body.ints([0, -1, block // 2])], "code_blocks")
    if form != "block":
        count = body.add("Shape", [blocks], "blocks_shape", start=0, end=2)
        flat = body.add("ReduceProd", [count], "block_count", keepdims=1)
        one = numpy_helper.from_array(np.ones(1, np.float32))
        block_scales = body.add("ConstantOfShape", [flat], "unit_scales", value=one)
    # 4. The product, and what the scale form adds to it.
    matmul_input = body.add("Mul", ["A", "scales"], "scaled_activations") if form == "column" else "A"
    y = body.matmul_nbits(matmul_input, blocks, block_scales, block)
    if form == "column":
        weighted = body.add("Mul", ["A", "offsets"], "weighted_activations")
        y = body.add("Add", [y, body.sum_over_inputs(weighted)], "with_offsets")
    elif form in ("row", "single"):
        scaled = body.add("Mul", [y, "scales"], "scaled_product")
        offset = body.add("Mul", [body.sum_over_inputs("A"), "offsets"], "offset_of_outputs")
        y = body.add("Add", [scaled, offset], "with_offsets")
    if bias:
        y = body.add("Add", [y, "bias"], "with_bias")
    body.nodes.append(helper.make_node("Identity", [y], ["Y"]))
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        list(INPUTS),
        ["Y"],
        body.nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        list(ATTRIBUTES),
        doc_string=f"Y = A · W_effᵀ for sign bits and scales of the form {form!r}, in stock operators",
    )


def _block_scales(body: Body, plain: str, padded_scales: str) -> tuple[str, str]:
    """Plain bytes padded to whole blocks of 128 inputs (16 bytes), and scales float32 [N · G]."""
    scales = body.add("Slice", [padded_scales, body.ints([0]), body.attribute("N"), body.ints([0])], "scales_2d")
    groups = body.add("Shape", [scales], "group_count", start=1, end=2)
    wanted = body.add("Mul", [groups, body.ints([BLOCK_SIZE // 8])], "wanted_row_bytes")
    held = body.add("Shape", [plain], "held_row_bytes", start=1, end=2)
    missing = body.add("Sub", [wanted, held], "missing_row_bytes")
    pads = body.add("Concat", [body.ints([0, 0, 0]), missing], "pads", axis=0)
    whole = body.add("Pad", [plain, pads], "whole_block_bytes")
    flat = body.add("Reshape", [scales, body.ints([-1])], "scales_1d")
    return whole, body.add("Cast", [flat], "scales_fp32", to=TensorProto.FLOAT)

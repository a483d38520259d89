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

from collections.abc import Sequence

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
    y = binary_product(body, form, "A")
    if bias:
        y = body.add("Add", [y, "bias"], "with_bias")
    body.result(y, "Y")
    doc = f"Y = A · W_effᵀ for sign bits and scales of the form {form!r}, in stock operators"
    return make_function(OP_TYPE, INPUTS, body, ATTRIBUTES, doc)


def make_function(
    op_type: str, inputs: Sequence[str], body: Body, attributes: Sequence[str], doc_string: str
) -> FunctionProto:
    """The model-local function of an operator with one output, Y."""
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_function(
        DOMAIN, op_type, list(inputs), ["Y"], body.nodes, opsets, list(attributes), doc_string=doc_string
    )


def binary_product(body: Body, form: ScalingPattern, x: str, *, prefix: str = "", rows: str = "N") -> str:
    """The name of x · W_effᵀ. The matrix is the function's inputs `{prefix}B`, scales and offsets, N its attribute `rows`."""

    def name(value: str) -> str:
        return prefix + value

    # 1. Undo the tiling: [N/16, K/32, 64] -> [N padded, K padded / 8] -> [N, …].
    split = body.add("Reshape", [name("B"), body.ints([0, 0, TILE_ROWS, 4])], name("tiles_by_row"))
    by_row = body.add("Transpose", [split], name("rows_by_tile"), perm=[0, 2, 1, 3])
    padded_rows = body.add("Flatten", [by_row], name("padded_plain_bytes"), axis=2)
    n = body.attribute(rows)
    plain = body.add("Slice", [padded_rows, body.ints([0]), n, body.ints([0])], name("plain_bytes"))
    # 2. Block scales: [N/16, G, 16] -> [N, G].
    block = 32
    if form == "block":
        block = BLOCK_SIZE
        scale_rows = body.add("Transpose", [name("scales")], name("scale_rows"), perm=[0, 2, 1])
        padded_scales = body.add("Flatten", [scale_rows], name("padded_scales"), axis=2)
        scales = body.add("Slice", [padded_scales, body.ints([0]), n, body.ints([0])], name("scales_2d"))
        plain = _whole_blocks(body, plain, scales, prefix)
        flat = body.add("Reshape", [scales, body.ints([-1])], name("scales_1d"))
        block_scales = body.add("Cast", [flat], name("scales_fp32"), to=TensorProto.FLOAT)
    # 3. Bytes -> codes [N, K/block, block/2].
    index = body.add("Cast", [plain], name("byte_index"), to=TensorProto.INT32)
    codes = body.add("Gather", [body.constant("nibble_table", nibble_table()), index], name("codes_of_bytes"))
    blocks = body.add("Reshape", [codes, body.ints([0, -1, block // 2])], name("code_blocks"))
    if form != "block":
        count = body.add("Shape", [blocks], name("blocks_shape"), start=0, end=2)
        flat = body.add("ReduceProd", [count], name("block_count"), keepdims=1)
        one = numpy_helper.from_array(np.ones(1, np.float32))
        block_scales = body.add("ConstantOfShape", [flat], name("unit_scales"), value=one)
    # 4. The product, and what the scale form adds to it.
    scaled_x = body.add("Mul", [x, name("scales")], name("scaled_activations")) if form == "column" else x
    y = body.matmul_nbits(scaled_x, blocks, block_scales, name("product"), block=block, rows=rows)
    if form == "column":
        weighted = body.add("Mul", [x, name("offsets")], name("weighted_activations"))
        offset = body.sum_over_inputs(weighted, name("sum_over_inputs"))
        y = body.add("Add", [y, offset], name("with_offsets"))
    elif form in ("row", "single"):
        scaled = body.add("Mul", [y, name("scales")], name("scaled_product"))
        summed = body.sum_over_inputs(x, name("sum_over_inputs"))
        offset = body.add("Mul", [summed, name("offsets")], name("offset_of_outputs"))
        y = body.add("Add", [scaled, offset], name("with_offsets"))
    return y


def _whole_blocks(body: Body, plain: str, scales: str, prefix: str) -> str:
    """Plain bytes [N, …] padded to as many blocks of 128 inputs (16 bytes) as there are scales in a row."""
    groups = body.add("Shape", [scales], f"{prefix}group_count", start=1, end=2)
    wanted = body.add("Mul", [groups, body.ints([BLOCK_SIZE // 8])], f"{prefix}wanted_row_bytes")
    held = body.add("Shape", [plain], f"{prefix}held_row_bytes", start=1, end=2)
    missing = body.add("Sub", [wanted, held], f"{prefix}missing_row_bytes")
    pads = body.add("Concat", [body.ints([0, 0, 0]), missing], f"{prefix}pads", axis=0)
    return body.add("Pad", [plain, pads], f"{prefix}whole_block_bytes")

"""Matrices that are small in the file and fp32 in memory: `--ops stock --stock-bits 1`, for onnxruntime-web without a GPU.

Its WebAssembly build has no kernel for MatMulNBits: it unpacks the whole matrix for every token, and a MatMul of fp32 is
more than ten times as fast. So the file holds tiles, as with our operators, and these nodes, which depend on nothing but
weights: ONNX Runtime computes them once, when the model is opened, and then a linear is one MatMul.

    tiles [N/16, K/32, 64] -> plain bytes [N, K/8] -> each looked up as 8 bits [N, K] -> [K, N] -> beta ± alpha
    head: codes [N, K/32, 4 · bits] -> [K/32, 32, N] -> numbers · scales -> [K, N]

All steps of all matrices are in memory before the first is let go, so as much as possible is done while a weight is a
byte: 4 bytes a weight stay.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto  # noqa: TID253

from fbiedge.bits import SIGNS_OF_BYTE, TILE_INPUTS, TILE_ROWS
from fbiedge.config import BLOCK_SIZE, ScalingPattern

from .head import BLOCK as HEAD_BLOCK
from .nodes import Nodes


def unfolded_matrix(nodes: Nodes, name: str, *, form: ScalingPattern, n: int, k: int) -> str:
    """The name of W_effᵀ [K, N] out of `{name}.bits`, .alpha and .beta."""
    pieces = nodes.constant("constants.tile_pieces", [0, 0, TILE_ROWS, 4])
    split = nodes.node("Reshape", f"{name}.tiles_by_row", [f"{name}.bits", pieces])
    by_row = nodes.node("Transpose", f"{name}.rows_by_tile", [split], perm=[0, 2, 1, 3])
    plain = nodes.node("Flatten", f"{name}.plain_bytes", [by_row], axis=2)
    padded_n, width, wanted = -(-n // TILE_ROWS) * TILE_ROWS, -(-k // TILE_INPUTS) * TILE_INPUTS, k
    if form == "block":  # whole blocks of 128 inputs
        wanted = -(-k // BLOCK_SIZE) * BLOCK_SIZE
        if missing := (wanted - width) // 8:
            pads = nodes.constant(f"constants.pad_{missing}", [0, 0, 0, missing])
            width = wanted
            plain = nodes.node("Pad", f"{name}.whole_bytes", [plain, pads])
    index = nodes.node("Cast", f"{name}.byte_index", [plain], to=TensorProto.INT32)
    table = nodes.table("constants.bits_of_byte", SIGNS_OF_BYTE > 0)
    looked_up = nodes.node("Gather", f"{name}.bits_of_bytes", [table, index])
    rows = nodes.node("Flatten", f"{name}.padded_signs", [looked_up], axis=1)
    cut = _cut(nodes, f"{name}.signs", rows, (padded_n, width), (n, wanted))
    signs = nodes.node("Transpose", f"{name}.signs_by_input", [cut], perm=[1, 0])
    if form == "block":
        return _block_matrix(nodes, name, signs, n, k)
    alpha, beta = f"{name}.alpha", f"{name}.beta"
    if form == "column":
        column = nodes.constant("constants.column", [-1, 1])
        alpha, beta = (nodes.node("Reshape", f"{part}_column", [part, column]) for part in (alpha, beta))
    plus = nodes.node("Add", f"{name}.plus", [beta, alpha])
    minus = nodes.node("Sub", f"{name}.minus", [beta, alpha])
    return nodes.node("Where", f"{name}.matrix", [signs, plus, minus])


def _block_matrix(nodes: Nodes, name: str, signs: str, n: int, k: int) -> str:
    """Signs [G · 128, N] and `{name}.alpha` [N/16, G, 16] -> [K, N]."""
    numbers = nodes.node("Cast", f"{name}.alpha_numbers", [f"{name}.alpha"], to=TensorProto.FLOAT)
    by_group = nodes.node("Transpose", f"{name}.alpha_by_group", [numbers], perm=[1, 0, 2])
    flat = nodes.node("Flatten", f"{name}.alpha_rows", [by_group], axis=1)
    groups = -(-k // BLOCK_SIZE)
    padded_n = -(-n // TILE_ROWS) * TILE_ROWS
    scales = _cut(nodes, f"{name}.alpha_of_rows", flat, (groups, padded_n), (groups, n))
    axis = nodes.constant("constants.axis_one", [1])
    plus = nodes.node("Unsqueeze", f"{name}.plus", [scales, axis])
    minus = nodes.node("Neg", f"{name}.minus", [plus])
    shape = nodes.constant(f"constants.groups_of_{n}", [-1, BLOCK_SIZE, n])
    blocks = nodes.node("Reshape", f"{name}.sign_blocks", [signs, shape])
    weights = nodes.node("Where", f"{name}.blocks", [blocks, plus, minus])
    rows = nodes.node("Reshape", f"{name}.weight_rows", [weights, nodes.constant(f"constants.rows_of_{n}", [-1, n])])
    return _cut(nodes, f"{name}.matrix", rows, (groups * BLOCK_SIZE, n), (k, n))


def unfolded_head(nodes: Nodes, name: str, *, n: int, k: int, bits: int) -> str:
    """The name of the head [K, N] out of `{name}.codes` and .scales (see head.py)."""
    blocks = -(-k // HEAD_BLOCK)
    codes = f"{name}.codes"
    if bits == 4:
        low_and_high = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.uint8)
        pairs = nodes.node("Cast", f"{name}.pairs", [codes], to=TensorProto.INT32)
        codes = nodes.node("Gather", f"{name}.code_pairs", [nodes.table("constants.nibbles", low_and_high), pairs])
    by_row = nodes.constant(f"constants.head_blocks_of_{blocks}", [-1, blocks, HEAD_BLOCK])
    rows = nodes.node("Reshape", f"{name}.code_blocks", [codes, by_row])
    by_input = nodes.node("Transpose", f"{name}.codes_by_input", [rows], perm=[1, 2, 0])
    numbers = nodes.node("Cast", f"{name}.numbers", [by_input], to=TensorProto.FLOAT)
    zero = nodes.table(f"constants.zero_point_{bits}", np.array([1 << (bits - 1)], np.float32))
    centred = nodes.node("Sub", f"{name}.centred", [numbers, zero])
    shape = nodes.constant(f"constants.blocks_of_{blocks}", [-1, blocks])
    steps = nodes.node("Reshape", f"{name}.steps", [f"{name}.scales", shape])
    by_block = nodes.node("Transpose", f"{name}.steps_by_block", [steps], perm=[1, 0])
    factors = nodes.node("Unsqueeze", f"{name}.factors", [by_block, nodes.constant("constants.axis_one", [1])])
    scaled = nodes.node("Mul", f"{name}.scaled", [centred, factors])
    flat = nodes.node("Reshape", f"{name}.inputs", [scaled, nodes.constant(f"constants.rows_of_{n}", [-1, n])])
    return _cut(nodes, f"{name}.matrix", flat, (blocks * HEAD_BLOCK, n), (k, n))


def _cut(nodes: Nodes, name: str, padded: str, of: tuple[int, int], wanted: tuple[int, int]) -> str:
    """The first `wanted` rows and columns of a matrix [of]: itself where that is all, as a copy takes memory."""
    if of == wanted:
        return padded
    start, ends = nodes.constant("constants.corner", [0, 0]), nodes.constant(f"constants.shape_{wanted}", wanted)
    return nodes.node("Slice", name, [padded, start, ends])

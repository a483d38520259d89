"""Matrices that are small in the file and fp32 in memory: `--ops stock --stock-bits 1`, for onnxruntime-web without a GPU.

Its WebAssembly build has no kernel for MatMulNBits: it unpacks the whole matrix for every token, and a MatMul of fp32 is
17 times as fast. So the file holds tiles, as with our operators, and these nodes, which depend on nothing but weights:
ONNX Runtime computes them once, when the model is opened, and then a linear is one MatMul. 4 bytes a weight of memory.

    tiles [N/16, K/32, 64] -> plain bytes [N, K/8] -> each byte looked up as 8 signs [N, K] · alpha + beta -> [K, N]
    head: codes [N, K/32, 4 · bits] -> numbers [N, K/32, 32] · scales -> [K, N]
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto  # noqa: TID253

from fbiedge.bits import SIGNS_OF_BYTE, TILE_ROWS
from fbiedge.config import BLOCK_SIZE, ScalingPattern

from .head import BLOCK as HEAD_BLOCK
from .nodes import Nodes


def unfolded_matrix(nodes: Nodes, name: str, *, form: ScalingPattern, n: int, k: int) -> str:
    """The name of W_effᵀ [K, N] out of `{name}.bits`, .alpha and .beta."""
    pieces = nodes.constant("constants.tile_pieces", [0, 0, TILE_ROWS, 4])
    split = nodes.node("Reshape", f"{name}.tiles_by_row", [f"{name}.bits", pieces])
    by_row = nodes.node("Transpose", f"{name}.rows_by_tile", [split], perm=[0, 2, 1, 3])
    padded = nodes.node("Flatten", f"{name}.padded_bytes", [by_row], axis=2)
    index = nodes.node("Cast", f"{name}.byte_index", [padded], to=TensorProto.INT32)
    table = nodes.table("constants.signs_of_byte", SIGNS_OF_BYTE)
    looked_up = nodes.node("Gather", f"{name}.signs_of_bytes", [table, index])
    rows = nodes.node("Flatten", f"{name}.padded_signs", [looked_up], axis=1)
    signs = _cut(nodes, f"{name}.signs", rows, n, k)
    alpha, beta = f"{name}.alpha", f"{name}.beta"
    if form == "row":
        column = nodes.constant("constants.column", [-1, 1])
        alpha, beta = (nodes.node("Reshape", f"{part}_column", [part, column]) for part in (alpha, beta))
    elif form == "block":
        alpha = _block_scales(nodes, name, n, k)
    weight = nodes.node("Mul", f"{name}.scaled", [signs, alpha])
    if form != "block":
        weight = nodes.node("Add", f"{name}.with_offsets", [weight, beta])
    return nodes.node("Transpose", f"{name}.matrix", [weight], perm=[1, 0])


def unfolded_head(nodes: Nodes, name: str, *, n: int, k: int, bits: int) -> str:
    """The name of the head [K, N] out of `{name}.codes` and .scales (see head.py)."""
    codes = f"{name}.codes"
    if bits == 4:
        low_and_high = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.uint8)
        index = nodes.node("Cast", f"{name}.code_index", [codes], to=TensorProto.INT32)
        codes = nodes.node("Gather", f"{name}.code_pairs", [nodes.table("constants.nibbles", low_and_high), index])
    numbers = nodes.node("Cast", f"{name}.numbers", [codes], to=TensorProto.FLOAT)
    zero = nodes.table(f"constants.zero_point_{bits}", np.array([1 << (bits - 1)], np.float32))
    centred = nodes.node("Sub", f"{name}.centred", [numbers, zero])
    blocks = nodes.node(
        "Reshape", f"{name}.blocks", [centred, nodes.constant("constants.head_blocks", [-1, HEAD_BLOCK])]
    )
    column = nodes.constant("constants.column", [-1, 1])
    scaled = nodes.node(
        "Mul", f"{name}.scaled", [blocks, nodes.node("Reshape", f"{name}.steps", [f"{name}.scales", column])]
    )
    width = -(-k // HEAD_BLOCK) * HEAD_BLOCK
    padded = nodes.node(
        "Reshape", f"{name}.padded_rows", [scaled, nodes.constant(f"constants.rows_of_{width}", [-1, width])]
    )
    return nodes.node("Transpose", f"{name}.matrix", [_cut(nodes, f"{name}.rows_of_head", padded, n, k)], perm=[1, 0])


def _block_scales(nodes: Nodes, name: str, n: int, k: int) -> str:
    """`{name}.alpha` [N/16, G, 16], a factor for each weight: [N, K]."""
    groups = -(-k // BLOCK_SIZE)
    by_row = nodes.node("Transpose", f"{name}.alpha_by_row", [f"{name}.alpha"], perm=[0, 2, 1])
    numbers = nodes.node("Cast", f"{name}.alpha_numbers", [by_row], to=TensorProto.FLOAT)
    column = nodes.constant(f"constants.groups_of_{groups}", [-1, groups, 1])
    blocks = nodes.node("Reshape", f"{name}.alpha_blocks", [numbers, column])
    whole = nodes.constant("constants.whole_block", [1, 1, BLOCK_SIZE])
    spread = nodes.node("Expand", f"{name}.alpha_spread", [blocks, whole])
    rows = nodes.node("Flatten", f"{name}.alpha_rows", [spread], axis=1)
    return _cut(nodes, f"{name}.alpha_of_weights", rows, n, k)


def _cut(nodes: Nodes, name: str, padded: str, n: int, k: int) -> str:
    """The first [N, K] of a padded matrix."""
    start, ends = nodes.constant("constants.corner", [0, 0]), nodes.constant(f"constants.shape_{n}_{k}", [n, k])
    return nodes.node("Slice", name, [padded, start, ends])

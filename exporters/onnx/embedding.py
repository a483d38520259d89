"""Embedding rows out of the tiles of a 1-bit matrix, in stock operators that touch no more than the tiles they need.

Token `id` is row r = id mod 16 of row of tiles t = id div 16 (fbiedge.bits). Of both tensors one row of tiles holds 16
rows interleaved, in pieces: 4 bytes of bits for 32 inputs, one scale for 128. So both are read alike:

    pieces [K/32, 64] of t -> [K/32, 16, 4] -> [16, K/32, 4] -> row r: bytes [K/8] -> each looked up as 8 signs
    scales [K/128, 16] of t -> [K/128, 16, 1] -> [16, K/128, 1] -> row r: [K/128], a factor of 128 signs each
"""

from __future__ import annotations

from onnx import TensorProto  # noqa: TID253

from fbiedge.bits import SIGNS_OF_BYTE, TILE_ROWS
from fbiedge.config import BLOCK_SIZE

from .nodes import Nodes

_PIECE_BYTES = 4


def binary_rows(nodes: Nodes, name: str, ids: str, matrix: str) -> str:
    """Rows `ids` [batch, tokens] of `{matrix}.bits` and .alpha, block form, as float32 [batch, tokens, K]."""
    step = f"{name}.lookup"
    tile_rows = nodes.constant("constants.tile_rows", [TILE_ROWS])
    tile = nodes.node("Div", f"{step}.tile", [ids, tile_rows])
    in_tile = nodes.node("Mod", f"{step}.row_in_tile", [ids, tile_rows])
    last_axis = nodes.constant("constants.last_axis", [-1])
    row = nodes.node("Unsqueeze", f"{step}.row", [in_tile, last_axis])
    flat = nodes.constant("constants.flat_rows", [0, 0, -1])

    def row_of(part: str, piece: int, dtype: int) -> str:
        """[batch, tokens, …]: what one row has of `{matrix}.{part}`, cast to `dtype`."""
        gathered = nodes.node("Gather", f"{step}.{part}.tiles", [f"{matrix}.{part}", tile])
        shape = nodes.constant(f"constants.pieces_of_{piece}", [0, 0, -1, TILE_ROWS, piece])
        pieces = nodes.node("Reshape", f"{step}.{part}.pieces", [gathered, shape])
        by_row = nodes.node("Transpose", f"{step}.{part}.by_row", [pieces], perm=[0, 1, 3, 2, 4])
        picked = nodes.node("GatherND", f"{step}.{part}.picked", [by_row, row], batch_dims=2)
        whole = nodes.node("Reshape", f"{step}.{part}.row", [picked, flat])
        return nodes.node("Cast", f"{step}.{part}", [whole], to=dtype)

    table = nodes.table("constants.signs_of_byte", SIGNS_OF_BYTE)
    signs = nodes.node("Gather", f"{step}.signs", [table, row_of("bits", _PIECE_BYTES, TensorProto.INT32)])
    blocks = nodes.constant("constants.blocks", [0, 0, -1, BLOCK_SIZE])
    by_block = nodes.node("Reshape", f"{step}.sign_blocks", [signs, blocks])
    scales = nodes.node("Unsqueeze", f"{step}.scales", [row_of("alpha", 1, TensorProto.FLOAT), last_axis])
    scaled = nodes.node("Mul", f"{step}.scaled", [by_block, scales])
    return nodes.node("Reshape", name, [scaled, flat])

"""Embedding rows out of a matrix of 1, 4 or 8 bits, in stock operators that touch no more than the rows they need.

com.microsoft.GatherBlockQuantized would be one node instead of eight, but ONNX Runtime 1.22 refuses it for codes in bytes,
and it takes no fp16 scales for fp32 rows. Eight nodes cost a token of 768 numbers 6 us more.

1 bit, from tiles. Token `id` is row r = id mod 16 of row of tiles t = id div 16 (fbiedge.bits). Of both tensors one row of tiles holds 16
rows interleaved, in pieces: 4 bytes of bits for 32 inputs, one scale for 128. So both are read alike:

    pieces [K/32, 64] of t -> [K/32, 16, 4] -> [16, K/32, 4] -> row r: bytes [K/8] -> each looked up as 8 signs
    scales [K/128, 16] of t -> [K/128, 16, 1] -> [16, K/128, 1] -> row r: [K/128], a factor of 128 signs each

4 and 8 bits (head.py), from codes [N, K/32, 4 · bits] and scales [N, K/32]: a row of each, (codes - z) · scales. A tied
embedding's are in the head's tiles: scales and codes of 16 rows, interleaved in pieces of 2 and 4 bytes.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto  # noqa: TID253

from fbiedge.bits import SIGNS_OF_BYTE, TILE_ROWS
from fbiedge.config import BLOCK_SIZE

from .fallback_head import half_tables
from .head import BLOCK, GROUP, SCALE_BYTES
from .nodes import Nodes

_PIECE_BYTES, _HALF_BYTES = 4, 2
_BY_ROW = [0, 0, -1]


def binary_rows(nodes: Nodes, name: str, ids: str, matrix: str) -> str:
    """Rows `ids` [batch, tokens] of `{matrix}.bits` and .alpha, block form, as float32 [batch, tokens, K]."""
    step = f"{name}.lookup"
    tile_rows = nodes.constant("constants.tile_rows", [TILE_ROWS])
    tile = nodes.node("Div", f"{step}.tile", [ids, tile_rows])
    in_tile = nodes.node("Mod", f"{step}.row_in_tile", [ids, tile_rows])
    last_axis = nodes.constant("constants.last_axis", [-1])
    row = nodes.node("Unsqueeze", f"{step}.row", [in_tile, last_axis])
    flat = nodes.constant("constants.flat_rows", _BY_ROW)

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


def quantized_rows(nodes: Nodes, name: str, ids: str, matrix: str, *, bits: int, k: int, flat: bool = False) -> str:
    """Rows `ids` [batch, tokens] of `{matrix}.codes` and .scales, 4 or 8 bits, as float32 [batch, tokens, k].

    flat: the scales are those of a MatMulNBits, one row of float32, which fold into a matrix when the model is opened.
    """
    step = f"{name}.lookup"
    table = f"{matrix}.scales"
    if flat:
        by_row = nodes.constant(f"constants.blocks_of_{-(-k // BLOCK)}", [-1, -(-k // BLOCK)])
        table = nodes.node("Reshape", f"{step}.scale_rows", [table, by_row])
    codes = nodes.node("Gather", f"{step}.codes", [f"{matrix}.codes", ids])
    gathered = nodes.node("Gather", f"{step}.stored_scales", [table, ids])
    scales = gathered if flat else nodes.node("Cast", f"{step}.scales", [gathered], to=TensorProto.FLOAT)
    return _scaled(nodes, name, codes, scales, bits, k, padded=-(-k // BLOCK) * BLOCK)


def tiled_rows(nodes: Nodes, name: str, ids: str, tiles: str, *, bits: int, k: int) -> str:
    """Rows `ids` [batch, tokens] of `tiles`, 4 or 8 bits (head.py), as float32 [batch, tokens, k]."""
    step, groups = f"{name}.lookup", -(-k // GROUP)
    tile_rows = nodes.constant("constants.tile_rows", [TILE_ROWS])
    tile = nodes.node("Div", f"{step}.tile", [ids, tile_rows])
    in_tile = nodes.node("Mod", f"{step}.row_in_tile", [ids, tile_rows])
    row = nodes.node("Unsqueeze", f"{step}.row", [in_tile, nodes.constant("constants.last_two_axes", [2, 3])])
    gathered = nodes.node("Gather", f"{step}.tiles", [tiles, tile])
    last = nodes.constant("constants.axis_three", [3])

    def row_of(part: str, start: int, end: int, piece: int) -> str:
        """[batch, tokens, pieces, piece]: what one row has of these bytes of each group."""
        bounds = [nodes.constant(f"constants.byte_{byte}", [byte]) for byte in (start, end)]
        of_part = nodes.node("Slice", f"{step}.{part}.bytes", [gathered, *bounds, last])
        shape = nodes.constant(f"constants.pieces_of_{piece}", [0, 0, -1, TILE_ROWS, piece])
        pieces = nodes.node("Reshape", f"{step}.{part}.pieces", [of_part, shape])
        count = groups * (end - start) // (TILE_ROWS * piece)
        spread = nodes.constant(f"constants.spread_{count}", [1, 1, count, 1])
        index = nodes.node("Expand", f"{step}.{part}.row", [row, spread])
        return nodes.node("GatherND", f"{step}.{part}", [pieces, index], batch_dims=3)

    codes = row_of("codes", SCALE_BYTES, SCALE_BYTES + TILE_ROWS * GROUP * bits // 8, _PIECE_BYTES)
    halves = row_of("halves", 0, SCALE_BYTES, _HALF_BYTES)
    low, high = (
        nodes.node("Gather", f"{step}.{part}", [halves, nodes.table(f"constants.{part}", np.array(i))], axis=-1)
        for i, part in enumerate(("low_byte", "high_byte"))
    )
    index = nodes.node("Cast", f"{step}.high_byte_index", [high], to=TensorProto.INT32)
    number = nodes.node("Cast", f"{step}.low_byte_number", [low], to=TensorProto.FLOAT)
    base, by_low = (
        nodes.node("Gather", f"{step}.{part}", [nodes.table(f"constants.half_{part}", table), index])
        for part, table in zip(("base", "step"), half_tables(), strict=True)
    )
    scales = nodes.node("Add", f"{step}.scales", [base, nodes.node("Mul", f"{step}.above_base", [number, by_low])])
    return _scaled(nodes, name, codes, scales, bits, k, padded=groups * GROUP)


def _scaled(nodes: Nodes, name: str, codes: str, scales: str, bits: int, k: int, *, padded: int) -> str:
    """The first `k` of (codes - z) · scales: bytes [batch, tokens, …] of `padded` codes, scales [batch, tokens, padded/32]."""
    step = f"{name}.lookup"
    last_axis = nodes.constant("constants.last_axis", [-1])
    if bits == 4:
        mask, shift = (nodes.table(f"constants.nibble_{n}", np.array(n, np.uint8)) for n in (15, 4))
        low = nodes.node("BitwiseAnd", f"{step}.low", [codes, mask])
        high = nodes.node("BitShift", f"{step}.high", [codes, shift], direction="RIGHT")
        halves = [nodes.node("Unsqueeze", f"{half}_apart", [half, last_axis]) for half in (low, high)]
        codes = nodes.node("Concat", f"{step}.nibbles", halves, axis=-1)
    shape = nodes.constant("constants.blocks_of_codes", [0, 0, -1, BLOCK])
    blocks = nodes.node("Reshape", f"{step}.blocks", [codes, shape])
    numbers = nodes.node("Cast", f"{step}.numbers", [blocks], to=TensorProto.FLOAT)
    zero = nodes.table(f"constants.zero_point_{bits}", np.array([1 << (bits - 1)], np.float32))
    centred = nodes.node("Sub", f"{step}.centred", [numbers, zero])
    factors = nodes.node("Unsqueeze", f"{step}.factors", [scales, last_axis])
    scaled = nodes.node("Mul", f"{step}.scaled", [centred, factors])
    flat = nodes.constant("constants.flat_rows", _BY_ROW)
    if padded == k:
        return nodes.node("Reshape", name, [scaled, flat])
    whole = nodes.node("Reshape", f"{step}.padded", [scaled, flat])
    bounds = [nodes.constant(f"constants.column_{column}", [column]) for column in (0, k)]
    return nodes.node("Slice", name, [whole, *bounds, nodes.constant("constants.axis_two", [2])])

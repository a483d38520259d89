"""`fbiedge::GroupQueryAttention` in stock operators: a model-local function, for runtimes without our op library.

    queries and keys normalised head by head, where the model does that
    past rows in use -> float, com.microsoft.GroupQueryAttention, present -> int8

Rows that were in the cache keep their bytes, since rounding them again would let them drift. New rows are attended to
before they are rounded, which our kernel does after: results differ by what 8 bits round. A head_dim that isn't a
multiple of 16 is nothing for the stock operator's rotation (see ExportOptions.kv_cache).
"""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, FunctionProto, TensorProto, helper  # noqa: TID253

from .fallback import DOMAIN, OPSET
from .function_body import Body, reference

OP_TYPE = "GroupQueryAttention"
INPUTS = (
    "qkv", "past_key", "past_value", "past_key_scale", "past_value_scale", "seqlens_k", "total_sequence_length",
    "cos_cache", "sin_cache", "q_norm", "k_norm",
)  # fmt: skip
OUTPUTS = ("attention", "present_key", "present_value", "present_key_scale", "present_value_scale")
ATTRIBUTES = ("num_heads", "kv_num_heads", "scale", "epsilon")
_STEPS = 127


def attention_function(*, norms: bool = False) -> FunctionProto:
    """The function; all nodes that use it must give q_norm and k_norm, or none: a body can't tell."""
    body = Body()
    qkv = _normed_heads(body) if norms else ["qkv", "", ""]
    total = body.add("Cast", ["total_sequence_length"], "total_int64", to=TensorProto.INT64)
    length = body.add("Reshape", [total, body.ints([-1])], "length")
    # 1. The attention over the past in float. Of a past longer than the sequence, the rows beyond it stay out.
    for part in ("key", "value"):
        rows = _slice(body, f"past_{part}", body.ints([0]), length, f"used_{part}")
        scales = _slice(body, f"past_{part}_scale", body.ints([0]), length, f"used_{part}_scale")
        numbers = body.add("Cast", [rows], f"used_{part}_numbers", to=TensorProto.FLOAT)
        steps = body.add("Unsqueeze", [scales, body.ints([-1])], f"used_{part}_steps")
        body.add("Mul", [numbers, steps], f"float_past_{part}")
    past = ["float_past_key", "float_past_value"]
    node = helper.make_node(
        "GroupQueryAttention",
        [*qkv, *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"],
        ["attention", "float_key", "float_value"],
        domain="com.microsoft",
        do_rotary=1,
        rotary_interleaved=0,
    )
    node.attribute.extend(reference(name, name) for name in ("num_heads", "kv_num_heads"))
    node.attribute.append(reference("scale", "scale", AttributeProto.FLOAT))
    body.nodes.append(node)
    # 2. Which rows are new [batch, 1, rows]: as many as there are tokens, from max(0, seqlens_k + 1 - tokens) on.
    tokens = body.add("Shape", ["qkv"], "token_count", start=1, end=2)
    last = body.add("Cast", ["seqlens_k"], "last_position", to=TensorProto.INT64)
    before = body.add("Sub", [last, tokens], "position_before")
    after = body.add("Add", [before, body.ints([1])], "position_after")
    first = body.add("Max", [after, body.ints([0])], "first_position")
    end = body.add("Add", [first, tokens], "end_position")
    first_rows = body.add("Unsqueeze", [first, body.ints([1, 2])], "first_rows")
    end_rows = body.add("Unsqueeze", [end, body.ints([1, 2])], "end_rows")
    zero, one = body.constant("zero", np.array(0)), body.constant("one", np.array(1))
    scalar_length = body.add("Squeeze", [length], "scalar_length")
    positions = body.add("Range", [zero, scalar_length, one], "positions")
    from_first = body.add("GreaterOrEqual", [positions, first_rows], "from_first")
    before_end = body.add("Less", [positions, end_rows], "before_end")
    is_new = body.add("And", [from_first, before_end], "is_new")
    # 3. Rows and scales: new ones from the floats, old ones as they were, and the unused rest of a longer past.
    for part in ("key", "value"):
        _store(body, part, is_new, length)
    return helper.make_function(
        DOMAIN,
        OP_TYPE,
        list(INPUTS),
        list(OUTPUTS),
        body.nodes,
        [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        list(ATTRIBUTES),
        doc_string="Attention over an int8 cache with one scale a row, in stock operators",
    )


def _normed_heads(body: Body) -> list[str]:
    """q, k and v, with an RMS norm over each head of q and k.

    Apart, because ONNX Runtime 1.22 infers a wrong shape from q, k and v side by side where it doesn't know their width.
    """
    queries, kv_heads = body.attribute("num_heads"), body.attribute("kv_num_heads")
    head_dim = body.add("Shape", ["q_norm"], "head_dim")
    by_head = body.add("Concat", [body.ints([0, 0, -1]), head_dim], "heads_shape", axis=0)
    heads = body.add("Reshape", ["qkv", by_head], "heads")  # [batch, tokens, H + 2G, D]
    counts = body.add("Concat", [queries, kv_heads, kv_heads], "head_counts", axis=0)
    parts = ["q_heads", "k_heads", "v_heads"]
    body.nodes.append(helper.make_node("Split", [heads, counts], parts, axis=2))
    parts[:2] = [body.rms_norm(f"{part}_heads", f"{part}_norm", f"{part}_normed") for part in "qk"]
    flat = body.ints([0, 0, -1])
    return [body.add("Reshape", [part, flat], f"{part}_flat") for part in parts]


def _slice(body: Body, rows: str, start: str, end: str, output: str) -> str:
    """Rows start to end of a cache [batch, heads, rows, …]."""
    return body.add("Slice", [rows, start, end, body.ints([2])], output)


def _store(body: Body, part: str, is_new: str, length: str) -> None:
    """float_{part} -> present_{part}, present_{part}_scale."""
    size = body.add("Abs", [f"float_{part}"], f"{part}_size")
    peak = body.add("ReduceMax", [size, body.ints([-1])], f"{part}_peak", keepdims=0)
    scale = body.add("Div", [peak, body.constant("steps", np.float32(_STEPS))], f"{part}_scale")
    is_zero = body.add("Equal", [scale, body.constant("no_size", np.float32(0))], f"{part}_is_zero")
    divisor = body.add("Where", [is_zero, body.constant("unit", np.float32(1)), scale], f"{part}_divisor")
    divisors = body.add("Unsqueeze", [divisor, body.ints([-1])], f"{part}_divisors")
    ratio = body.add("Div", [f"float_{part}", divisors], f"{part}_ratio")
    rounded = body.add("Round", [ratio], f"{part}_rounded")
    are_new = body.add("Unsqueeze", [is_new, body.ints([-1])], f"{part}_are_new")
    # Rows are chosen as floats and cast behind that: ONNX Runtime 1.22 has no Where of int8.
    for name, old_rows, new, choice, rank in (
        (part, f"used_{part}_numbers", rounded, are_new, 4),
        (f"{part}_scale", f"used_{part}_scale", scale, is_new, 3),
    ):
        held = body.add("Shape", [old_rows], f"held_{name}", start=2, end=3)
        missing = body.add("Sub", [length, held], f"missing_{name}")
        before, after = body.ints([0] * (rank + 2)), body.ints([0] * (rank - 3))
        pads = body.add("Concat", [before, missing, after] if rank > 3 else [before, missing], f"pads_{name}", axis=0)
        old = body.add("Pad", [old_rows, pads], f"old_{name}")
        stored = body.add("Where", [choice, new, old], f"chosen_{name}")
        if rank == 4:
            stored = body.add("Cast", [stored], f"stored_{name}", to=TensorProto.INT8)
        end = body.ints([np.iinfo(np.int64).max])
        rest = _slice(body, f"past_{name}", length, end, f"rest_{name}")
        body.add("Concat", [stored, rest], f"present_{name}", axis=2)

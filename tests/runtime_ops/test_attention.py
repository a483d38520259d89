"""The operator GroupQueryAttention inside ONNX Runtime, and its body in stock operators, against attention in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.attention import (
    CACHE,
    OUTPUTS,
    Shape,
    attention_model,
    empty_cache,
    expected,
    new_rows,
    projections,
    weights,
)

from fbiedge import ops_library
from fbiedge.exporters.onnx.fallback_attention import attention_function

SHAPE = Shape(heads=4, kv_heads=2, d=64)
Cache = dict[str, np.ndarray]


def open_session(shape: Shape, *, library: bool = True, threads: int = 1, **model: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(ops_library.library_path()))
    content = attention_model(
        shape, functions=[] if library else [attention_function(norms=shape.norms)], **model
    ).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, qkv: np.ndarray, cache: Cache, lengths: list[int]) -> Cache:
    """`lengths`: of each row with the new tokens."""
    feeds = {"qkv": qkv, **cache, "seqlens_k": np.array(lengths, np.int32) - 1}
    feeds["total_sequence_length"] = np.array(max(*lengths, qkv.shape[1]), np.int32)
    return dict(zip(OUTPUTS, session.run(None, feeds), strict=True))


def as_past(present: Cache) -> Cache:
    return {name: present[name.replace("past", "present")] for name in CACHE}


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("isa", ops_library.available_isas())
@pytest.mark.parametrize("d", [40, 64, 80, 96, 128])
def test_equals_attention_in_float64(isa: str, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", isa)
    shape = Shape(heads=6, kv_heads=2, d=d, norms=d == 80)
    session, w = open_session(shape), weights(shape)
    cache, at = empty_cache(shape, 1, 0), 0
    for tokens in (150, 1, 7):
        qkv = projections(shape, 1, tokens)
        present = run(session, qkv, cache, [at + tokens])
        _, keys, values = new_rows(shape, w, qkv, [at])
        for name, rows in (("key", keys), ("value", values)):
            held, step = present[f"present_{name}"][:, :, at:], present[f"present_{name}_scale"][:, :, at:]
            assert held.shape == rows.shape
            np.testing.assert_allclose(step, np.abs(rows).max(-1) / 127, rtol=1e-5)
            assert (np.abs(rows / step[..., None] - held) < 0.501).all()
            np.testing.assert_array_equal(present[f"present_{name}"][:, :, :at], cache[f"past_{name}"])
        assert relative_error(present["attention"], expected(shape, w, qkv, present, [at])) < 1e-4
        cache, at = as_past(present), at + tokens


def test_rows_of_a_batch_have_their_own_lengths() -> None:
    session, w = open_session(SHAPE), weights(SHAPE)
    prompt = projections(SHAPE, 2, 20)
    present = run(session, prompt, empty_cache(SHAPE, 2, 32), [20, 12])  # the second is padded at its end
    wanted = expected(SHAPE, w, prompt, present, [0, 0])
    assert relative_error(present["attention"], wanted) < 1e-4
    token = projections(SHAPE, 2, 1)
    after = run(session, token, as_past(present), [21, 13])
    assert relative_error(after["attention"], expected(SHAPE, w, token, after, [20, 12])) < 1e-4
    alone = run(session, token[1:], {name: rows[1:] for name, rows in as_past(present).items()}, [13])
    np.testing.assert_array_equal(alone["attention"][0], after["attention"][1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_threads_nor_pieces_change_a_bit(threads: int) -> None:
    session = open_session(SHAPE, threads=threads)
    qkv = projections(SHAPE, 1, 300)
    whole = run(open_session(SHAPE), qkv, empty_cache(SHAPE, 1, 300), [300])
    cache, pieces = empty_cache(SHAPE, 1, 300), []
    for start, end in ((0, 128), (128, 256), (256, 299), (299, 300)):
        present = run(session, qkv[:, start:end], cache, [end])
        pieces.append(present["attention"])
        cache = as_past(present)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole["attention"])
    for name in OUTPUTS[1:]:
        np.testing.assert_array_equal(present[name], whole[name])


def test_one_buffer_as_past_and_present_is_written_in_place() -> None:
    session = open_session(SHAPE)
    qkv, capacity = projections(SHAPE, 1, 10), 16
    copied = run(session, qkv, empty_cache(SHAPE, 1, capacity), [10])
    cache, binding = empty_cache(SHAPE, 1, capacity), session.io_binding()
    for name, rows in cache.items():
        binding.bind_input(name, "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
        binding.bind_output(name.replace("past", "present"), "cpu", 0, rows.dtype, rows.shape, rows.ctypes.data)
    binding.bind_cpu_input("qkv", qkv)
    binding.bind_cpu_input("seqlens_k", np.array([9], np.int32))
    binding.bind_cpu_input("total_sequence_length", np.array(10, np.int32))
    binding.bind_output("attention")
    session.run_with_iobinding(binding)
    for name, rows in cache.items():
        np.testing.assert_array_equal(rows, copied[name.replace("past", "present")])
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[-1], copied["attention"])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("d", [16, 64, 80])
def test_the_body_in_stock_operators_computes_the_same(d: int, norms: bool) -> None:
    """Up to the rounding of new rows, which the body attends to in float."""
    shape = Shape(heads=4, kv_heads=2, d=d, norms=norms)
    kernel, body = open_session(shape), open_session(shape, library=False)
    for rows in (0, 64):
        cache, at = empty_cache(shape, 1, rows), 0
        for tokens in (30, 1, 3):
            qkv = projections(shape, 1, tokens)
            ours, stock = (run(session, qkv, cache, [at + tokens]) for session in (kernel, body))
            assert relative_error(stock["attention"], ours["attention"]) < 0.02
            for name in ("key", "value"):
                held, same = ours[f"present_{name}"].astype(int), stock[f"present_{name}"].astype(int)
                assert held.shape == same.shape and np.abs(held - same).max() <= 1 and (held != same).mean() < 1e-3
                np.testing.assert_array_equal(same[:, :, :at], cache[f"past_{name}"][:, :, :at])
                np.testing.assert_allclose(
                    stock[f"present_{name}_scale"], ours[f"present_{name}_scale"], rtol=1e-5, atol=1e-9
                )
            cache, at = as_past(ours), at + tokens


def test_the_body_takes_a_batch_of_different_lengths() -> None:
    kernel, body = open_session(SHAPE), open_session(SHAPE, library=False)
    cache = as_past(run(kernel, projections(SHAPE, 2, 20), empty_cache(SHAPE, 2, 32), [20, 12]))
    ours, stock = (run(session, projections(SHAPE, 2, 1), cache, [21, 13]) for session in (kernel, body))
    assert relative_error(stock["attention"], ours["attention"]) < 0.02
    assert np.abs(ours["present_key"].astype(int) - stock["present_key"]).max() <= 1


@pytest.mark.parametrize(
    ("attributes", "tensors", "message"),
    [
        ({"num_heads": None}, {}, "num_heads is 0, expected an integer attribute"),
        ({"kv_num_heads": 3}, {}, "num_heads is 4, expected a multiple of kv_num_heads = 3"),
        ({}, {"cos_cache": np.zeros((9, 6), np.float32)}, r"cos_cache has shape \[9, 6\] for a head_dim of 12"),
        ({}, {"sin_cache": np.zeros((9, 32), np.float32)}, r"sin_cache has shape \[9, 32\], expected \[600, 32\]"),
        ({}, {"q_norm": np.ones(63, np.float32)}, r"q_norm has shape \[63\], expected \[64\]"),
    ],
)
def test_a_malformed_node_is_refused_with_one_clear_line(attributes: Any, tensors: Any, message: str) -> None:
    with pytest.raises(Exception, match=f"GroupQueryAttention node 'attention': {message}"):
        open_session(SHAPE, attributes=attributes, tensors=tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": np.zeros((1, 2, 500), np.float32)}, r"qkv has shape \[1, 2, 500\], expected \[batch, tokens, 512\]"),
        ({"past_key": np.zeros((1, 2, 8, 32), np.int8)}, r"past_key has shape \[1, 2, 8, 32\], expected \[1, 2, 8, 64\]"),
        ({"past_value_scale": np.zeros((1, 2, 7), np.float32)}, r"past_value_scale has shape \[1, 2, 7\], expected"),
        ({"seqlens_k": np.array([3, 3], np.int32)}, r"seqlens_k has shape \[2\], expected \[1\]"),
        ({"seqlens_k": np.array([-1], np.int32)}, "seqlens_k is -1, expected total length - 1"),
        ({"total_sequence_length": np.array(1, np.int32)}, "total_sequence_length is 1, expected 2 or more"),
        (
            {"seqlens_k": np.array([600], np.int32), "total_sequence_length": np.array(601, np.int32)},
            "the sequence is 601 tokens long, cos_cache has 600 positions",
        ),
        (
            {"seqlens_k": np.array([20], np.int32), "total_sequence_length": np.array(21, np.int32)},
            "seqlens_k says that a row begins at position 19, past has 8 rows",
        ),
    ],
)  # fmt: skip
def test_a_malformed_call_is_refused_and_the_session_survives(change: dict[str, np.ndarray], message: str) -> None:
    session = open_session(SHAPE)
    feeds = {"qkv": projections(SHAPE, 1, 2), **empty_cache(SHAPE, 1, 8), "seqlens_k": np.array([1], np.int32)}
    feeds["total_sequence_length"] = np.array(2, np.int32)
    with pytest.raises(Exception, match=f"GroupQueryAttention node 'attention': {message}"):
        session.run(None, {**feeds, **change})
    session.run(None, feeds)

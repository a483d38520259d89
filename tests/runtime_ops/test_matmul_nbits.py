"""The operator MatMulNBits inside ONNX Runtime: exact bits, levels, threads, shapes, and every malformed node."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from support.matmul_nbits import Problem, int8_by_specification, op_model, problem

from fbiedge import ops_library

ISAS = ops_library.available_isas()
SIZES = [(1, 1, 1), (2, 15, 31), (3, 16, 32), (4, 17, 33), (5, 33, 127), (9, 48, 128), (2, 31, 129), (6, 65, 300)]


def open_session(
    model: onnx.ModelProto, *, threads: int = 1, config: dict[str, str] | None = None
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    options.register_custom_ops_library(str(ops_library.library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(session.run(None, {"A": x})[0])


def same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


def check_fp32(p: Problem, y: npt.NDArray[np.float32]) -> None:
    assert (np.abs(y - p.expected()) <= 2e-6 * p.magnitude() + 1e-30).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_both_levels_on_every_isa(m: int, n: int, k: int, bits: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(m, n, k, bits)
    monkeypatch.setenv("FBIEDGE_ISA", isa)
    assert same_bits(run(open_session(op_model(p)), p.x), int8_by_specification(p))
    check_fp32(p, run(open_session(op_model(p, accuracy_level=1)), p.x))


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_err_by_less_than_a_percent(bits: int) -> None:
    p = problem(20, 64, 768, bits)
    error = run(open_session(op_model(p)), p.x) - p.expected()
    assert np.sqrt((error**2).mean() / (p.expected() ** 2).mean()) < 0.01


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_neither_threads_nor_other_tokens_change_the_result(bits: int, level: int) -> None:
    p = problem(130, 1300, 200, bits)
    alone = run(open_session(op_model(p, accuracy_level=level)), p.x)
    threaded = open_session(op_model(p, accuracy_level=level), threads=2)
    assert same_bits(run(threaded, p.x), alone)
    for m in (1, 3, 5):
        assert same_bits(run(threaded, p.x[7 : 7 + m]), alone[7 : 7 + m])
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: run(threaded, p.x[:3]), range(20)):
            assert same_bits(y, alone[:3])


def test_the_session_overrides_the_level_and_int8_is_the_default() -> None:
    p = problem(2, 33, 300, 8)
    by_level = {"int8": int8_by_specification(p), "fp32": run(open_session(op_model(p, accuracy_level=1)), p.x)}
    assert not same_bits(by_level["int8"], by_level["fp32"])
    for attribute in (None, 0, 1, 4):
        model = op_model(p, attributes={"accuracy_level": attribute})
        assert same_bits(run(open_session(model), p.x), by_level["fp32" if attribute == 1 else "int8"])
        for level, expected in by_level.items():
            assert same_bits(run(open_session(model, config={"fbiedge.accuracy_level": level}), p.x), expected)


@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (0,), (2, 0)])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...]) -> None:
    p = problem(6, 33, 64, 8)
    session = open_session(op_model(p, a_shape=[f"d{i}" for i in range(len(lead))] + [64]))
    x = p.x[: int(np.prod(lead))].reshape(*lead, 64)
    assert same_bits(run(session, x), int8_by_specification(p)[: x.size // 64].reshape(*lead, 33))


def test_weights_at_an_unaligned_address() -> None:
    """ONNX Runtime may leave a small initializer where it lies in the file."""
    for pad in range(1, 8):
        p = problem(2, 16, 128, 8)
        model = op_model(p)
        model.producer_name = "x" * pad
        assert same_bits(run(open_session(model), p.x), int8_by_specification(p))


B = np.zeros((2, 1, 2176), np.uint8)
# N 32, K 64, 8 bits, with one thing wrong each.
MALFORMED: dict[str, tuple[dict[str, Any], npt.NDArray[Any], str]] = {
    "K missing": ({"K": None}, B, "K is 0, expected an integer attribute"),
    "N negative": ({"N": -1}, B, "N is -1, expected an integer attribute"),
    "bits missing": ({"bits": None}, B, "bits is 0, expected 4 or 8"),
    "bits 2": ({"bits": 2}, B, "bits is 2, expected 4 or 8"),
    "block_size missing": ({"block_size": None}, B, "block_size is 0, expected 32"),
    "block_size 128": ({"block_size": 128}, B, "block_size is 128, expected 32"),
    "accuracy_level unknown": ({"accuracy_level": 2}, B, "accuracy_level is 2, expected 0"),
    "K does not match B": ({"K": 129}, B, r"B has shape \[2, 1, 2176\], expected \[2, 2, 2176\]"),
    "N does not match B": ({"N": 33}, B, r"B has shape \[2, 1, 2176\], expected \[3, 1, 2176\]"),
    "bits do not match B": ({"bits": 4}, B, r"B has shape \[2, 1, 2176\], expected \[2, 1, 1152\]"),
    "B as stock has it": ({}, np.zeros((32, 2, 32), np.uint8), r"B has shape \[32, 2, 32\], expected \[2, 1, 2176\]"),
    "B of int8": ({}, B.astype(np.int8), "B|type"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_node_is_refused_with_one_clear_line(name: str) -> None:
    attributes, tiles, message = MALFORMED[name]
    with pytest.raises(Exception, match=message) as caught:
        open_session(op_model(problem(1, 32, 64, 8), attributes=attributes, tiles=tiles))
    assert message == "B|type" or "fbiedge MatMulNBits node 'head'" in str(caught.value)


def test_weights_that_are_not_constant_are_refused() -> None:
    model = op_model(problem(1, 32, 64, 8))
    del model.graph.initializer[:]
    model.graph.input.append(onnx.helper.make_tensor_value_info("B", onnx.TensorProto.UINT8, B.shape))
    with pytest.raises(Exception, match="B is computed, expected an initializer"):
        open_session(model)


def test_activations_of_another_width_are_an_error_not_a_crash() -> None:
    session = open_session(op_model(problem(1, 32, 64, 8), a_shape=["tokens", "width"]))
    with pytest.raises(Exception, match=r"A has shape \[3, 63\], expected the last dimension to be K = 64"):
        run(session, np.zeros((3, 63), np.float32))
    assert run(session, np.zeros((3, 64), np.float32)).shape == (3, 32)  # the session survives

"""BinaryQKV, BinarySwiGLU and BinaryMatMul's residual inside ONNX Runtime, against formula and specification."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from support.binary_layer import LayerProblem, layer_model, layer_problem
from support.binary_matmul import FORMS, int8_by_specification, op_model, problem

from fbiedge import ops_library

ISAS = ops_library.available_isas()
OPS = ("BinaryQKV", "BinarySwiGLU")


def sizes(op_type: str, n: int) -> tuple[int, ...]:
    return (n, 16, 33) if op_type == "BinaryQKV" else (n, n)


def open_session(model: onnx.ModelProto, *, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(ops_library.library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(session.run(None, {"A": x[None]})[0][0])


def same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op_type", OPS)
def test_int8_level_is_the_specification_bit_for_bit(
    op_type: str, form: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", isa)
    for m, k, n in [(1, 1, 1), (3, 33, 17), (9, 172, 64), (1, 768, 345)]:
        p = layer_problem(op_type, m, k, sizes(op_type, n), form, fp16=n == 64, offsets=n != 17)
        assert same_bits(run(open_session(layer_model(p)), p.x), p.int8_by_specification())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op_type", OPS)
def test_fp32_level_is_the_formula_within_rounding(op_type: str, form: str) -> None:
    for m, k, n in [(1, 1, 1), (3, 33, 17), (9, 172, 64), (1, 768, 345)]:
        p = layer_problem(op_type, m, k, sizes(op_type, n), form, fp16=n == 64)
        error = np.abs(run(open_session(layer_model(p, accuracy_level=1)), p.x) - p.expected())
        assert (error <= 3e-6 * p.magnitude()).all()


@pytest.mark.parametrize("level", [1, 4])
@pytest.mark.parametrize("op_type", OPS)
def test_threads_do_not_change_a_bit(op_type: str, level: int) -> None:
    p = layer_problem(op_type, 130, 768, sizes(op_type, 768), "column")
    one = run(open_session(layer_model(p, accuracy_level=level)), p.x)
    session = open_session(layer_model(p, accuracy_level=level), threads=2)
    assert same_bits(run(session, p.x), one)
    assert same_bits(run(session, p.x[:1]), one[:1])
    with ThreadPoolExecutor(4) as pool:
        assert all(same_bits(y, one) for y in pool.map(lambda _: run(session, p.x), range(8)))


@pytest.mark.parametrize("op_type", OPS)
def test_shapes(op_type: str) -> None:
    p = layer_problem(op_type, 6, 64, sizes(op_type, 33), "row")
    session = open_session(layer_model(p, a_shape=["batch", "sequence", 64]))
    width = sum(part.n for part in p.parts) if op_type == "BinaryQKV" else 33
    assert session.run(None, {"A": p.x.reshape(2, 3, 64)})[0].shape == (2, 3, width)
    assert session.run(None, {"A": p.x[:0].reshape(2, 0, 64)})[0].shape == (2, 0, width)
    if tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24):  # see register.cc
        assert session.get_outputs()[0].shape == ["batch", "sequence", width]


def residual_model(form: str, n: int = 33, k: int = 172, m: int = 5) -> tuple[Any, onnx.ModelProto]:
    """A BinaryMatMul whose bias is an input of the graph."""
    p = problem(m, n, k, form, bias=False)
    model = op_model(p)
    (node,) = model.graph.node
    node.input.extend([""] * (4 - len(node.input)) + ["residual"])
    model.graph.input.append(onnx.helper.make_tensor_value_info("residual", onnx.TensorProto.FLOAT, None))
    return p, model


@pytest.mark.parametrize("form", FORMS)
def test_a_computed_bias_is_added_last(form: str) -> None:
    p, model = residual_model(form)
    residual = np.random.default_rng(1).standard_normal((1, p.m, p.n), np.float32)
    y = open_session(model).run(None, {"A": p.x[None], "residual": residual})[0]
    assert same_bits(y[0], int8_by_specification(p) + residual[0])


@pytest.mark.parametrize("shape", [(33,), (1, 1, 33), (1, 5, 32), (5, 33)])
def test_a_computed_bias_of_another_shape_is_an_error(shape: tuple[int, ...]) -> None:
    p, model = residual_model("column")
    message = rf"node 'projection': a computed bias has shape \[{', '.join(map(str, shape))}\], expected .*\[1, 5, 33\]"
    with pytest.raises(Exception, match=message):
        open_session(model).run(None, {"A": p.x[None], "residual": np.zeros(shape, np.float32)})


# K 64, parts of 33, 16 and 33 (or 33 and 33) rows in column form, with one thing wrong each.
MALFORMED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no K": ("BinaryQKV", {"K": None}, {}, "K is 0, expected an integer attribute"),
    "no N_k": ("BinaryQKV", {"N_k": None}, {}, "N_k is 0, expected an integer attribute"),
    "N_v does not match": ("BinaryQKV", {"N_v": 64}, {}, r"v_B has shape \[3, 2, 64\], expected \[4, 2, 64\]"),
    "no N": ("BinarySwiGLU", {"N": None}, {}, "N is 0, expected an integer attribute"),
    "up of another size": (
        "BinarySwiGLU", {}, {"up_B": np.zeros((4, 2, 64), np.uint8)}, r"up_B has shape \[4, 2, 64\], expected \[3, 2, 64\]"
    ),
    "norm of another size": ("BinaryQKV", {}, {"norm": np.ones(63, np.float32)}, r"norm has shape \[63\], expected \[64\]"),
    "scales": ("BinaryQKV", {}, {"k_scales": np.ones(16, np.float32)}, r"k_scales has shape \[16\], expected \[64\]"),
    "offsets": ("BinarySwiGLU", {}, {"up_offsets": np.ones(1, np.float32)}, r"up_offsets has shape \[1\], expected \[64\]"),
    "form": ("BinarySwiGLU", {"scale_form": "diagonal"}, {}, "scale_form is 'diagonal', expected column"),
    "epsilon": ("BinaryQKV", {"epsilon": -1.0}, {}, "epsilon is -1.0+, expected 0 or more"),
    "accuracy": ("BinaryQKV", {"accuracy_level": 3}, {}, "accuracy_level is 3, expected 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_node_is_refused_with_one_clear_line(name: str) -> None:
    op_type, attributes, tensors, message = MALFORMED[name]
    p = layer_problem(op_type, 1, 64, sizes(op_type, 33), "column")
    with pytest.raises(Exception, match=f"fbiedge {op_type} node 'layer': {message}"):
        open_session(layer_model(p, attributes=attributes, tensors=tensors))


@pytest.mark.parametrize("op_type", OPS)
def test_offsets_in_block_form_are_refused(op_type: str) -> None:
    p = layer_problem(op_type, 1, 64, sizes(op_type, 33), "block")
    name = "v_offsets" if op_type == "BinaryQKV" else "gate_offsets"
    with pytest.raises(Exception, match=f"{name} are given, expected none in block form"):
        open_session(layer_model(p, tensors={name: np.zeros((3, 1, 16), np.float32)}))


def test_activations_of_another_width_are_an_error_not_a_crash() -> None:
    p: LayerProblem = layer_problem("BinarySwiGLU", 1, 64, (33, 33), "column")
    session = open_session(layer_model(p, a_shape=["tokens", "width"]))
    with pytest.raises(Exception, match=r"A has shape \[3, 63\], expected the last dimension to be K = 64"):
        session.run(None, {"A": np.zeros((3, 63), np.float32)})

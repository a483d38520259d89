"""The bodies of BinaryQKV and BinarySwiGLU equal the formula and the kernels, and fold at load as far as they can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import FunctionProto
from support.binary_layer import layer_model, layer_problem

from fbiedge.config import ScalingPattern
from fbiedge.exporters.onnx.fallback_fused import binary_qkv_function, binary_swiglu_function
from fbiedge.ops_library import library_path

FORMS: tuple[ScalingPattern, ...] = ("column", "row", "single", "block")
FUNCTIONS: dict[str, Callable[[ScalingPattern], FunctionProto]] = {
    "BinaryQKV": binary_qkv_function,
    "BinarySwiGLU": binary_swiglu_function,
}
SIZES = {"BinaryQKV": (48, 16, 33), "BinarySwiGLU": (65, 65)}


def run(model: onnx.ModelProto, x: np.ndarray, library: Path | None, optimized: Path | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"A": x[None]})[0][0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op_type", FUNCTIONS)
def test_body_equals_formula_and_kernel(op_type: str, form: ScalingPattern) -> None:
    for k in (33, 129, 300):
        p = layer_problem(op_type, 5, k, SIZES[op_type], form, fp16=k == 300)
        model = layer_model(p, accuracy_level=1, functions=[FUNCTIONS[op_type](form)])
        body, kernel = run(model, p.x, None), run(model, p.x, library_path())
        tolerance = 4e-6 * p.magnitude()
        assert (np.abs(body - p.expected()) <= tolerance).all()
        assert (np.abs(kernel - body) <= 2 * tolerance).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op_type", FUNCTIONS)
def test_what_depends_on_weights_folds_at_load(op_type: str, form: ScalingPattern, tmp_path: Path) -> None:
    p = layer_problem(op_type, 2, 172, SIZES[op_type], form)
    model = layer_model(p, functions=[FUNCTIONS[op_type](form)])
    run(model, p.x, None, tmp_path / "optimized.onnx")
    left = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    parts = len(SIZES[op_type])
    assert left["SimplifiedLayerNormalization"] == 1
    assert left["MatMulNBits"] == parts
    assert left["ReduceSum"] <= (0 if form == "block" else parts)
    for folded in ("Gather", "Transpose", "Reshape", "Slice", "Cast", "Pad", "Flatten"):
        assert left[folded] == 0, left

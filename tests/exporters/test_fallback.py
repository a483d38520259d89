"""The model-local function in stock operators equals the op's formula, at sizes around the tile and the block."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fbiedge.bits import pack_bits, tile_bits, unpack_bits
from fbiedge.config import BLOCK_SIZE, ScalingPattern
from fbiedge.exporters.onnx.fallback import binary_matmul_function, nibble_table
from fbiedge.exporters.onnx.sources import tile_scales

FORMS: tuple[ScalingPattern, ...] = ("column", "row", "single", "block")
SIZES = [
    (1, 1),
    (1, 33),
    (31, 1),
    (15, 31),
    (16, 32),
    (17, 33),
    (32, 63),
    (33, 64),
    (63, 65),
    (20, 127),
    (48, 129),
    (64, 172),
    (65, 768),
]


def formula(form: ScalingPattern, x: np.ndarray, signs: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """What the op computes, in float64: x · W_effᵀ for x [M, K] and signs [N, K]."""
    k = signs.shape[1]
    match form:
        case "row":
            effective = alpha[:, None] * signs + beta[:, None]
        case "block":
            effective = np.repeat(alpha, BLOCK_SIZE, axis=1)[:, :k] * signs
        case _:
            effective = alpha * signs + beta
    return x.astype(np.float64) @ effective.T.astype(np.float64)


class OneNode:
    """A model of one BinaryMatMul with random weights, in a session without our library."""

    def __init__(
        self,
        form: ScalingPattern,
        n: int,
        k: int,
        *,
        level: int = 1,
        bias: bool = False,
        scale_dtype: type = np.float32,
        optimized: Path | None = None,
    ) -> None:
        generator = np.random.default_rng([n, k])
        weight = generator.normal(size=(n, k)).astype(np.float32)
        shape = {"column": (k,), "row": (n,), "single": (1,), "block": (n, -(-k // BLOCK_SIZE))}[form]
        self.form = form
        self.signs = unpack_bits(pack_bits(weight), k)
        self.alpha = generator.uniform(0.5, 1.5, shape).astype(scale_dtype).astype(np.float32)
        self.beta = generator.normal(0, 0.1, shape).astype(np.float32)
        self.bias = generator.normal(size=n).astype(np.float32) if bias else np.zeros(n, np.float32)
        tensors = {"B": tile_bits(pack_bits(weight)), "scales": self.alpha.astype(scale_dtype)}
        if form == "block":
            tensors["scales"] = tile_scales(tensors["scales"])
        else:
            tensors["offsets"] = self.beta
        if bias:
            tensors["bias"] = self.bias
        inputs = ["A", *(name if name in tensors else "" for name in ("B", "scales", "offsets", "bias"))]
        node = helper.make_node(
            "BinaryMatMul", inputs if bias else inputs[:4] if form != "block" else inputs[:3], ["Y"], domain="fbiedge",
            K=k, N=n, scale_form=form, block_size=BLOCK_SIZE if form == "block" else 0, accuracy_level=level,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "one_node",
            [helper.make_tensor_value_info("A", TensorProto.FLOAT, ["batch", "tokens", k])],
            [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["batch", "tokens", n])],
            [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
        )
        opsets = [
            helper.make_opsetid(domain, version) for domain, version in (("", 21), ("com.microsoft", 1), ("fbiedge", 1))
        ]
        functions = [binary_matmul_function(form, bias=bias)]
        model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"A": x[None]})[0][0]

    def expected(self, x: np.ndarray) -> np.ndarray:
        return formula(self.form, x, self.signs, self.alpha, self.beta) + self.bias


def activations(m: int, k: int) -> np.ndarray:
    return np.random.default_rng([m, k]).normal(size=(m, k)).astype(np.float32)


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_fp32_level_equals_the_formula(form: ScalingPattern, n: int, k: int) -> None:
    node = OneNode(form, n, k)
    for m in (1, 7):
        x = activations(m, k)
        np.testing.assert_allclose(node.run(x), node.expected(x), rtol=0, atol=2e-6 * k**0.5 * 8)


@pytest.mark.parametrize(("n", "k"), [(17, 33), (48, 129), (65, 768)])
@pytest.mark.parametrize("form", FORMS)
def test_int8_level_stays_within_its_bound(form: ScalingPattern, n: int, k: int) -> None:
    """Rounding moves an input by at most half a step, max|x · alpha| / 127 / 2; over K inputs the errors add like noise."""
    node = OneNode(form, n, k, level=4)
    x = activations(7, k)
    step = np.abs(x).max() * node.alpha.max() / 127
    error = np.abs(node.run(x) - node.expected(x))
    assert 0 < error.max() < 5 * step / 12**0.5 * k**0.5


@pytest.mark.parametrize("form", FORMS)
def test_bias_is_added(form: ScalingPattern) -> None:
    node = OneNode(form, 17, 33, bias=True)
    x = activations(3, 33)
    np.testing.assert_allclose(node.run(x), node.expected(x), rtol=0, atol=1e-4)


def test_block_scales_may_be_fp16() -> None:
    node = OneNode("block", 48, 172, scale_dtype=np.float16)
    x = activations(3, 172)
    np.testing.assert_allclose(node.run(x), node.expected(x), rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_all_that_depends_on_weights_folds_at_load(form: ScalingPattern, tmp_path: Path) -> None:
    OneNode(form, 33, 172, optimized=tmp_path / "optimized.onnx")
    left = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    expected = {
        "column": {"Mul": 2, "MatMulNBits": 1, "ReduceSum": 1, "Add": 1},
        "row": {"Mul": 2, "MatMulNBits": 1, "ReduceSum": 1, "Add": 1},
        "single": {"Mul": 2, "MatMulNBits": 1, "ReduceSum": 1, "Add": 1},
        "block": {"MatMulNBits": 1},
    }
    assert left == expected[form]


def test_nibble_table_has_the_lowest_bit_first() -> None:
    table = nibble_table()
    assert table.shape == (256, 4)
    assert table[0b00000000].tolist() == [0x77, 0x77, 0x77, 0x77]
    assert table[0b00000001].tolist() == [0x79, 0x77, 0x77, 0x77]
    assert table[0b10000010].tolist() == [0x97, 0x77, 0x77, 0x97]

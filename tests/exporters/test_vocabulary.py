"""Embedding and head of 1 bit: exact, stored once where tied, read back as they were, and refused where they can't be."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.checkpoints import small_checkpoint, small_config
from support.onnx_llama import OnnxLlama
from support.random_weights import RandomWeights, random_weights

from fbiedge import ops_library
from fbiedge.bits import tile_bits
from fbiedge.errors import UsageError
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.exporters.onnx.embedding import binary_rows
from fbiedge.exporters.onnx.head import rows_from_binary
from fbiedge.exporters.onnx.nodes import Nodes
from fbiedge.exporters.onnx.sources import tile_scales
from fbiedge.inspection import inspect
from fbiedge.model_file import ModelFile
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.weights import BinaryLinear, HasBinaryRows, open_checkpoint

IDS = [3, 99, 4, 0, 15, 16, 100, 31]
FP32: dict[str, Any] = {"accuracy_level": "fp32", "kv_cache": "fp32"}


def qwen3(*, tied: bool = True, **changes: Any) -> RandomWeights:
    """Hidden 256, vocabulary 101 (6 rows of tiles and 5 rows), 8 heads of 32 over 4 KV heads, norms of heads."""
    sizes: dict[str, Any] = {
        "vocab_size": 101, "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "model_type": "qwen3", "tie_word_embeddings": tied,
    }  # fmt: skip
    return random_weights(small_config("block", **(sizes | changes)), binary_head=True)


def metadata_of(path: Path) -> dict[str, str]:
    return ModelFile.open(path).metadata


def same_rows(a: BinaryLinear | None, b: BinaryLinear | None) -> bool:
    assert a is not None and b is not None
    return (a.n, a.k) == (b.n, b.k) and np.array_equal(a.packed, b.packed) and np.array_equal(a.alpha, b.alpha)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("k", [128, 384])
def test_rows_are_looked_up_exactly(k: int, dtype: type) -> None:
    """Every token of a vocabulary that fills no whole row of tiles, in a batch."""
    weights = random_weights(small_config("block", vocab_size=37, hidden_size=k), binary_head=True)
    rows = weights.binary_embedding()
    assert rows is not None
    nodes = Nodes()
    binary_rows(nodes, "rows", "ids", "matrix")
    graph = helper.make_graph(
        nodes.nodes,
        "rows",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)],
        [
            *nodes.constants,
            numpy_helper.from_array(tile_bits(rows.packed), "matrix.bits"),
            numpy_helper.from_array(tile_scales(rows.alpha.astype(dtype)), "matrix.alpha"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.stack([np.arange(37), np.arange(37)[::-1]])
    (got,) = session.run(None, {"ids": ids})
    np.testing.assert_array_equal(got, rows.dense()[ids])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_fp32_rows(tied: bool, library: Path | None, tmp_path: Path) -> None:
    weights = qwen3(tied=tied)
    paths = [tmp_path / "binary.onnx", tmp_path / "dense.onnx"]
    export_onnx(weights, paths[0], **FP32)
    export_onnx(weights, paths[1], head="fp32", embedding="fp32", **FP32)
    binary, dense = (OnnxLlama(path, weights.config, library) for path in paths)
    reference = Reference(weights)
    for ids in (IDS, [5], [100]):
        expected = reference.logits(ids)
        largest = np.abs(expected).max()
        got = binary.logits(ids)
        np.testing.assert_allclose(got, dense.logits(ids), rtol=0, atol=5e-6 * largest)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("isa", ops_library.available_isas())
@pytest.mark.parametrize("head_dim", [32, 128])
def test_in_a_session_on_every_isa(head_dim: int, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fp32 activations and cache, the reference's logits to rounding; with int8 the same bits on every ISA."""
    weights, exact, fast = qwen3(head_dim=head_dim), tmp_path / "exact.onnx", tmp_path / "fast.onnx"
    export_onnx(weights, exact, **FP32)
    export_onnx(weights, fast)
    reference = Reference(weights)
    expected = reference.logits(IDS)
    int8 = Session.open(fast).all_logits(IDS)
    monkeypatch.setenv("FBIEDGE_ISA", isa)
    session = Session.open(exact)
    assert (session.isa, session.head_activations) == (isa, "fp32")
    rounding = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(session.all_logits(IDS), expected, rtol=0, atol=rounding)
    for token in (7, 64, 100):
        np.testing.assert_allclose(session.forward([token]), reference.logits([token])[0], rtol=0, atol=rounding)
    session = Session.open(fast)
    assert (session.isa, session.head_activations, session.model.kv_cache) == (isa, "int8", "int8")
    np.testing.assert_array_equal(session.all_logits(IDS), int8)
    assert 0.005 < np.sqrt(np.mean((int8 - expected) ** 2) / np.mean(expected**2)) < 0.1


def test_a_tied_embedding_is_stored_once_and_an_untied_one_beside_the_head(tmp_path: Path) -> None:
    stored = {}
    for tied in (True, False):
        path = tmp_path / f"{tied}.onnx"
        report = export_onnx(qwen3(tied=tied), path)
        stored[tied] = {tensor.name for tensor in onnx.load(path).graph.initializer}
        metadata = metadata_of(path)
        assert (metadata["head"], metadata["head_operator"]) == ("1bit", "fbiedge")
        groups = {row["group"]: row for row in json.loads(metadata["inventory"])}
        assert groups == {row["group"]: row for row in report.inventory}
        assert {group.group: group.bytes for group in inspect(path).groups} == {
            name: row["bytes"] for name, row in groups.items()
        }
        rows = groups["head"]
        bias = 4 * 101
        assert rows["parameters"] == 101 * 256 and rows["bytes"] - bias == 112 * 256 * 9 // 64  # 112 rows of 1.125 bits
        assert rows["form"] == ("1-bit block, and the embedding" if tied else "1-bit block")
        assert ("embedding" in groups) is not tied
    names = {f"model.embed_tokens.{part}" for part in ("bits", "alpha")}
    assert stored[False] - stored[True] == names and stored[True] < stored[False]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_read_back_is_what_was_written(tied: bool, tmp_path: Path) -> None:
    weights, first, second = qwen3(tied=tied), tmp_path / "first.onnx", tmp_path / "second.onnx"
    export_onnx(weights, first)
    back = open_onnx(first)
    assert isinstance(back, HasBinaryRows) and back.config == weights.config
    assert same_rows(back.binary_embedding(), weights.binary_embedding())
    assert same_rows(back.binary_head(), weights.binary_head())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.k_norm.weight"):
        np.testing.assert_array_equal(back.tensor(name), weights.tensor(name))
    export_onnx(back, second)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("embedding", ["fp32", "fp16", "int8", "int4", "1bit"])
@pytest.mark.parametrize("head", ["int8", "int4", "fp32", "1bit"])
def test_any_form_can_be_had_of_1_bit(head: str, embedding: str, tmp_path: Path) -> None:
    """All are exact: quantising gives codes of ± 1, and the scales are fp16 numbers."""
    weights, path = qwen3(), tmp_path / "model.onnx"
    export_onnx(weights, path, head=head, embedding=embedding, **FP32)  # type: ignore[arg-type]
    back = open_onnx(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(back.tensor(name), weights.tensor(name))
    assert metadata_of(path)["head"] == head
    expected = Reference(weights).logits(IDS)
    got = OnnxLlama(path, weights.config, ops_library.library_path()).logits(IDS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [128, 172, 300])
def test_a_head_quantised_from_1_bit_is_the_same_head(k: int, bits: int) -> None:
    weights = random_weights(small_config("block", hidden_size=k), binary_head=True)
    rows = weights.binary_head()
    assert rows is not None
    np.testing.assert_array_equal(rows_from_binary(rows, bits).dequantize(k), rows.dense())


def test_other_models_get_what_they_got(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "checkpoint", small_config(head_dim=16))
    weights, path = open_checkpoint(tmp_path / "checkpoint"), tmp_path / "model.onnx"
    export_onnx(weights, path)
    groups = {row["group"]: row["form"] for row in json.loads(metadata_of(path)["inventory"])}
    assert (groups["head"], groups["embedding"]) == ("int8 block 32", "fp32")
    for option, choice in (("head", "int8, int4 or fp32"), ("embedding", "fp32, fp16, int8 or int4")):
        with pytest.raises(UsageError, match=f"{option} is '1bit', but .*; choose {choice}"):
            export_onnx(weights, path, **{option: "1bit"})  # type: ignore[arg-type]


class WithBinaryRows:
    """A column model whose embedding and head are 1 bit, as a GGUF file of ours may be."""

    def __init__(self, weights: Any, rows: RandomWeights) -> None:
        self.weights, self.rows = weights, rows
        self.config, self.files, self.linear = weights.config, weights.files, weights.linear
        self.binary_head, self.binary_embedding = rows.binary_head, rows.binary_embedding

    def tensor(self, name: str) -> np.ndarray:
        source = self.rows if name.startswith(("lm_head", "model.embed")) else self.weights
        return source.tensor(name)


def test_a_column_model_keeps_its_embedding_of_1_bit_and_has_the_head_in_8_without_loss(
    library: Path | None, tmp_path: Path
) -> None:
    config = small_config("column", vocab_size=101, hidden_size=256, head_dim=16)
    small_checkpoint(tmp_path / "checkpoint", config)
    rows = random_weights(replace(config, scaling_pattern="block"), binary_head=True)
    weights, path = WithBinaryRows(open_checkpoint(tmp_path / "checkpoint"), rows), tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="a model of scale form 'column' can't have it; choose int8"):
        export_onnx(weights, path, head="1bit")
    export_onnx(weights, path, **FP32)
    assert metadata_of(path)["head"] == "int8"
    back = open_onnx(path)
    assert same_rows(back.binary_embedding(), rows.binary_embedding())
    np.testing.assert_array_equal(back.tensor("lm_head.weight"), rows.tensor("lm_head.weight"))
    expected = Reference(weights).logits(IDS)
    got = OnnxLlama(path, config, library).logits(IDS)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_without_the_library_all_of_the_head_folds_at_load(tmp_path: Path) -> None:
    """And the embedding's tiles stay as they are: only what a lookup needs is computed."""
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    weights = qwen3()
    export_onnx(weights, path)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(optimized).graph
    left = Counter(node.op_type for node in graph.node)
    assert left["MatMulNBits"] == 7 * weights.config.num_hidden_layers + 1
    assert {"lm_head.bits", "lm_head.alpha"} <= {tensor.name for tensor in graph.initializer}

"""What `open_onnx` reads back is what was exported; and the file says about itself what the contract of metadata says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from support.checkpoints import PATTERNS, dense, small_checkpoint, small_config

import fbiedge
from fbiedge.config import ModelConfig, ScalingPattern
from fbiedge.errors import CheckpointError, UsageError
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.exporters.onnx.sources import tile_scales, untile_scales
from fbiedge.initialize import byte_tokenizer
from fbiedge.weights import BinaryLinear, Weights, open_checkpoint, write_checkpoint

MakeWeights = Callable[[ModelConfig], Weights]


@pytest.mark.parametrize("external", [False, True], ids=["embedded", "external"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_tensor_comes_back(
    pattern: ScalingPattern, external: bool, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights = make_weights(small_config(pattern, head_dim=16))
    path = tmp_path / "model.onnx"
    limit = {"embed_limit_bytes": 0} if external else {}
    export_onnx(weights, path, head="fp32", block_scales="fp32", **limit)
    back = open_onnx(path)
    assert back.config == weights.config
    for layer in range(weights.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"{prefix}{norm}.weight"
            np.testing.assert_array_equal(back.tensor(name), weights.tensor(name))
        for name in weights.config.linear_shapes():
            np.testing.assert_array_equal(dense(back, prefix + name), dense(weights, prefix + name))
            linear, original = back.linear(prefix + name), weights.linear(prefix + name)
            if isinstance(original, BinaryLinear):
                assert isinstance(linear, BinaryLinear)
                np.testing.assert_array_equal(linear.packed, original.packed)
                np.testing.assert_array_equal(linear.alpha, original.alpha)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(back.tensor(name), weights.tensor(name))


def test_a_model_read_back_exports_to_the_same_bytes(weights: Weights, tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    export_onnx(weights, first, head="fp32")
    export_onnx(open_onnx(first), second, head="fp32")
    assert first.read_bytes() == second.read_bytes()


def test_fp16_embedding_and_block_scales_are_rounded_once(make_weights: MakeWeights, tmp_path: Path) -> None:
    weights = make_weights(small_config("block", head_dim=16))
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, embedding="fp16")
    back = open_onnx(path)
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(back.tensor(name), weights.tensor(name).astype(np.float16).astype(np.float32))
    name = "model.layers.1.mlp.down_proj"
    linear, original = back.linear(name), weights.linear(name)
    assert isinstance(linear, BinaryLinear) and isinstance(original, BinaryLinear)
    np.testing.assert_array_equal(linear.alpha, original.alpha.astype(np.float16).astype(np.float32))


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    config = small_config(head_dim=16)
    small_checkpoint(folder, config, edit=lambda tensors: tensors["model.embed_tokens.weight"].fill(1e6))
    with pytest.raises(CheckpointError, match="beyond fp16's 65504"):
        export_onnx(open_checkpoint(folder), tmp_path / "model.onnx", embedding="fp16")
    assert not (tmp_path / "model.onnx").exists()


def test_scale_tiles_hold_16_rows_side_by_side() -> None:
    alpha = np.arange(1, 1 + 17 * 3, dtype=np.float32).reshape(17, 3)
    tiled = tile_scales(alpha)
    assert tiled.shape == (2, 3, 16)
    assert tiled[0, 2, 5] == alpha[5, 2] and tiled[1, 1, 0] == alpha[16, 1]
    assert not tiled[1, :, 1:].any()
    np.testing.assert_array_equal(untile_scales(tiled, 17), alpha)


FILES = {
    "tokenizer.json": byte_tokenizer(),
    "tokenizer_config.json": '{"bos_token": "<s>", "chat_template": "{{ messages }}"}',
    "generation_config.json": '{"eos_token_id": 2}',
    "special_tokens_map.json": '{"eos_token": "</s>"}',
}


def weights_with_files(tmp_path: Path, files: dict[str, str]) -> Weights:
    folder = tmp_path / "with_files"
    config = small_config(head_dim=16)
    tensors = small_checkpoint(tmp_path / "plain", config)
    write_checkpoint(folder, config, tensors.items(), files)
    return open_checkpoint(folder)


def test_sidecar_files_travel_in_the_model(tmp_path: Path) -> None:
    files = FILES | {"chat_template.jinja": "é {{ messages }}\n"}
    export_onnx(weights_with_files(tmp_path, files), tmp_path / "model.onnx")
    assert open_onnx(tmp_path / "model.onnx").files == files


def test_metadata(tmp_path: Path) -> None:
    weights = weights_with_files(tmp_path, FILES)
    path = tmp_path / "model.onnx"
    report = export_onnx(weights, path)
    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["fbiedge.format_version"] == "1"
    assert metadata["fbiedge.producer"] == f"fbiedge {fbiedge.__version__}"
    assert ModelConfig.from_dict(json.loads(metadata["fbiedge.config"])) == weights.config
    assert metadata["fbiedge.tokenizer"] == FILES["tokenizer.json"]
    assert metadata["fbiedge.tokenizer_config"] == FILES["tokenizer_config.json"]
    assert metadata["fbiedge.generation_config"] == FILES["generation_config.json"]
    assert metadata["fbiedge.chat_template"] == "{{ messages }}"  # taken out of tokenizer_config.json
    assert (metadata["fbiedge.accuracy_level"], metadata["fbiedge.head"]) == ("int8", "int8")
    inventory = json.loads(metadata["fbiedge.inventory"])
    assert inventory == list(report.inventory)
    stored = {
        tensor.name: len(tensor.raw_data)
        for tensor in model.graph.initializer
        if not tensor.name.startswith("constants.") and tensor.name != "logits_to_keep"
    }
    assert sum(row["bytes"] for row in inventory) == sum(stored.values())
    assert sum(row["tensors"] for row in inventory) == len(stored)
    (mlp,) = (row for row in inventory if row["group"] == "mlp")
    assert mlp["form"] == "1-bit column" and mlp["parameters"] == 2 * 3 * 72 * 172
    assert mlp["bits_per_weight"] == pytest.approx(8 * mlp["bytes"] / mlp["parameters"], abs=1e-3)


def test_names_and_types_are_those_of_onnxruntime_genai(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, kv_cache="fp32")
    model = onnx.load(path)
    assert model.ir_version == 10
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21, "com.microsoft": 1, "fbiedge": 1}
    functions = {(function.domain, function.name) for function in model.functions}
    assert functions == {("fbiedge", name) for name in ("BinaryMatMul", "BinaryQKV", "BinarySwiGLU", "MatMulNBits")}

    def described(infos: object) -> dict[str, tuple[int, list[object]]]:
        return {
            info.name: (
                info.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim],
            )
            for info in infos  # type: ignore[attr-defined]
        }

    inputs, outputs = described(model.graph.input), described(model.graph.output)
    assert inputs["input_ids"] == (TensorProto.INT64, ["batch", "sequence_length"])
    assert inputs["attention_mask"] == (TensorProto.INT64, ["batch", "total_sequence_length"])
    assert outputs["logits"] == (TensorProto.FLOAT, ["batch", "logits_length", 80])
    for layer in range(2):
        for part in ("key", "value"):
            past, present = inputs[f"past_key_values.{layer}.{part}"], outputs[f"present.{layer}.{part}"]
            assert past == (TensorProto.FLOAT, ["batch", 2, "past_sequence_length", 16])
            assert present == (TensorProto.FLOAT, ["batch", 2, "present_sequence_length", 16])
    assert inputs.pop("logits_to_keep") == (TensorProto.INT64, [1])
    assert (len(inputs), len(outputs)) == (6, 5)
    # It has a default, so onnxruntime-genai and others, which don't know it, are not asked for it.
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    assert {entry.name for entry in session.get_inputs()} == set(inputs)


def test_an_int8_cache_adds_a_scale_for_each_row(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(weights, path)
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props}["fbiedge.kv_cache"] == "int8"
    assert ("fbiedge", "GroupQueryAttention") in {(function.domain, function.name) for function in model.functions}
    for infos, prefix in ((model.graph.input, "past_key_values"), (model.graph.output, "present")):
        types = {info.name: info.type.tensor_type for info in infos}
        rows = ["batch", 2, f"{prefix.removesuffix('_key_values')}_sequence_length"]
        for part, dtype, shape in (
            ("key", TensorProto.INT8, [*rows, 16]), ("value", TensorProto.INT8, [*rows, 16]),
            ("key_scale", TensorProto.FLOAT, rows), ("value_scale", TensorProto.FLOAT, rows),
        ):  # fmt: skip
            tensor = types[f"{prefix}.1.{part}"]
            assert tensor.elem_type == dtype
            assert [dim.dim_param or dim.dim_value for dim in tensor.shape.dim] == shape


@pytest.mark.parametrize("head_dim", [8, 40])
def test_heads_that_an_int8_cache_can_not_hold(
    make_weights: Callable[[ModelConfig], Weights], tmp_path: Path, head_dim: int
) -> None:
    weights = make_weights(small_config(head_dim=head_dim))
    export_onnx(weights, tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert metadata["fbiedge.kv_cache"] == "fp32"
    message = f"head_dim is {head_dim}, but a KV cache of int8 takes multiples of 16 up to 256 only"
    with pytest.raises(UsageError, match=message):
        export_onnx(weights, tmp_path / "model.onnx", kv_cache="int8")


def test_zeros_are_counted(tmp_path: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, :5] = 0

    folder = tmp_path / "checkpoint"
    small_checkpoint(folder, small_config(head_dim=16), edit=edit)
    assert export_onnx(open_checkpoint(folder), tmp_path / "model.onnx").zeros == 5


def test_head_dim_that_attention_can_not_take_is_refused(make_weights: MakeWeights, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="head_dim is 12, but ONNX Runtime's GroupQueryAttention takes multiples of 8"):
        export_onnx(make_weights(small_config(head_dim=12)), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("option", ["accuracy_level", "head", "embedding", "block_scales"])
def test_unknown_options_are_refused(option: str, weights: Weights, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{option} is 'int3', expected one of"):
        export_onnx(weights, tmp_path / "model.onnx", **{option: "int3"})  # type: ignore[arg-type]


class Mismatched:
    """Weights whose config promises other sizes than the tensors have."""

    def __init__(self, weights: Weights, config: ModelConfig) -> None:
        self.weights, self.config, self.files = weights, config, weights.files

    def tensor(self, name: str) -> np.ndarray:
        return self.weights.tensor(name)

    def linear(self, name: str) -> BinaryLinear | np.ndarray:
        return self.weights.linear(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 200}, r"mlp.gate_proj has shape \(172, 72\), expected \(200, 72\)"),
        ({"hidden_size": 80}, r"model.embed_tokens.weight has shape \(80, 72\), expected \(80, 80\)"),
        ({"scaling_pattern": "row"}, "is not binary with scaling_pattern 'row'"),
        ({"scaling_pattern": "none"}, "is binary, but the config's scaling_pattern is 'none'"),
    ],
)
def test_weights_that_contradict_their_config_are_refused(
    change: dict[str, object], message: str, weights: Weights, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=message):
        export_onnx(Mismatched(weights, replace(weights.config, **change)), out / "model.onnx", embed_limit_bytes=0)
    assert not list(out.iterdir())


def test_the_library_runs_the_nodes_and_the_fallback_replaces_them(
    library: Path | None, weights: Weights, tmp_path: Path
) -> None:
    path, optimized = export_onnx(weights, tmp_path / "model.onnx").model, tmp_path / "optimized.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimized)
    if library is not None:
        options.register_custom_ops_library(str(library))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(optimized).graph.node]
    layers, head = weights.config.num_hidden_layers, 1
    ours = {"BinaryQKV": layers, "BinarySwiGLU": layers, "BinaryMatMul": 2 * layers, "MatMulNBits": head}
    stock = {"BinaryQKV": 0, "BinarySwiGLU": 0, "BinaryMatMul": 0, "MatMulNBits": 7 * layers + head}
    expected = stock if library is None else ours
    assert {name: nodes.count(name) for name in expected} == expected
    if library is not None:  # five nodes a layer, and what the prologue, the embedding and the head need
        assert len(nodes) <= 5 * layers + 12

"""Checkpoints in every accepted form read as what was written."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from support.checkpoints import PATTERNS, small_checkpoint, small_config, small_tensors

from fbiedge.bits import pack_bits, unpack_bits
from fbiedge.weights import BinaryLinear, Weights, open_checkpoint, write_checkpoint

DOWN = "model.layers.1.mlp.down_proj"  # K = 172: two groups of a block, and a last byte that is half full


def assert_same_weights(got: Weights, expected: Weights) -> None:
    """Every tensor and every linear is equal, bit for bit."""
    assert got.config == expected.config
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(got.tensor(name), expected.tensor(name))
    for layer in range(expected.config.num_hidden_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{layer}.{norm}.weight"
            np.testing.assert_array_equal(got.tensor(name), expected.tensor(name))
        for linear in expected.config.linear_shapes():
            ours, theirs = (weights.linear(f"model.layers.{layer}.{linear}") for weights in (got, expected))
            if isinstance(theirs, BinaryLinear):
                assert isinstance(ours, BinaryLinear)
                np.testing.assert_array_equal(ours.packed, theirs.packed)
                ours, theirs = ours.dense(), theirs.dense()
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip(tmp_path: Path, pattern) -> None:
    config = small_config(pattern)
    tensors = small_tensors(config)
    files = {"tokenizer.json": '{"é": 1}', "chat_template.jinja": "{{ x }}", "notes.txt": "not one of ours"}
    write_checkpoint(tmp_path / "c", config, tensors.items(), files)
    weights = open_checkpoint(tmp_path / "c")
    assert weights.config == config
    assert weights.files == {"tokenizer.json": '{"é": 1}', "chat_template.jinja": "{{ x }}"}
    for name, array in tensors.items():
        if "_proj" not in name:
            got = weights.tensor(name)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, array)
    linear = weights.linear(DOWN)
    if pattern == "none":
        np.testing.assert_array_equal(linear, tensors[f"{DOWN}.weight"])
        return
    assert isinstance(linear, BinaryLinear)
    assert (linear.n, linear.k, linear.pattern, linear.zeros) == (72, 172, pattern, 0)
    assert linear.alpha.shape == {"column": (172,), "row": (72,), "single": (1,), "block": (72, 2)}[pattern]
    assert (linear.beta is None) == (pattern == "block")
    np.testing.assert_array_equal(linear.packed, pack_bits(tensors[f"{DOWN}.weight"]))
    np.testing.assert_array_equal(unpack_bits(linear.packed, 172), np.sign(tensors[f"{DOWN}.weight"]))
    assert linear.packed.dtype == np.uint8 and linear.alpha.dtype == np.float32


@pytest.mark.parametrize("pattern", ["column", "row", "single"])
def test_dense_is_the_formula_of_the_authors(tmp_path: Path, pattern) -> None:
    """wscale and wbias broadcast in their official shapes, as in `sign(W) * wscale + wbias`."""
    tensors = small_checkpoint(tmp_path / "c", small_config(pattern))
    weight, wscale, wbias = (torch.from_numpy(tensors[f"{DOWN}.{part}"]) for part in ("weight", "wscale", "wbias"))
    expected = (torch.sign(weight) * wscale + wbias).numpy()
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "c").linear(DOWN).dense(), expected)


def test_dense_of_block(tmp_path: Path) -> None:
    tensors = small_checkpoint(tmp_path / "c", small_config("block"))
    signs, alpha = np.sign(tensors[f"{DOWN}.weight"]), tensors[f"{DOWN}.wscale"]
    expected = np.concatenate([signs[:, :128] * alpha[:, :1], signs[:, 128:] * alpha[:, 1:]], axis=1)
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "c").linear(DOWN).dense(), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_is_inferred_where_config_is_silent(tmp_path: Path, pattern) -> None:
    config = small_config(pattern, intermediate_size=100)  # every K below 128: `block` scales look like those of `row`
    small_checkpoint(tmp_path / "c", config)
    path = tmp_path / "c/config.json"
    raw = json.loads(path.read_text())
    del raw["scaling_pattern"]
    path.write_text(json.dumps(raw))
    assert open_checkpoint(tmp_path / "c").config == config


def test_zero_is_plus_one_and_counted(tmp_path: Path) -> None:
    def put_zeros(tensors) -> None:
        tensors[f"{DOWN}.weight"][3, :5] = 0.0
        tensors[f"{DOWN}.weight"][3, 5] = -0.0

    small_checkpoint(tmp_path / "c", small_config(), edit=put_zeros)
    linear = open_checkpoint(tmp_path / "c").linear(DOWN)
    assert linear.zeros == 6
    assert unpack_bits(linear.packed, linear.k)[3, :6].tolist() == [1] * 6


@pytest.mark.parametrize("shard_bytes", [1, 40_000, 200_000])
def test_sharded_equals_single(tmp_path: Path, shard_bytes: int) -> None:
    small_checkpoint(tmp_path / "single", small_config())
    small_checkpoint(tmp_path / "sharded", small_config(), shard_bytes=shard_bytes)
    assert (tmp_path / "single/model.safetensors").is_file()
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert_same_weights(open_checkpoint(tmp_path / "sharded"), open_checkpoint(tmp_path / "single"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_float_types(tmp_path: Path, dtype) -> None:
    """Half-precision files read as the float32 values they hold; float64 is rounded once."""
    config = small_config()
    tensors = {name: array.astype(dtype) for name, array in small_tensors(config).items()}
    expected = {name: array.astype(np.float32) for name, array in tensors.items()}
    write_checkpoint(tmp_path / "expected", config, expected.items(), {})
    write_checkpoint(tmp_path / "c", config, expected.items(), {})
    safetensors.numpy.save_file(tensors, tmp_path / "c/model.safetensors")
    assert_same_weights(open_checkpoint(tmp_path / "c"), open_checkpoint(tmp_path / "expected"))


def write_bin(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **options: bool) -> None:
    """Replace the safetensors of `folder` by pytorch_model*.bin."""
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return
    weight_map = {}
    for index in range(shards):
        file_name = f"pytorch_model-{index + 1:05}-of-{shards:05}.bin"
        part = {name: tensors[name] for name in list(tensors)[index::shards]}
        torch.save(part, folder / file_name, **options)
        weight_map.update(dict.fromkeys(part, file_name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zip_form", [True, False], ids=["zip", "older"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_bin(tmp_path: Path, shards: int, zip_form: bool, dtype: torch.dtype) -> None:
    config = small_config("row")
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in small_tensors(config).items()}
    expected = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "expected", config, expected.items(), {})
    write_checkpoint(tmp_path / "c", config, expected.items(), {})
    write_bin(tmp_path / "c", tensors, shards, _use_new_zipfile_serialization=zip_form)
    assert_same_weights(open_checkpoint(tmp_path / "c"), open_checkpoint(tmp_path / "expected"))


def test_safetensors_go_before_bin(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config())
    (tmp_path / "c/pytorch_model.bin").write_bytes(b"never opened")
    open_checkpoint(tmp_path / "c").tensor("model.norm.weight")


@pytest.mark.parametrize("stored", [True, False])
def test_tied_head_is_the_embedding(tmp_path: Path, stored: bool) -> None:
    config = small_config(tie_word_embeddings=True)
    tensors = small_checkpoint(tmp_path / "c", config)
    if stored:
        extra = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
        safetensors.numpy.save_file(extra, tmp_path / "c/model.safetensors")
    head = open_checkpoint(tmp_path / "c").tensor("lm_head.weight")
    np.testing.assert_array_equal(head, tensors["model.embed_tokens.weight"])


def test_rope_tables_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    tensors = small_checkpoint(tmp_path / "c", small_config())
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(2)}
    safetensors.numpy.save_file(tensors | tables, tmp_path / "c/model.safetensors")
    assert open_checkpoint(tmp_path / "c").config == small_config()

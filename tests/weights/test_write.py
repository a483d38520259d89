"""What is written is read by the official libraries, and a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import json
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from support.checkpoints import PATTERNS, small_checkpoint, small_config, small_tensors
from support.errors import raises_line
from transformers import LlamaForCausalLM

from fbiedge import weights as weights_module
from fbiedge.errors import CheckpointError, OutputError
from fbiedge.weights import expected_shapes, open_checkpoint, write_checkpoint


def test_exact_bytes_of_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weights_module._write_safetensors(
        path, {"a": np.array([[1.0, -2.0]], np.float32), "b": np.array([0.5], np.float16)}
    )
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("0000803f 000000c0 0038")
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("pattern", PATTERNS)
def test_official_names_and_shapes(tmp_path: Path, pattern) -> None:
    small_checkpoint(tmp_path / "c", small_config(pattern))
    stored = safetensors.numpy.load_file(tmp_path / "c/model.safetensors")
    projections = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                   "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    parts = {"none": ["weight"], "block": ["weight", "wscale"]}.get(pattern, ["weight", "wscale", "wbias"])
    assert set(stored) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{norm}_layernorm.weight" for i in range(2) for norm in ("input", "post_attention")),
        *(f"model.layers.{i}.{linear}.{part}" for i in range(2) for linear in projections for part in parts),
    }
    if pattern != "none":
        shape = {"column": (1, 72), "row": (24, 1), "single": (1,), "block": (24, 1)}[pattern]
        assert stored["model.layers.0.self_attn.k_proj.wscale"].shape == shape  # N = 2 heads of 12, K = 72


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
def test_transformers_loads_the_folder(tmp_path: Path, shard_bytes: int) -> None:
    config = small_config("none")
    tensors = small_checkpoint(tmp_path / "c", config, shard_bytes=shard_bytes)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name])
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta


def test_bfloat16_is_written_as_such(tmp_path: Path) -> None:
    config = small_config()
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in small_tensors(config).items()}
    write_checkpoint(tmp_path / "c", config, tensors.items(), {})
    stored = safetensors.torch.load_file(tmp_path / "c/model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16
        np.testing.assert_array_equal(tensor.float().numpy(), tensors[name].astype(np.float32))


def test_arrays_that_are_not_contiguous(tmp_path: Path) -> None:
    config = small_config("none")
    tensors = {name: np.asfortranarray(array) for name, array in small_tensors(config).items()}
    write_checkpoint(tmp_path / "c", config, tensors.items(), {})
    stored = safetensors.numpy.load_file(tmp_path / "c/model.safetensors")
    np.testing.assert_array_equal(stored["lm_head.weight"], tensors["lm_head.weight"])


def test_shards_and_index_agree(tmp_path: Path) -> None:
    tensors = small_checkpoint(tmp_path / "c", small_config(), shard_bytes=60_000)
    index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    shards = sorted((tmp_path / "c").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    held = {name: shard.name for shard in shards for name in safetensors.numpy.load_file(shard)}
    assert held == index["weight_map"]
    for shard in shards:
        stored = safetensors.numpy.load_file(shard)
        assert len(stored) == 1 or sum(array.nbytes for array in stored.values()) <= 60_000
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted(
        ["config.json", "model.safetensors.index.json", *(shard.name for shard in shards)]
    )


def test_one_shard_in_memory(tmp_path: Path) -> None:
    """The stream is consumed as it is written: the peak is a shard and a tensor, not the 6 MB checkpoint."""
    config = small_config("none", hidden_size=256, head_dim=64, num_attention_heads=4, num_hidden_layers=4,
                          intermediate_size=256)  # fmt: skip
    largest, shard_bytes = 256 * 256 * 4, 1 << 20

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in expected_shapes(config).items():
            yield name, np.ones(shape, np.float32)

    tracemalloc.start()
    write_checkpoint(tmp_path / "c", config, stream(), {}, shard_bytes=shard_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total > 5 * shard_bytes
    assert peak < shard_bytes + 2 * largest


def test_files_travel_along(tmp_path: Path) -> None:
    config = small_config()
    write_checkpoint(tmp_path / "c", config, small_tensors(config).items(), {"a.txt": "é", "b.bin": b"\xff\x00"})
    assert (tmp_path / "c/a.txt").read_bytes() == "é".encode()
    assert (tmp_path / "c/b.bin").read_bytes() == b"\xff\x00"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "without 1 tensor (model.norm.weight)"),
        (lambda tensors: tensors.update({"extra": np.ones(3, np.float32)}), "can't write extra of shape (3,)"),
        (
            lambda tensors: tensors.update({"model.norm.weight": np.ones(3, np.float32)}),
            "model.norm.weight of shape (3,)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_tensors_must_be_those_of_the_config(tmp_path: Path, edit, message: str) -> None:
    with raises_line(CheckpointError, message):
        small_checkpoint(tmp_path / "c", small_config(), edit=edit, shard_bytes=50_000)
    assert not list(tmp_path.iterdir())


def test_a_tensor_twice(tmp_path: Path) -> None:
    tensors = list(small_tensors(small_config()).items())
    with raises_line(CheckpointError, "can't write model.embed_tokens.weight", "or twice"):
        write_checkpoint(tmp_path / "c", small_config(), [tensors[0], *tensors], {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../escaped", "a/b", "/etc/x", ""])
def test_file_names_stay_in_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a plain file name"):
        write_checkpoint(tmp_path / "c", small_config(), [], {name: "x"})
    assert not list(tmp_path.iterdir())


def test_replaces_an_earlier_checkpoint_as_a_whole(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config(), shard_bytes=50_000)
    small_checkpoint(tmp_path / "c", small_config("row"))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["config.json", "model.safetensors"]
    assert open_checkpoint(tmp_path / "c").config.scaling_pattern == "row"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "model.txt", "folder"])
def test_refuses_a_folder_with_other_things(tmp_path: Path, foreign: str) -> None:
    """The folder is replaced as a whole, so `-o ~` must not cost anybody their home."""
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / foreign
    path.mkdir() if foreign == "folder" else path.write_text("precious")
    with raises_line(OutputError, f"holds {foreign}", "choose a new folder"):
        small_checkpoint(tmp_path / "c", small_config())
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == [foreign]


def test_refuses_to_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("precious")
    with raises_line(OutputError, "can't write"):
        small_checkpoint(tmp_path / "c", small_config())
    assert (tmp_path / "c").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """The operating system itself refuses files above 100 kB, part-way through a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 120_000], ids=["single", "later-shard"])
def test_write_that_the_system_refuses_leaves_nothing(tmp_path: Path, small_disk: None, shard_bytes: int) -> None:
    with raises_line(OutputError, "can't write", "File too large", "nothing was left"):
        small_checkpoint(tmp_path / "c", small_config(), shard_bytes=shard_bytes)
    assert not list(tmp_path.iterdir())


def test_disk_full_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_checkpoint(tmp_path / "c", small_config())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights_module, "_write_text", full)  # the last files, when all shards are there already
    with raises_line(OutputError, "No space left on device"):
        small_checkpoint(tmp_path / "c", small_config("row"))
    assert open_checkpoint(tmp_path / "c").config.scaling_pattern == "column"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_interrupted_stream_leaves_nothing(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[str, np.ndarray]]:
        yield from list(small_tensors(small_config()).items())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "c", small_config(), stream(), {}, shard_bytes=1)
    assert not list(tmp_path.iterdir())

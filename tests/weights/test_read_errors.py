"""One test per way for a checkpoint to be wrong: each gives one clear line, most of them before any data is read."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from support.checkpoints import small_checkpoint, small_config
from support.errors import raises_line

from fbiedge.errors import CheckpointError
from fbiedge.weights import open_checkpoint

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that is right until a test damages it."""
    small_checkpoint(tmp_path / "c", small_config())
    return tmp_path / "c"


def edit_tensors(folder: Path, edit) -> None:
    """Change the tensors of model.safetensors in place."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in raw.items() if value != "absent"}))


def edit_header(folder: Path, edit) -> None:
    """Rewrite the header of model.safetensors and leave its data as it is."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_no_such_folder(tmp_path: Path) -> None:
    with raises_line(CheckpointError, "nowhere doesn't exist", "expected a checkpoint folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with raises_line(CheckpointError, "is a file", "expected a checkpoint folder"):
        open_checkpoint(folder / "model.safetensors")


def test_config_is_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    with raises_line(CheckpointError, "config.json is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"], ids=["truncated", "deep", "not-utf8"])
def test_config_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with raises_line(CheckpointError, "config.json is not JSON"):
        open_checkpoint(folder)


def test_config_is_not_an_object(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    with raises_line(CheckpointError, "holds a JSON list, expected an object"):
        open_checkpoint(folder)


def test_norms_of_heads_are_there_where_the_config_says_qwen3_and_only_there(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "llama", small_config())
    small_checkpoint(tmp_path / "qwen3", small_config(model_type="qwen3"))
    contents = {name: (tmp_path / name / "config.json").read_text() for name in ("llama", "qwen3")}
    for name, other in (("llama", "qwen3"), ("qwen3", "llama")):
        (tmp_path / name / "config.json").write_text(contents[other])
    with raises_line(CheckpointError, "lacks 4 tensors", "model.layers.0.self_attn.q_norm.weight"):
        open_checkpoint(tmp_path / "llama")
    with raises_line(CheckpointError, "holds 4 tensors", "k_norm.weight", "a llama of this config.json doesn't have"):
        open_checkpoint(tmp_path / "qwen3")


def test_config_lacks_a_field(folder: Path) -> None:
    edit_config(folder, hidden_size="absent")
    with raises_line(CheckpointError, "'hidden_size' is missing"):
        open_checkpoint(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with raises_line(CheckpointError, "holds no weights", "expected model.safetensors"):
        open_checkpoint(folder)


def test_missing_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: (tensors.pop(f"{UP}.wbias"), tensors.pop("model.norm.weight")))
    with raises_line(CheckpointError, "lacks 2 tensors", f"{UP}.wbias", "model.norm.weight"):
        open_checkpoint(folder)


def test_a_missing_layer(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with raises_line(CheckpointError, "lacks 23 tensors", "model.layers.2.", "…"):
        open_checkpoint(folder)


def test_extra_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.bias": np.zeros(172, np.float32)}))
    with raises_line(CheckpointError, "holds 1 tensor ", f"{UP}.bias"):
        open_checkpoint(folder)


def test_a_layer_too_many(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with raises_line(CheckpointError, "holds 23 tensors", "model.layers.1.", "…"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", f"{UP}.weight", f"{UP}.wbias", "model.norm.weight"])
def test_wrong_shape(folder: Path, name: str) -> None:
    shape = []

    def transpose(tensors) -> None:
        shape.append(tensors[name].shape)
        tensors[name] = np.zeros((3, *shape[0]), np.float32)

    edit_tensors(folder, transpose)
    with raises_line(CheckpointError, name, f"shape {(3, *shape[0])}", f"expected {shape[0]}"):
        open_checkpoint(folder)


def test_k_does_not_match(folder: Path) -> None:
    edit_config(folder, intermediate_size=170)
    with raises_line(CheckpointError, "mlp.gate_proj.weight", "(172, 72)", "(170, 72)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("stated", ["row", "none", "block"])
def test_scales_contradict_config(folder: Path, stated: str) -> None:
    edit_config(folder, scaling_pattern=stated)
    with raises_line(CheckpointError, f"says scaling_pattern '{stated}'", "form 'column'"):
        open_checkpoint(folder)


def test_binary_by_config_but_without_scales(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config("none"))
    edit_config(tmp_path / "c", scaling_pattern="column")
    with raises_line(CheckpointError, "says scaling_pattern 'column'", "form 'none'"):
        open_checkpoint(tmp_path / "c")


def test_unknown_pattern(folder: Path) -> None:
    edit_config(folder, scaling_pattern="diagonal")
    with raises_line(CheckpointError, "scaling_pattern is 'diagonal'", "column, row, single, block"):
        open_checkpoint(folder)


def test_scales_of_mixed_form(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({f"{UP}.wscale": np.ones((172, 1), np.float32)}))
    edit_config(folder, scaling_pattern="absent")
    with raises_line(CheckpointError, f"{UP}.wscale", "(172, 1)", "(1, 72)"):
        open_checkpoint(folder)


def test_scales_of_no_form(folder: Path) -> None:
    def reshape(tensors) -> None:
        for name in tensors:
            if name.endswith(".wscale"):
                tensors[name] = np.ones((2, 2), np.float32)

    edit_tensors(folder, reshape)
    with raises_line(CheckpointError, ".wscale has shape (2, 2)", "(column)", "(row)", "(1,) (single)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 5, 100, -1], ids=["empty", "in-length", "in-header", "in-data"])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with raises_line(CheckpointError, "model.safetensors is truncated or not safetensors"):
        open_checkpoint(folder)


def test_header_lies_about_its_length(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    with raises_line(CheckpointError, "truncated or not safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [71]},
        {"shape": [-72]},
        {"data_offsets": [0, 1 << 50]},
        {"data_offsets": [288, 0]},
        {"dtype": "F7"},
    ],
)
def test_header_lies(folder: Path, lie: dict) -> None:
    edit_header(folder, lambda header: header["model.norm.weight"].update(lie))
    with raises_line(CheckpointError, "truncated or not safetensors"):
        open_checkpoint(folder)


def test_integers_are_no_weights(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(72, np.int32)}))
    with raises_line(CheckpointError, "model.norm.weight has dtype I32", "F32"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["weight", "wscale", "wbias"])
def test_not_finite(folder: Path, part: str, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[f"{UP}.{part}"].reshape(-1).__setitem__(3, value))
    weights = open_checkpoint(folder)
    with raises_line(CheckpointError, f"{UP}.{part} holds NaN or Inf"):
        weights.linear(UP)


def test_not_finite_embedding(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.embed_tokens.weight"].__setitem__((7, 7), np.nan))
    with raises_line(CheckpointError, "model.embed_tokens.weight holds NaN or Inf"):
        open_checkpoint(folder).tensor("model.embed_tokens.weight")


def test_sidecar_is_not_text(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with raises_line(CheckpointError, "can't read", "tokenizer.json"):
        open_checkpoint(folder)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    small_checkpoint(tmp_path / "s", small_config(), shard_bytes=60_000)
    return tmp_path / "s"


def edit_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_missing_shard(sharded: Path) -> None:
    next(sharded.glob("model-00002-*")).unlink()
    with raises_line(CheckpointError, "model-00002-", "is missing; the index lists it"):
        open_checkpoint(sharded)


def test_index_places_a_tensor_wrongly(sharded: Path) -> None:
    first = next(sharded.glob("model-00001-*")).name
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": first}))
    with raises_line(CheckpointError, f"{first} lacks 1 tensor", "lm_head.weight"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    second = next(sharded.glob("model-00002-*"))
    tensors = safetensors.numpy.load_file(second)
    name = "model.embed_tokens.weight"
    safetensors.numpy.save_file(tensors | {name: np.zeros((80, 72), np.float32)}, second)
    with raises_line(CheckpointError, second.name, name, "an earlier shard holds too"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "a/b", 7])
def test_index_points_elsewhere(sharded: Path, target: object) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"lm_head.weight": target}))
    with raises_line(CheckpointError, repr(target), "is not a plain file name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_index_without_weight_map(sharded: Path, content: dict) -> None:
    (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
    with raises_line(CheckpointError, "has no weight_map"):
        open_checkpoint(sharded)


class Malicious:
    """Unpickled without restraint, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "older", "bare-pickle"])
def test_malicious_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, form: str) -> None:
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "was-executed"
    state = {"model.norm.weight": torch.ones(72), "payload": Malicious(trace)}
    if form == "bare-pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"payload": Malicious(trace)}, protocol=2))
    else:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    with raises_line(CheckpointError, "pytorch_model.bin is refused", "more than tensors; get it as safetensors"):
        open_checkpoint(folder)
    assert not trace.exists()


@pytest.mark.parametrize("size", [0, 3, 1000, -100])
def test_truncated_bin(folder: Path, size: int) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.ones(720)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with raises_line(CheckpointError, "pytorch_model.bin"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([torch.ones(3)], "holds a list, expected a state dict"),
        ({"step": 3}, "'step' is not a dense tensor of floats"),
        ({"a": torch.ones(3, dtype=torch.int64)}, "'a' is not a dense tensor of floats"),
        ({"a": torch.ones(3).to_sparse()}, "'a' is not a dense tensor of floats"),
    ],
)
def test_bin_without_a_state_dict(folder: Path, state: object, message: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with raises_line(CheckpointError, message):
        open_checkpoint(folder)


def test_missing_bin_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with raises_line(CheckpointError, "pytorch_model-00001-of-00001.bin is missing"):
        open_checkpoint(folder)


def test_bin_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.replace(folder / "model.safetensors", folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with raises_line(CheckpointError, "needs torch", "pip install 'fbiedge[train]'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("package", ["safetensors", "ml_dtypes"])
def test_safetensors_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with raises_line(CheckpointError, f"needs {package}", "pip install 'fbiedge[export]'"):
        open_checkpoint(folder)

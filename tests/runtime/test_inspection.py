"""What `fbiedge inspect` says, against the files themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.gguf_checkpoints import gguf_checkpoint, gguf_config
from support.tiny_gguf import tiny_gguf
from support.tiny_model import tiny_checkpoint, tiny_model

from fbiedge.errors import CheckpointError, ModelFileError
from fbiedge.exporters.gguf import export_gguf
from fbiedge.inspection import inspect
from fbiedge.tables import print_inspection


def test_groups_add_up_to_the_initializers(plain_model: Path) -> None:
    found = inspect(plain_model)
    tensors = onnx.load(plain_model).graph.initializer
    weights = [tensor for tensor in tensors if not tensor.name.startswith(("constants.", "logits_to_keep"))]
    assert sum(group.bytes for group in found.groups) == sum(onnx.numpy_helper.to_array(t).nbytes for t in weights)
    assert sum(group.tensors for group in found.groups) == len(weights)
    assert found.files == {"model.onnx": plain_model.stat().st_size}
    assert found.properties["scale form"] == "column"


def test_external_data_is_counted(external_model: Path) -> None:
    data = external_model.with_name("model.onnx.data")
    assert inspect(external_model).files == {
        "model.onnx": external_model.stat().st_size,
        "model.onnx.data": data.stat().st_size,
    }


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("pattern", ["column", "row", "single", "block", "none"])
def test_a_checkpoint_has_the_parameters_of_its_export(pattern: str, model_type: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path, pattern=pattern, model_type=model_type)
    exported, checkpoint = inspect(path), inspect(tmp_path / "checkpoint")
    assert checkpoint.kind == "checkpoint"
    assert checkpoint.parameters == exported.parameters
    for name in ("attention", "mlp"):
        ours = next(group for group in checkpoint.groups if group.group == name)
        theirs = next(group for group in exported.groups if group.group == name)
        assert ours.parameters == theirs.parameters
        # The file pads bits to whole tiles; the sum from shapes has no padding, so it can only be smaller.
        assert 0.7 * theirs.bytes <= ours.bytes <= theirs.bytes


def test_a_binary_weight_takes_little_more_than_a_bit(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    groups = {group.group: group for group in inspect(tiny_model(tmp_path, head_dim=32, **sizes)).groups}
    # Column scales: two float32 for each input, shared by N outputs.
    assert groups["mlp"].bits_per_weight == pytest.approx(1 + np.mean([64 / 512, 64 / 512, 64 / 256]))
    assert groups["head"].bits_per_weight == 32


def test_a_gguf_has_the_parameters_of_what_it_was_made_of(tmp_path: Path) -> None:
    """Its FFN of 200 is padded to 256, which are no weights; and its offsets may have been left behind."""
    weights = gguf_checkpoint(tmp_path / "checkpoint", gguf_config())
    export_gguf(weights, tmp_path / "model.gguf")
    found, checkpoint = inspect(tmp_path / "model.gguf"), inspect(tmp_path / "checkpoint")
    assert found.parameters == checkpoint.parameters
    mlp = next(group for group in found.groups if group.group == "mlp")
    assert mlp.bits_per_weight == pytest.approx(1.125 * 256 / 200)
    assert "warning" not in found.properties and "model.beta.gguf" in found.files
    (tmp_path / "model.beta.gguf").unlink()
    warning = inspect(tmp_path / "model.gguf").properties["warning"]
    assert warning == "its offsets (model.beta.gguf beside it) are missing"


def test_a_name_that_talks_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(tiny_gguf(tmp_path, metadata={"general.name": "a\x1b[31mred\nend"}))
    assert found.properties["name"] == r"a\x1b[31mred\nend"
    print_inspection(found)
    assert r"a\x1b[31mred\nend" in capsys.readouterr().out


def test_unusable_inventory(plain_model: Path, tmp_path: Path) -> None:
    model = onnx.load(plain_model)
    path = tmp_path / "model.onnx"
    for value, message in [
        ("{", "unreadable JSON"),
        ('[{"group": "x"}]', "unusable"),
        ('["x"]', "unusable"),
        ("5", "unusable"),
    ]:
        next(entry for entry in model.metadata_props if entry.key == "fbiedge.inventory").value = value
        onnx.save(model, path)
        with pytest.raises(ModelFileError, match=message):
            inspect(path)


def test_a_broken_checkpoint_is_reported(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "checkpoint")
    tensors = folder / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        inspect(folder)

"""One test for each way in which a model file can be wrong; each gives one line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from support.onnx_llama import OnnxLlama

from fbiedge.errors import ModelFileError
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.ops_library import library_path
from fbiedge.weights import Weights


@pytest.fixture
def embedded(weights: Weights, tmp_path: Path) -> Path:
    return export_onnx(weights, tmp_path / "model.onnx").model


@pytest.fixture
def external(weights: Weights, tmp_path: Path) -> Path:
    return export_onnx(weights, tmp_path / "model.onnx", embed_limit_bytes=0).model


def refused(path: Path, message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        open_onnx(path)
    assert "\n" not in str(caught.value)


def edit(path: Path, change: Callable[[ModelProto], object]) -> Path:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def initializer(model: ModelProto, name: str) -> TensorProto:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return tensor


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "model.onnx", "doesn't exist; expected a model.onnx")


def test_folder(tmp_path: Path) -> None:
    refused(tmp_path, "can't read")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip, perhaps", b"{}", bytes(1000)])
def test_not_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    refused(path, "is not an ONNX file")


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_truncated(share: float, embedded: Path) -> None:
    content = embedded.read_bytes()
    embedded.write_bytes(content[: int(share * len(content))])
    refused(embedded, "is truncated")


def test_somebody_elses_onnx(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [info], [out])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    refused(tmp_path / "model.onnx", "was not written by fbiedge; make one with `fbiedge export`")


def set_metadata(model: ModelProto, key: str, value: str) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == key)
    entry.value = value


def test_later_format_version(embedded: Path) -> None:
    edit(embedded, lambda model: set_metadata(model, "fbiedge.format_version", "2"))
    refused(embedded, "has format version 2, this fbiedge reads 1")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "gpt2"}'])
def test_unusable_config(config: str, embedded: Path) -> None:
    edit(embedded, lambda model: set_metadata(model, "fbiedge.config", config))
    refused(embedded, "unusable metadata fbiedge.config")


def test_k_that_does_not_match(embedded: Path, weights: Weights) -> None:
    def change(model: ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.name == "model.layers.1.mlp.down_proj")
        (attribute,) = (attribute for attribute in node.attribute if attribute.name == "K")
        attribute.i = 170

    edit(embedded, change)
    refused(embedded, "model.layers.1.mlp.down_proj has N, K, scale_form 72, 170, 'column', expected 72, 172, 'column'")
    with pytest.raises(Exception, match="(?s)fbiedge.*170"):  # ONNX Runtime's own class
        OnnxLlama(embedded, weights.config, library_path())


def test_missing_tensor(embedded: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bits"
    edit(embedded, lambda model: model.graph.initializer.remove(initializer(model, name)))
    with pytest.raises(ModelFileError, match=f"lacks the tensor {name}; export it again"):
        open_onnx(embedded).linear("model.layers.0.self_attn.q_proj")


def test_tensor_of_another_shape(embedded: Path) -> None:
    def change(model: ModelProto) -> None:
        tensor = initializer(model, "model.norm.weight")
        tensor.dims[:] = [71]
        tensor.raw_data = np.ones(71, np.float32).tobytes()

    edit(embedded, change)
    with pytest.raises(ModelFileError, match=r"model.norm.weight has shape \(71,\), expected \(72,\)"):
        open_onnx(embedded).tensor("model.norm.weight")


def test_tensor_shorter_than_its_shape(embedded: Path) -> None:
    def change(model: ModelProto) -> None:
        tensor = initializer(model, "model.norm.weight")
        tensor.raw_data = tensor.raw_data[:-4]

    edit(embedded, change)
    refused(embedded, r"model.norm.weight holds 284 bytes, expected 288")


def test_external_data_missing(external: Path) -> None:
    external.with_name("model.onnx.data").unlink()
    refused(external, "needs model.onnx.data beside it")


def test_external_data_truncated(external: Path) -> None:
    data = external.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1])
    refused(external, "is truncated: copy it again")


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/passwd", ""])
def test_external_data_elsewhere(location: str, external: Path) -> None:
    def change(model: ModelProto) -> None:
        for entry in initializer(model, "model.embed_tokens.weight").external_data:
            if entry.key == "location":
                entry.value = location

    edit(external, change)
    refused(external, "expected a file beside the model")


@pytest.mark.parametrize("offset", ["-4096", "many"])
def test_external_data_at_no_place(offset: str, external: Path) -> None:
    def change(model: ModelProto) -> None:
        for entry in initializer(model, "model.embed_tokens.weight").external_data:
            if entry.key == "offset":
                entry.value = offset

    edit(external, change)
    refused(external, "offset")


@pytest.mark.parametrize("what", ["location", "self_attn.o_proj.bits", "fbiedge.config"])
def test_text_that_is_not_utf8(what: str, weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(weights, path, embed_limit_bytes=0)
    content = path.read_bytes()
    assert what.encode() in content
    path.write_bytes(content.replace(what.encode(), b"\xff" + what.encode()[1:]))
    refused(path, "is damaged: it holds text that is not UTF-8; export it again")

"""An embedding of 8 or 4 bits: the head's arithmetic, exact lookups, stored once where tied, and the way through files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.bundled import MODEL, PROMPT
from support.checkpoints import small_config
from support.gguf_checkpoints import IDS as GGUF_IDS
from support.gguf_checkpoints import gguf_checkpoint, gguf_config
from support.onnx_llama import OnnxLlama

from fbiedge import cli
from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, ModelFileError
from fbiedge.exporters.gguf import export_gguf
from fbiedge.exporters.gguf.reader import open_gguf
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.exporters.onnx.embedding import quantized_rows, tiled_rows
from fbiedge.exporters.onnx.head import HasQuantizedRows, quantize_rows
from fbiedge.exporters.onnx.nodes import Nodes
from fbiedge.inspection import inspect
from fbiedge.ops_library import library_path
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.weights import Weights

MakeWeights = Callable[[ModelConfig], Weights]
BITS = {"int8": 8, "int4": 4}
IDS = [3, 79, 4, 0, 15, 16, 31]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FORMS: dict[str, dict[str, Any]] = {
    "library": {},
    "bodies": {},
    "stock 4": {"operators": "stock"},
    "stock 1": {"operators": "stock", "stock_bits": 1},
}


@pytest.mark.parametrize("layout", ["packed", "stock", "tiles"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [7, 32, 100, 128, 172])
def test_rows_are_looked_up_exactly(k: int, bits: int, layout: str) -> None:
    """Every token of a vocabulary that fills no whole row of tiles, in a batch; scales of any size and sign."""
    rng = np.random.default_rng(k)
    weight = (rng.normal(size=(37, k)) * 10.0 ** rng.integers(-8, 5, (37, 1))).astype(np.float32)
    weight[5] = 0
    rows, nodes = quantize_rows(weight, bits), Nodes()
    if layout == "tiles":
        tensors = {"matrix.tiles": rows.tiles()}
        tiled_rows(nodes, "rows", "ids", "matrix.tiles", bits=bits, k=k)
    else:
        codes, flat = rows.stock()
        tensors = {"matrix.codes": codes, "matrix.scales": flat if layout == "stock" else rows.scales}
        quantized_rows(nodes, "rows", "ids", "matrix", bits=bits, k=k, flat=layout == "stock")
    graph = helper.make_graph(
        nodes.nodes,
        "rows",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)],
        [*nodes.constants, *(numpy_helper.from_array(array, name) for name, array in tensors.items())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.stack([np.arange(37), np.arange(37)[::-1]])
    (got,) = session.run(None, {"ids": ids})
    np.testing.assert_array_equal(got, rows.dequantize(k)[ids])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("embedding", BITS)
def test_a_model_computes_with_the_rows_that_are_read_back(
    embedding: Any, tied: bool, form: str, make_weights: MakeWeights, tmp_path: Path
) -> None:
    """In our operators, in their bodies of stock ones, and in a file of stock ones; read back, it is the same file again."""
    weights = make_weights(small_config(head_dim=16, tie_word_embeddings=tied))
    path, again = tmp_path / "model.onnx", tmp_path / "again.onnx"
    options: dict[str, Any] = {"accuracy_level": "fp32", "kv_cache": "fp32", "head": embedding, **FORMS[form]}
    export_onnx(weights, path, embedding=embedding, **options)
    back = open_onnx(path)
    hidden = weights.config.hidden_size
    for name in (EMBEDDING, HEAD):
        rounded = quantize_rows(weights.tensor(name), BITS[embedding]).dequantize(hidden)
        np.testing.assert_array_equal(back.tensor(name), rounded)
    library = library_path() if form == "library" else None
    reference, model = Reference(back), OnnxLlama(path, weights.config, library)
    for ids in (IDS, [5], [79]):
        expected = reference.logits(ids)
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    export_onnx(back, again, embedding=embedding, **options)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("operators", ["fbiedge", "stock"])
@pytest.mark.parametrize("embedding", BITS)
def test_a_tied_embedding_of_the_heads_form_is_stored_once(
    embedding: Any, operators: Any, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights = make_weights(small_config(head_dim=16, hidden_size=64, tie_word_embeddings=True))
    sizes = {}
    for head in BITS:
        path = tmp_path / f"{head}.onnx"
        report = export_onnx(weights, path, embedding=embedding, head=head, operators=operators)  # type: ignore[arg-type]
        rows = {row["group"]: row for row in report.inventory}
        assert ("embedding" in rows) is (head != embedding)
        assert rows["head"]["form"] == f"{head} block 32" + (", and the embedding" if head == embedding else "")
        assert {group.group: group.form for group in inspect(path).groups} == {
            name: rows[name]["form"] for name in rows
        }
        if head != embedding:
            scales = 80 * 64 // 32
            assert rows["embedding"]["form"] == f"{embedding} block 32"
            assert rows["embedding"]["bytes"] == 80 * 64 * BITS[embedding] // 8 + 2 * scales
        sizes[head] = {tensor.name for tensor in onnx.load(path).graph.initializer}
    ((_, other),) = ((head, names) for head, names in sizes.items() if head != embedding)
    assert other - sizes[embedding] == {"model.embed_tokens.codes", "model.embed_tokens.scales"} | (
        set() if operators == "fbiedge" else other - sizes[embedding]
    )


@pytest.mark.parametrize("embedding", BITS)
def test_what_is_quantised_is_copied_and_never_rounded_twice(
    embedding: Any, make_weights: MakeWeights, tmp_path: Path
) -> None:
    weights = make_weights(small_config(head_dim=16))
    export_onnx(weights, tmp_path / "first.onnx", embedding=embedding, head="fp32")
    first = open_onnx(tmp_path / "first.onnx")
    assert isinstance(first, HasQuantizedRows)
    rows = first.quantized_embedding(BITS[embedding])
    expected = quantize_rows(weights.tensor(EMBEDDING), BITS[embedding])
    assert rows is not None and np.array_equal(rows.codes, expected.codes)
    assert np.array_equal(rows.scales, expected.scales)
    assert first.quantized_embedding(12 - BITS[embedding]) is None and first.quantized_head(8) is None
    export_onnx(first, tmp_path / "second.onnx", embedding="fp32", head="fp32")
    np.testing.assert_array_equal(open_onnx(tmp_path / "second.onnx").tensor(EMBEDDING), first.tensor(EMBEDDING))


@pytest.mark.parametrize("embedding", BITS)
def test_the_bundled_model_goes_on_as_before(
    embedding: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command; the loss that it prints is of the embedding alone, and small."""
    path = tmp_path / "model.onnx"
    assert cli.run(["export", str(MODEL), "--embedding", embedding, "-o", str(path)]) == 0
    assert f"{embedding} block 32" in capsys.readouterr().out
    got, expected = (Session.open(file).all_logits(range(3, 60)) for file in (path, MODEL))
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < (0.02 if embedding == "int8" else 0.2)
    assert cli.run(["generate", str(path), "--prompt", PROMPT, "--temperature", "0", "--max-tokens", "8"]) == 0
    assert len(capsys.readouterr().out.split()) > 4


def test_rows_of_8_bits_are_those_of_q8_0(tmp_path: Path) -> None:
    """From the checkpoint as by way of the ONNX file: GGUF's blocks are the same 32 inputs with one fp16 scale."""
    weights = gguf_checkpoint(tmp_path / "in", gguf_config("block"))
    export_onnx(weights, tmp_path / "model.onnx", embedding="int8", head="int8")
    by_onnx = open_onnx(tmp_path / "model.onnx")
    for source, name in ((weights, "direct"), (by_onnx, "by_onnx")):
        export_gguf(source, tmp_path / f"{name}.gguf", embedding="q8_0", head="q8_0", verify_ids=GGUF_IDS)
        stored = open_gguf(tmp_path / f"{name}.gguf")
        for tensor in (EMBEDDING, HEAD):
            np.testing.assert_array_equal(stored.tensor(tensor), by_onnx.tensor(tensor))
    export_onnx(open_gguf(tmp_path / "direct.gguf"), tmp_path / "back.onnx", embedding="int8", head="int8")
    np.testing.assert_array_equal(open_onnx(tmp_path / "back.onnx").tensor(EMBEDDING), by_onnx.tensor(EMBEDDING))


def test_weights_beyond_fp16_scales_are_refused(make_weights: MakeWeights, tmp_path: Path) -> None:
    weights = make_weights(small_config(head_dim=16))

    class Large:
        config, files, linear = weights.config, weights.files, weights.linear

        def tensor(self, name: str) -> np.ndarray:
            return weights.tensor(name) * np.float32(1e9 if name == EMBEDDING else 1)

    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is too large for fp16 scales; choose fp32"):
        export_onnx(Large(), tmp_path / "model.onnx", embedding="int4")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("part", "dims", "message"),
    [
        ("codes", [80, 3, 20], r"has shape \(80, 3, 20\), expected \(80, 3, 32\) by its config"),
        ("codes", [80, 96], r"has shape \(80, 96\), expected \(80, 3, 32\) by its config"),
        ("scales", [240], r"has shape \(240,\), expected \(80, 3\) by its config"),
        ("scales", None, "lacks the tensor model.embed_tokens.scales; export it again"),
        ("scales", [], "model.embed_tokens.scales holds NaN or Inf; it is damaged"),
    ],
)
def test_damaged_rows(
    part: str, dims: list[int] | None, message: str, make_weights: MakeWeights, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(make_weights(small_config(head_dim=16)), path, embedding="int8")
    model = onnx.load(path)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == f"model.embed_tokens.{part}")
    if dims is None:
        tensor.name = "else"
    elif dims:
        del tensor.dims[:]
        tensor.dims.extend(dims)
        width = 2 if part == "scales" else 1
        tensor.raw_data = bytes(int(np.prod(dims)) * width)
    else:
        tensor.raw_data = np.full(240, np.nan, np.float16).tobytes()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelFileError, match=message) as caught:
        open_onnx(path).tensor(EMBEDDING)
    assert "\n" not in str(caught.value)


def test_inspect_says_what_it_is(make_weights: MakeWeights, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(make_weights(small_config(head_dim=16, hidden_size=64)), path, embedding="int4")
    (group,) = (group for group in inspect(path).groups if group.group == "embedding")
    assert (group.form, group.bits_per_weight, group.parameters) == ("int4 block 32", 4.5, 80 * 64)
    assert json.loads(json.dumps(inspect(path).to_dict()))["groups"][0]["form"] == "int4 block 32"

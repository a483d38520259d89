"""open_gguf gives back the weights that a GGUF file holds: of anybody's file, and what our own export was made of."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import PATTERNS, dense, small_config
from support.errors import raises_line
from support.gguf_checkpoints import gguf_checkpoint, gguf_config
from support.gguf_files import Blocks, write_gguf
from support.gguf_models import as_q1_0, dense_tensors, model_metadata, model_tensors, write_model
from support.vocabularies import sentence_piece_metadata

from fbiedge.errors import ModelFileError
from fbiedge.exporters.gguf import export_gguf, open_gguf
from fbiedge.exporters.gguf.reader import GgufWeights
from fbiedge.gguf_model import gguf_name
from fbiedge.llama_cpp_session import LlamaCppSession
from fbiedge.reference import Reference
from fbiedge.rope import RopeScaling
from fbiedge.weights import BinaryLinear, Weights, expected_shapes

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
QWEN = {**SIZES, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
YARN = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def assert_holds(weights: Weights, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        found = dense(weights, name.removesuffix(".weight")) if "_proj" in name else weights.tensor(name)
        np.testing.assert_array_equal(found, values, err_msg=name)


@pytest.mark.parametrize("changes", [SIZES, QWEN])
@pytest.mark.parametrize("pattern", ["block", "none"])
def test_weights_of_anybodys_file(pattern: Any, changes: dict[str, Any], path: Path) -> None:
    config = small_config(pattern, **changes)
    expected = write_model(path, config)
    weights = open_gguf(path)
    assert weights.config == config
    assert weights.paths == {path}
    assert_holds(weights, expected)
    linear = weights.linear("model.layers.1.mlp.down_proj")
    assert isinstance(linear, BinaryLinear) == (pattern == "block")
    if isinstance(linear, BinaryLinear):
        assert (linear.pattern, linear.beta, linear.zeros, linear.alpha.shape) == ("block", None, 0, (128, 2))
        alpha, beta = weights.scales("model.layers.1.mlp.down_proj")
        assert beta is None
        np.testing.assert_array_equal(alpha, linear.alpha)


@pytest.mark.parametrize(
    "changes",
    [
        SIZES,
        QWEN,
        {**SIZES, "rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
        {**SIZES, "rope_scaling": RopeScaling(rope_type="factors", factors=tuple(np.linspace(1, 8, 8).tolist()))},
        {**QWEN, "rope_scaling": YARN, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    ],
)
def test_logits_are_those_of_llama_cpp(changes: dict[str, Any], path: Path) -> None:
    """In float32 on both sides, so that nothing but the architecture decides."""
    write_model(path, small_config("none", **changes))
    theirs = LlamaCppSession.open(path, threads=1).all_logits(IDS)
    ours = Reference(open_gguf(path)).logits(IDS)
    scale = np.abs(theirs).max()
    # llama.cpp keeps keys and values in fp16. Without the right scaling of RoPE the difference is 0.5 and more.
    np.testing.assert_allclose(ours, theirs, atol=3e-3 * scale)
    assert np.abs(ours - theirs).mean() < 5e-4 * scale


@pytest.mark.parametrize("changes", [SIZES, QWEN])
def test_logits_of_a_1_bit_model_are_close_to_those_of_llama_cpp(changes: dict[str, Any], path: Path) -> None:
    """llama.cpp multiplies Q1_0 with activations of 8 bits."""
    write_model(path, small_config("block", **changes))
    theirs = LlamaCppSession.open(path, threads=1).all_logits(IDS)
    ours = Reference(open_gguf(path)).logits(IDS)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9995


@pytest.mark.parametrize("ggml_type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_other_types_are_dequantised(ggml_type: str, path: Path) -> None:
    config = small_config("block", **SIZES)
    kind = gguf.GGMLQuantizationType[ggml_type]
    expected = dense_tensors(config)
    tensors = model_tensors(config, expected)
    for name, stored in (("lm_head.weight", "output.weight"), ("model.embed_tokens.weight", "token_embd.weight")):
        quantised = gguf.quants.quantize(expected[name], kind)
        tensors[stored] = Blocks(ggml_type, quantised)
        expected[name] = gguf.quants.dequantize(quantised, kind)
    write_gguf(path, model_metadata(config), tensors)
    weights = open_gguf(path)
    assert weights.binary_head() is None and weights.binary_embedding() is None
    assert_holds(weights, expected)


@pytest.mark.parametrize("changes", [SIZES, QWEN])
def test_binary_embedding_and_head(changes: dict[str, Any], path: Path) -> None:
    config = small_config("block", **changes)
    expected = dense_tensors(config)
    tensors = model_tensors(config, expected)
    for name, stored in (("lm_head.weight", "output.weight"), ("model.embed_tokens.weight", "token_embd.weight")):
        if name in expected:
            expected[name] = np.where(expected[name] >= 0, 0.5, -0.5).astype(np.float32)
            tensors[stored] = as_q1_0(expected[name])
    write_gguf(path, model_metadata(config), tensors)
    weights = open_gguf(path)
    assert_holds(weights, expected)
    embedding, head = weights.binary_embedding(), weights.binary_head()
    assert embedding is not None and head is not None
    np.testing.assert_array_equal(embedding.dense(), weights.tensor("model.embed_tokens.weight"))
    np.testing.assert_array_equal(head.dense(), weights.tensor("lm_head.weight"))
    assert (head.pattern, head.n, head.k) == ("block", config.vocab_size, 128)


def test_bits_are_never_unpacked(path: Path) -> None:
    """A linear costs its packed bits a few times over, not a float or a byte a weight."""
    config = small_config("block", **{**SIZES, "intermediate_size": 8192, "num_hidden_layers": 1})
    tensors = model_tensors(config, {})
    generator = np.random.default_rng(0)
    for name, shape in expected_shapes(replace(config, scaling_pattern="none")).items():
        rows = generator.integers(0, 60, (shape[0], shape[-1] // 128 * 18), np.uint8)  # d small, bits anyhow
        tensors[gguf_name(name)] = Blocks("Q1_0", rows) if "_proj" in name else np.ones(shape, np.float32)
    write_gguf(path, model_metadata(config), tensors)
    weights = open_gguf(path)
    tracemalloc.start()
    linear = weights.linear("model.layers.0.mlp.up_proj")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(linear, BinaryLinear)
    assert peak < 4 * linear.packed.nbytes


def test_tokenizer_and_template_come_along(path: Path) -> None:
    vocabulary = sentence_piece_metadata({"tokenizer.chat_template": "{{ messages }}"})
    config = small_config("block", **SIZES, vocab_size=len(vocabulary["tokenizer.ggml.tokens"]))
    write_model(path, config, vocabulary)
    files = open_gguf(path).files
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}


def exported(folder: Path, pattern: Any, **changes: Any) -> tuple[Weights, GgufWeights]:
    """A checkpoint that exports exactly, and what comes back of its GGUF."""

    def to_fp16(tensors: dict[str, np.ndarray]) -> None:
        """Of all but `column` the scales have their own place in the file, in fp16."""
        for name, tensor in tensors.items():
            if "wscale" in name and pattern != "column":
                tensors[name] = tensor.astype(np.float16).astype(np.float32)

    weights = gguf_checkpoint(folder / "checkpoint", gguf_config(pattern, **changes), edit=to_fp16)
    report = export_gguf(weights, folder / "model.gguf", embedding="f32", head="f32")
    assert report.exact
    return weights, open_gguf(folder / "model.gguf")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_our_own_export_comes_back(pattern: str, tmp_path: Path) -> None:
    weights, back = exported(tmp_path, pattern)
    assert back.config == replace(weights.config, scaling_pattern="row" if pattern == "single" else pattern)
    has_beta = pattern in ("column", "row", "single")
    assert {path.name for path in back.paths} == {"model.gguf"} | ({"model.beta.gguf"} if has_beta else set())
    expected, found = Reference(weights).logits(IDS), Reference(back).logits(IDS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_our_export_of_columns_comes_back_with_its_scales_where_they_were(tmp_path: Path) -> None:
    weights, back = exported(tmp_path, "column")
    for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "mlp.up_proj"):
        ours, theirs = back.linear(f"model.layers.1.{name}"), weights.linear(f"model.layers.1.{name}")
        assert isinstance(ours, BinaryLinear) and isinstance(theirs, BinaryLinear)
        flipped = np.packbits(theirs.alpha < 0, bitorder="little")
        np.testing.assert_array_equal(ours.packed, theirs.packed ^ flipped)
        if name in ("self_attn.o_proj", "mlp.down_proj"):
            np.testing.assert_allclose(ours.alpha, np.abs(theirs.alpha), rtol=1e-6)
            np.testing.assert_allclose(ours.beta, theirs.beta, rtol=1e-5, atol=1e-7)
        else:
            assert (ours.alpha == 1).all()


def test_offsets_of_zero_are_an_adapter_too(tmp_path: Path) -> None:
    """So that a missing adapter is always a mistake."""

    def without_offsets(tensors: dict[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            if "wbias" in name:
                tensor[:] = 0

    weights = gguf_checkpoint(tmp_path / "checkpoint", gguf_config("column"), edit=without_offsets)
    assert export_gguf(weights, tmp_path / "model.gguf").adapter == tmp_path / "model.beta.gguf"
    assert open_gguf(tmp_path / "model.gguf").config.scaling_pattern == "column"


def test_our_export_of_a_qwen_comes_back(tmp_path: Path) -> None:
    weights, back = exported(tmp_path, "column", model_type="qwen3", tie_word_embeddings=True)
    expected, found = Reference(weights).logits(IDS), Reference(back).logits(IDS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_model_that_was_read_can_be_written_again(tmp_path: Path) -> None:
    _, back = exported(tmp_path, "block")
    export_gguf(back, tmp_path / "again.gguf", embedding="f32", head="f32")
    again = open_gguf(tmp_path / "again.gguf")
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        np.testing.assert_array_equal(dense(again, name), dense(back, name))


def test_the_writer_and_the_reader_agree_where_the_adapter_lies(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "checkpoint", gguf_config("row"))
    report = export_gguf(weights, tmp_path / "UP.GGUF", embedding="f32", head="f32")
    assert report.adapter == tmp_path / "UP.beta.gguf"
    assert open_gguf(tmp_path / "UP.GGUF").config.scaling_pattern == "row"
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "model.gguf"
    try:
        link.symlink_to(tmp_path / "UP.GGUF")
    except OSError as error:
        pytest.skip(f"no symbolic links here: {error}")
    adapter = export_gguf(weights, link, embedding="f32", head="f32").adapter
    assert adapter == tmp_path / "UP.beta.gguf" and adapter in open_gguf(link).paths
    # As in the cache of Hugging Face: links whose targets have hashes for names.
    for name, blob in (("UP.GGUF", "aaa"), ("UP.beta.gguf", "bbb")):
        file = (tmp_path / name).rename(tmp_path / blob)
        (tmp_path / "links" / name).symlink_to(file)
    assert open_gguf(tmp_path / "links" / "UP.GGUF").config.scaling_pattern == "row"
    (tmp_path / "links" / "UP.beta.gguf").unlink()
    with raises_line(ModelFileError, "its offsets (UP.beta.gguf beside it) are missing"):
        open_gguf(tmp_path / "links" / "UP.GGUF")

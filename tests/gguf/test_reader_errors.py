"""One test for each way in which a sound GGUF file can hold no model of ours; each gives one line that names the part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import small_config
from support.errors import raises_line
from support.gguf_files import Blocks, write_gguf
from support.gguf_models import model_metadata, model_tensors
from support.vocabularies import sentence_piece_metadata

from fbiedge.errors import ModelFileError
from fbiedge.exporters.gguf import open_gguf
from fbiedge.gguf_model import open_gguf_model
from fbiedge.tokenizer import Tokenizer

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 16}
SHA = "0123" * 16
UP, V = "blk.0.ffn_up.weight", "blk.0.attn_v.weight"

Edit = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def written(path: Path, edit: Edit = lambda metadata, tensors: None, pattern: Any = "block", **changes: Any) -> Path:
    """A model whose metadata and tensors were changed in place before it was written."""
    config = small_config(pattern, **(SIZES | changes))
    metadata, tensors = model_metadata(config), model_tensors(config)
    edit(metadata, tensors)
    return write_gguf(path, metadata, tensors)


def refused(path: Path, *parts: str) -> None:
    with raises_line(ModelFileError, str(path), *parts):
        open_gguf(path)


def zeros(ggml_type: str, n: int, k: int) -> Blocks:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[ggml_type]]
    return Blocks(ggml_type, np.zeros((n, k // block * size), np.uint8))


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda m, t: t.pop(UP), (f"lacks the tensor {UP}",)),
        (lambda m, t: t.pop("output_norm.weight"), ("lacks the tensor output_norm.weight",)),
        (lambda m, t: t.update({UP: zeros("Q1_0", 128, 128)}), (f"{UP} has shape (128, 128), expected (256, 128)",)),
        (lambda m, t: t.update({UP: zeros("Q8_0", 256, 128)}), (f"{UP} has type Q8_0, expected Q1_0",)),
        (lambda m, t: t.update({UP: np.ones((256, 128), np.float32)}), (f"{UP} has type F32, expected Q1_0",)),
        (lambda m, t: t.update({"token_embd.weight": zeros("Q5_0", 80, 128)}), ("token_embd.weight has type Q5_0", "Q6_K")),
        (lambda m, t: t.update({"blk.0.attn_q.bias": np.ones(128, np.float32)}), ("blk.0.attn_q.bias", "llama")),
        (lambda m, t: t.update({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}), ("blk.0.attn_q_norm.weight",)),
        (lambda m, t: m.update({"split.count": 3}), ("one of 3 parts",)),
        (lambda m, t: m.update({"llama.block_count": 3}), ("lacks the tensor blk.2.",)),
        (lambda m, t: m.update({"fbiedge.feed_forward_length": 128}), ("fbiedge.feed_forward_length is 128", "256")),
        (lambda m, t: m.update({"fbiedge.feed_forward_length": 257}), ("fbiedge.feed_forward_length is 257",)),
        (lambda m, t: m.update(sentence_piece_metadata()), ("tokens, but token_embd.weight has 80 rows",)),
        (lambda m, t: m.pop("tokenizer.ggml.model"), ("no tokenizer",)),
        (lambda m, t: m.update({"general.architecture": "bert"}), ("architecture 'bert'", "llama, qwen3")),
    ],
)  # fmt: skip
def test_refused_before_any_data_is_read(edit: Edit, parts: tuple[str, ...], path: Path) -> None:
    refused(written(path, edit), *parts)


@pytest.mark.parametrize("ggml_type", ["TQ2_0", "Q4_K"])
def test_layers_of_types_that_are_not_read(ggml_type: str, path: Path) -> None:
    tensors = {UP: zeros(ggml_type, 256, 256)}
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 2}
    refused(written(path, lambda m, t: t.update(tensors), "none", **sizes), f"{UP} has type {ggml_type}", "F32, F16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_numbers(value: float, path: Path) -> None:
    def edit(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors["output_norm.weight"][5] = value
        tensors[UP].data[3, :2] = np.float16(value).reshape(1).view(np.uint8)

    weights = open_gguf(written(path, edit))
    for read, name in ((weights.tensor, "model.norm.weight"), (weights.linear, "model.layers.0.mlp.up_proj")):
        with raises_line(ModelFileError, str(path), "holds NaN or Inf"):
            read(name)


def test_padding_that_is_none(path: Path) -> None:
    weights = open_gguf(written(path, lambda m, t: m.update({"fbiedge.feed_forward_length": 200})))
    with raises_line(ModelFileError, str(path), UP, "beyond the 200 rows"):
        weights.linear("model.layers.0.mlp.up_proj")


def adapted(path: Path, edit: Edit = lambda metadata, tensors: None, exact: bool = True, pattern: str = "row") -> Path:
    """A model with an adapter for one linear, whose metadata and tensors were changed in place."""
    keys = {"fbiedge.weights_sha256": SHA, "fbiedge.exact": exact, "fbiedge.scaling_pattern": pattern}
    written(path, lambda m, t: m.update(keys))
    metadata = {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0,
        "fbiedge.beta_of": SHA,
    }  # fmt: skip
    tensors = {f"{V}.lora_a": np.ones((1, 128), np.float32), f"{V}.lora_b": np.ones((32, 1), np.float32)}
    edit(metadata, tensors)
    write_gguf(path.with_name("model.beta.gguf"), metadata, tensors)
    return path


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda m, t: m.update({"fbiedge.beta_of": "f" * 64}), ("was not made for it", "move it away")),
        (lambda m, t: m.pop("fbiedge.beta_of"), ("was not made for it",)),
        (lambda m, t: m.pop("general.type"), ("no adapter of ours",)),
        (lambda m, t: m.update({"adapter.lora.alpha": 2.0}), ("no adapter of ours",)),
        (lambda m, t: t.pop(f"{V}.lora_b"), (f"{V}.lora_a without {V}.lora_b",)),
        (
            lambda m, t: t.update({"token_embd.weight.lora_a": np.ones((1, 8), np.float32)}),
            ("token_embd.weight.lora_a",),
        ),
        (lambda m, t: t.update({f"{V}.lora_a": np.ones((2, 128), np.float32)}), ("shape (2, 128), expected (1, 128)",)),
    ],
)
def test_unusable_adapter(edit: Edit, parts: tuple[str, ...], path: Path) -> None:
    with raises_line(ModelFileError, "model.beta.gguf", *parts):
        open_gguf(adapted(path, edit))


def test_adapter_that_was_left_behind(path: Path) -> None:
    adapted(path).with_name("model.beta.gguf").unlink()
    refused(path, "its offsets (model.beta.gguf beside it) are missing", "copy them along")


def test_adapter_of_a_lossy_export(path: Path) -> None:
    refused(adapted(path, exact=False), "lossy export", "the checkpoint")


def test_adapter_of_an_unknown_pattern(path: Path) -> None:
    refused(adapted(path, pattern="diagonal"), "'diagonal'", "column, row, single")


@pytest.mark.parametrize("pattern", ["row", "column"])
def test_scales_that_the_pattern_does_not_have(pattern: str, path: Path) -> None:
    def edit(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[f"{V}.lora_a"][0, 3] = 2.0

    weights = open_gguf(adapted(path, edit, pattern=pattern))
    for name in ("attn.v_proj", "attn.o_proj") if pattern == "column" else ("attn.v_proj",):
        with raises_line(ModelFileError, "of no form that this fbiedge holds"):
            weights.linear(f"model.layers.0.self_{name}")


def test_adapter_with_nan(path: Path) -> None:
    def edit(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors[f"{V}.lora_b"][3] = np.nan

    weights = open_gguf(adapted(path, edit))
    with raises_line(ModelFileError, "model.beta.gguf", "holds NaN or Inf"):
        weights.linear("model.layers.0.self_attn.v_proj")


@pytest.mark.parametrize("value", [[1, 2], ["a", "b"], 3, "two\nlines", 0.5, True], ids=str)
def test_values_of_any_type(value: Any, path: Path) -> None:
    """Every key that is read, holding what it shouldn't."""
    vocabulary = sentence_piece_metadata({"tokenizer.chat_template": "{{ messages }}"})
    config = small_config("block", **SIZES, vocab_size=len(vocabulary["tokenizer.ggml.tokens"]))
    metadata, tensors = model_metadata(config) | vocabulary, model_tensors(config)
    optional = """fbiedge.scaling_pattern fbiedge.exact fbiedge.weights_sha256 fbiedge.feed_forward_length split.count
        general.type general.quantized_by general.sampling.top_k llama.expert_count llama.rope.scaling.type
        llama.rope.scaling.factor tokenizer.ggml.padding_token_id tokenizer.ggml.add_bos_token""".split()
    for key in [*metadata, *optional]:
        if key != "general.architecture":
            write_gguf(path, metadata | {key: value}, tensors)
            try:
                open_gguf(path)
                Tokenizer.from_model(open_gguf_model(path)).encode("a")
            except ModelFileError as error:
                assert "\n" not in str(error), str(error)

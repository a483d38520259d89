"""What a GGUF file says of its model: config_from_gguf, and the metadata that chat and generate read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.errors import raises_line
from support.gguf_files import write_gguf
from support.gguf_models import model_metadata, model_tensors
from support.vocabularies import byte_level_metadata, sentence_piece_metadata

from fbiedge.config import ModelConfig
from fbiedge.errors import ModelFileError
from fbiedge.generate import end_tokens
from fbiedge.gguf_file import GgufFile
from fbiedge.gguf_model import config_from_gguf, gguf_name, open_gguf_model
from fbiedge.rope import RopeScaling, rope_frequencies
from fbiedge.tokenizer import Tokenizer
from fbiedge.weights import expected_shapes

QWEN = {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True, "rope_theta": 1e6, "rms_norm_eps": 1e-6}


def small_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 100, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64,
        "scaling_pattern": "block",
    }  # fmt: skip
    return ModelConfig(**(sizes | changes))


def written(path: Path, config: ModelConfig, metadata: dict[str, Any] | None = None, **tensors: np.ndarray) -> GgufFile:
    keys = {key: value for key, value in (model_metadata(config) | (metadata or {})).items() if value is not None}
    return GgufFile.open(write_gguf(path, keys, model_tensors(config) | tensors))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        QWEN,
        {"scaling_pattern": "none", "tie_word_embeddings": True},
        {"rope_scaling": RopeScaling(rope_type="linear", factor=4.0)},
        {"rope_scaling": RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)},
        {"rope_scaling": RopeScaling(rope_type="factors", factors=(1.0, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 8.0))},
    ],
)
def test_config(changes: dict[str, Any], path: Path) -> None:
    config = small_config(**changes)
    assert config_from_gguf(written(path, config)) == config


def test_defaults_are_those_of_llama_cpp(path: Path) -> None:
    absent = ["attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base"]
    config = small_config(num_key_value_heads=8)
    file = written(path, config, {f"llama.{key}": None for key in absent} | {"llama.rope.scaling.factor": 0.0})
    assert config_from_gguf(file) == config


def test_one_number_a_layer(path: Path) -> None:
    config = small_config()
    same = {"llama.attention.head_count_kv": [4, 4], "llama.feed_forward_length": [256, 256]}
    assert config_from_gguf(written(path, config, same)) == config
    with raises_line(ModelFileError, str(path), "llama.feed_forward_length differs between layers"):
        config_from_gguf(written(path, config, {"llama.feed_forward_length": [256, 128]}))


def test_linear_scaling_and_factors_together(path: Path) -> None:
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    file = written(path, small_config(), {"llama.rope.scale_linear": 2.0}, **{"rope_freqs.weight": factors})
    found = config_from_gguf(file)
    expected = rope_frequencies(16, 10000.0, None) / (2 * factors)
    np.testing.assert_allclose(rope_frequencies(16, 10000.0, found.rope_scaling), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        ({"general.architecture": "gemma3"}, ("architecture 'gemma3'", "llama, qwen3")),
        ({"llama.block_count": None}, ("lacks the key llama.block_count",)),
        ({"llama.attention.layer_norm_rms_epsilon": None}, ("lacks the key llama.attention.layer_norm_rms_epsilon",)),
        ({"llama.context_length": "long"}, ("llama.context_length is 'long'",)),
        ({"llama.attention.head_count": 0}, ("llama.attention.head_count is 0",)),
        ({"llama.attention.head_count_kv": 3}, ("num_attention_heads 8 is not a multiple",)),
        ({"llama.attention.value_length": 8}, ("llama.attention.value_length is 8", "16")),
        ({"llama.rope.dimension_count": 8}, ("llama.rope.dimension_count is 8",)),
        ({"llama.rope.freq_base": "x"}, ("llama.rope.freq_base is text",)),
        ({"llama.rope.freq_base": -1.0}, ("rope_theta is -1.0",)),
        ({"llama.expert_count": 8}, ("llama.expert_count is 8",)),
        ({"llama.rope.scaling.type": "longrope"}, ("llama.rope.scaling.type is 'longrope'", "linear or yarn")),
        ({"llama.rope.scaling.attn_factor": 1.25}, ("llama.rope.scaling.attn_factor is 1.25",)),
        ({"fbiedge.feed_forward_length": 0}, ("intermediate_size is 0",)),
    ],
)
def test_unusable_metadata(metadata: dict[str, Any], parts: tuple[str, ...], path: Path) -> None:
    file = written(path, small_config(), metadata)
    with raises_line(ModelFileError, str(path), *parts):
        config_from_gguf(file)


def test_unusable_tensors(path: Path) -> None:
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    for metadata, tensors, parts in [
        ({}, {"rope_freqs.weight": np.ones(5, np.float32)}, ("rope_freqs.weight has shape (5,)", "(8,)")),
        (yarn, {"rope_freqs.weight": np.ones(8, np.float32)}, ("YaRN",)),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, ("rope_factors_long.weight",)),
        ({}, {"token_embd.weight": np.ones(8, np.float32)}, ("token_embd.weight",)),
    ]:
        file = written(path, small_config(), metadata, **tensors)
        with raises_line(ModelFileError, str(path), *parts):
            config_from_gguf(file)


def test_llama_cpp_takes_no_divisors_of_a_qwen(path: Path) -> None:
    file = written(path, small_config(**QWEN), **{"rope_freqs.weight": np.ones(16, np.float32)})
    with raises_line(ModelFileError, str(path), "rope_freqs.weight", "in a llama alone"):
        config_from_gguf(file)


def test_every_tensor_has_a_name() -> None:
    names = expected_shapes(small_config(scaling_pattern="none", **{**QWEN, "tie_word_embeddings": False}))
    assert len({gguf_name(name) for name in names}) == len(names)
    assert gguf_name("model.layers.12.mlp.up_proj.weight") == "blk.12.ffn_up.weight"
    assert gguf_name("lm_head.weight") == "output.weight"


@pytest.mark.parametrize("vocabulary", [sentence_piece_metadata(), byte_level_metadata("qwen2")])
def test_the_model_as_chat_sees_it(vocabulary: dict[str, Any], path: Path) -> None:
    template = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    tokens = vocabulary["tokenizer.ggml.tokens"]
    config = small_config(vocab_size=len(tokens))
    written(path, config, vocabulary | template)
    model = open_gguf_model(path)
    assert model.config.vocab_size == len(tokens)
    assert model.file_bytes == path.stat().st_size
    assert model.metadata["chat_template"] == template["tokenizer.chat_template"]
    assert ModelConfig.from_dict(model.json_object("config")) == model.config
    tokenizer = Tokenizer.from_model(model)
    assert tokenizer.vocab_size == len(tokens)
    ends = {vocabulary["tokenizer.ggml.eos_token_id"], tokens.index("<|end|>")}
    assert end_tokens(model, tokenizer) == ends
    assert json.loads(model.metadata["generation_config"])["bos_token_id"] == vocabulary["tokenizer.ggml.bos_token_id"]


def test_the_tokenizers_fault_names_the_file(path: Path) -> None:
    written(path, small_config(), {"tokenizer.ggml.model": None})
    with raises_line(ModelFileError, str(path), "no tokenizer"):
        open_gguf_model(path)

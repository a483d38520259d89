"""config.json in both spellings, round trip, and one clear line for each value that can't be."""

from __future__ import annotations

import json
import math

import pytest
from support.checkpoints import PATTERNS, small_config
from support.errors import raises_line
from transformers import LlamaConfig, Qwen3Config

from fbiedge.config import PRESETS, ModelConfig, preset
from fbiedge.errors import CheckpointError, UsageError

# As in the authors' configuration of the 130M model: the older spelling, no KV heads, no head size.
OLDER = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def test_older_spelling_is_the_preset() -> None:
    assert ModelConfig.from_dict(OLDER) == preset("130m")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 500000},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_rope_theta(rope: dict) -> None:
    assert ModelConfig.from_dict(OLDER | rope).rope_theta == 5e5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_round_trip_through_json(pattern) -> None:
    config = small_config(pattern, rope_theta=123.0, tie_word_embeddings=True, head_dim=14)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_transformers_reads_the_same() -> None:
    config = small_config(rope_theta=123.0)
    theirs = LlamaConfig(**config.to_dict())
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):  # fmt: skip
        assert getattr(theirs, name) == getattr(config, name), name
    assert theirs.rope_parameters["rope_theta"] == 123.0


def test_transformers_writes_what_is_read() -> None:
    raw = json.loads(LlamaConfig(**OLDER).to_json_string(use_diff=False))
    assert ModelConfig.from_dict(raw) == preset("130m")


def test_a_qwen3_of_transformers_is_read_and_its_heads_are_of_128() -> None:
    config = small_config("none", model_type="qwen3", head_dim=16, tie_word_embeddings=True)
    raw = config.to_dict()
    assert (raw["architectures"], raw["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    theirs = json.loads(Qwen3Config(**raw).to_json_string(use_diff=False))
    assert ModelConfig.from_dict(theirs | {"scaling_pattern": "none"}) == config
    del raw["head_dim"]
    assert ModelConfig.from_dict(raw).head_dim == Qwen3Config(**raw).head_dim == 128


def test_several_end_tokens_and_null_ids() -> None:
    config = ModelConfig.from_dict(OLDER | {"eos_token_id": [7, 8], "bos_token_id": None})
    assert (config.eos_token_id, config.bos_token_id) == (7, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        ({"vocab_size": "many"}, "vocab_size is 'many', expected a positive integer"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected at most 10000"),
        ({"intermediate_size": 2**31}, "intermediate_size is 2147483648, expected at most 2147483647"),
        ({"max_position_embeddings": 10**13}, "max_position_embeddings is 10000000000000, expected at most 2147483647"),
        ({"num_attention_heads": 0}, "config: "),
        ({"num_attention_heads": None}, "config: "),
        ({"hidden_size": []}, "config: "),
        ({"num_key_value_heads": 5}, "num_attention_heads 12 is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"scaling_pattern": "diagonal"}, "scaling_pattern is 'diagonal'"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', expected one of llama, qwen3"),
        ({"model_type": []}, "model_type is [], expected one of llama, qwen3"),
        ({"use_sliding_window": True}, "attention in a sliding window is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window is not supported"),
        ({"hidden_act": "gelu"}, "only Llama and Qwen3 with SwiGLU"),
        ({"attention_bias": True}, "no biases"),
        ({"mlp_bias": True}, "no biases"),
        ({"rope_parameters": "default"}, "config: unusable value"),
        (
            {"rope_parameters": {"rope_theta": 10000.0}, "rope_theta": 5e5},
            "rope_theta is 10000.0 in one place and 500000.0 in another; make them agree",
        ),
        ({"rope_theta": 0}, "rope_theta is 0.0, expected a positive number"),
        ({"rms_norm_eps": "small"}, "config: unusable value"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rope_theta": math.inf}, "rope_theta is inf"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": 10**400}, "config: unusable value"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": []}, "config: unusable value"),
        ({"bos_token_id": -1}, "bos_token_id is -1, expected a token id"),
    ],
)
def test_values_that_cannot_be(change: dict, message: str) -> None:
    with raises_line(CheckpointError, message):
        ModelConfig.from_dict(OLDER | change)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers"])
def test_missing_fields(name: str) -> None:
    with raises_line(CheckpointError, f"the field '{name}' is missing"):
        ModelConfig.from_dict({key: value for key, value in OLDER.items() if key != name})


def test_unknown_preset_lists_the_known() -> None:
    with raises_line(UsageError, "unknown preset '2b'", ", ".join(PRESETS)):
        preset("2b")

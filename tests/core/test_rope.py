"""RoPE scaling: Hugging Face's spellings there and back, its frequencies and factors, and what can't be."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from support.checkpoints import small_config
from support.errors import raises_line
from support.rope import HEAD_DIM, SCALINGS, THETA
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError
from fbiedge.rope import RopeScaling, rope_frequencies

BASE = small_config(head_dim=HEAD_DIM).to_dict()
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(scaling: Any, **changes: Any) -> RopeScaling | None:
    return ModelConfig.from_dict(BASE | {"rope_parameters": scaling} | changes).rope_scaling


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_round_trip_in_both_spellings(scaling: RopeScaling | None) -> None:
    config = small_config(head_dim=HEAD_DIM, rope_scaling=scaling)
    raw = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(raw) == config
    for spelling in ("rope_parameters", "rope_scaling"):
        assert ModelConfig.from_dict({key: value for key, value in raw.items() if key != spelling}) == config


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_frequencies_and_magnitude_are_those_of_transformers(scaling: RopeScaling | None) -> None:
    config = small_config(head_dim=HEAD_DIM, rope_theta=THETA, rope_scaling=scaling)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config.to_dict()))
    frequencies = rope_frequencies(HEAD_DIM, THETA, scaling)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=3e-7)
    assert theirs.attention_scaling == pytest.approx(scaling.magnitude if scaling else 1.0, rel=1e-12)


def test_what_a_config_may_leave_out() -> None:
    assert read({"type": "linear", "factor": 2}) == RopeScaling(rope_type="linear", factor=2.0)
    positions = BASE["max_position_embeddings"]
    assert read(LLAMA3).original_max_position_embeddings == positions
    assert read(LLAMA3, original_max_position_embeddings=16).original_max_position_embeddings == 16
    assert read(YARN) == RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    assert read(YARN | {"factor": None}).factor == positions / 16
    assert read({"rope_theta": 5.0}, rope_theta=5.0, rope_scaling=YARN) == read(YARN)
    deepseek = read(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5})
    assert deepseek.attention_factor == pytest.approx((1 + 0.1 * math.log(4)) / (1 + 0.05 * math.log(4)))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "RoPE of type 'dynamic' is not supported, expected one of default,"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "attention_factor": 1.0}, "'longrope'"),
        ({"rope_type": "linear"}, "the field 'factor' is missing"),
        ({"rope_type": "linear", "factor": 0.0}, "RoPE's factor is 0.0, expected a positive number"),
        ({"rope_type": "linear", "factor": "2x"}, "config: unusable value"),
        ({"rope_type": "llama3", "factor": 8.0}, "the field 'low_freq_factor' is missing"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "RoPE's high_freq_factor is 1.0, expected more than its low_freq_factor"),
        (YARN | {"beta_fast": 0.5}, "RoPE's beta_fast is 0.5, expected more than its beta_slow of 1.0"),
        (YARN | {"attention_factor": math.nan}, "RoPE's attention_factor is nan"),
        (YARN | {"original_max_position_embeddings": 1.5}, "RoPE's original_max_position_embeddings is 1.5, expected"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "a part of each head"),
        ({"full_attention": {"rope_type": "default"}}, "differs by layer"),
    ],
)
def test_values_that_cannot_be(scaling: dict[str, Any], message: str) -> None:
    with raises_line(CheckpointError, message):
        read(scaling)


def test_spellings_that_contradict_each_other() -> None:
    with raises_line(CheckpointError, "rope_parameters and rope_scaling differ; make them agree"):
        read({"rope_type": "default"}, rope_scaling={"type": "linear", "factor": 2.0})


def test_factors_must_fit_the_heads() -> None:
    with raises_line(CheckpointError, "RoPE has 3 factors, expected 8, one for each pair of a head of 16"):
        small_config(head_dim=HEAD_DIM, rope_scaling=RopeScaling(rope_type="factors", factors=(1.0, 2.0, 3.0)))
    with raises_line(CheckpointError, "RoPE's factors[1] is -1.0, expected a positive number"):
        RopeScaling(rope_type="factors", factors=(1.0, -1.0))
    with raises_line(CheckpointError, "RoPE of type 'factors' has 0 factors"):
        RopeScaling(rope_type="factors")

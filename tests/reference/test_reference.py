"""The numpy reference equals Hugging Face's Llama and Qwen3 with the dense W_eff, over prefill and decode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import PATTERNS, small_checkpoint, small_config
from support.huggingface import HuggingFaceLlama
from support.random_weights import random_weights
from support.rope import HEAD_DIM, SCALINGS, THETA

from fbiedge.errors import UsageError
from fbiedge.reference import Reference
from fbiedge.rope import RopeScaling
from fbiedge.weights import open_checkpoint

IDS = np.random.default_rng(1).integers(0, 80, 48).tolist()
PREFILL = 16  # then 32 decode steps
# Of the largest logit. Against float64 both engines are off by up to 4e-6 of it, for their order of summation alone.
FP32_ROUNDING = 1e-5


def decode(engine, ids: list[int] = IDS) -> np.ndarray:
    """Logits [len(ids), vocab]: a prefill, then one token at a time."""
    return np.concatenate([engine.logits(ids[:PREFILL])] + [engine.logits([i]) for i in ids[PREFILL:]])


def assert_equal_to_rounding(got: np.ndarray, expected: np.ndarray) -> None:
    largest = np.abs(expected).max()
    assert largest > 1, "logits too small to show a difference"
    np.testing.assert_allclose(got, expected, rtol=0, atol=FP32_ROUNDING * largest)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kv_heads", [6, 2, 1], ids=["mha", "gqa", "mqa"])
def test_equals_hugging_face(tmp_path: Path, pattern, kv_heads: int) -> None:
    small_checkpoint(tmp_path / "c", small_config(pattern, num_key_value_heads=kv_heads))
    weights = open_checkpoint(tmp_path / "c")
    expected = decode(HuggingFaceLlama(weights))
    got = decode(Reference(weights))
    assert got.dtype == np.float32
    assert_equal_to_rounding(got, expected)


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_rope_theta_in_both_spellings(tmp_path: Path, spelling: str) -> None:
    config = small_config(rope_theta=500.0)
    small_checkpoint(tmp_path / "c", config)
    path = tmp_path / "c/config.json"
    raw = json.loads(path.read_text())
    del raw["rope_theta"], raw["rope_parameters"]
    raw |= {"rope_theta": 500.0} if spelling == "rope_theta" else {"rope_parameters": {"rope_theta": 500.0}}
    path.write_text(json.dumps(raw))
    weights = open_checkpoint(tmp_path / "c")
    assert weights.config == config
    expected = decode(HuggingFaceLlama(weights))
    assert_equal_to_rounding(decode(Reference(weights)), expected)


def test_head_size_that_is_not_hidden_over_heads(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config(head_dim=16))
    weights = open_checkpoint(tmp_path / "c")
    expected = decode(HuggingFaceLlama(weights))
    assert_equal_to_rounding(decode(Reference(weights)), expected)


def test_tied_head(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config(tie_word_embeddings=True))
    weights = open_checkpoint(tmp_path / "c")
    expected = decode(HuggingFaceLlama(weights))
    assert_equal_to_rounding(decode(Reference(weights)), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 12), (4, 2, 128)])
def test_qwen3(tmp_path: Path, heads: int, kv_heads: int, head_dim: int, tied: bool) -> None:
    """Each head of queries and keys is normalised before it is rotated."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    small_checkpoint(tmp_path / "c", small_config("block", model_type="qwen3", tie_word_embeddings=tied, **sizes))
    weights = open_checkpoint(tmp_path / "c")
    assert np.std(weights.tensor("model.layers.1.self_attn.q_norm.weight")) > 0.1
    expected = decode(HuggingFaceLlama(weights))
    assert_equal_to_rounding(decode(Reference(weights)), expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_rope_scaling(tmp_path: Path, scaling: RopeScaling | None, model_type: str) -> None:
    """48 positions, three times those of the original context."""
    config = small_config(head_dim=HEAD_DIM, rope_theta=THETA, rope_scaling=scaling, model_type=model_type)
    small_checkpoint(tmp_path / "c", config)
    weights = open_checkpoint(tmp_path / "c")
    assert weights.config == config
    expected = decode(HuggingFaceLlama(weights))
    got = decode(Reference(weights))
    assert_equal_to_rounding(got, expected)
    if scaling is not None:
        plain = Reference(open_checkpoint(tmp_path / "c"))
        plain.config = replace(config, rope_scaling=None)
        assert np.abs(decode(plain) - got).max() > 0.05 * np.abs(got).max()


def test_float64_is_closer_to_itself_than_float32(tmp_path: Path) -> None:
    """The float64 option is float64 throughout: splitting the text differently changes nothing above 1e-12."""
    small_checkpoint(tmp_path / "c", small_config())
    weights = open_checkpoint(tmp_path / "c")
    whole = Reference(weights, np.float64).logits(IDS)
    stepwise = decode(Reference(weights, np.float64))
    assert whole.dtype == np.float64
    np.testing.assert_allclose(stepwise, whole, rtol=1e-12, atol=1e-12)
    assert_equal_to_rounding(Reference(weights).logits(IDS), whole)


def test_streamed_equals_resident(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config("row"))
    weights = open_checkpoint(tmp_path / "c")
    np.testing.assert_array_equal(Reference(weights, resident=False).logits(IDS), Reference(weights).logits(IDS))


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_1_bit_are_taken_as_they_are_needed(tied: bool) -> None:
    """A vocabulary of more rows than are dense at a time."""
    config = small_config("block", vocab_size=9000, tie_word_embeddings=tied)
    weights = random_weights(config, binary_head=True)
    ids = [0, 8191, 8192, 8999]
    expected = Reference(weights).logits(ids)
    got = Reference(weights, resident=False).logits(ids)
    assert got.shape == (4, 9000)
    assert_equal_to_rounding(got, expected)


def test_reset_forgets(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config())
    reference = Reference(open_checkpoint(tmp_path / "c"))
    first = reference.logits(IDS)
    assert reference.position == len(IDS)
    reference.reset()
    assert reference.position == 0
    np.testing.assert_array_equal(reference.logits(IDS), first)


def test_greedy_takes_the_most_likely_token_each_time(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config())
    weights = open_checkpoint(tmp_path / "c")
    generated = Reference(weights).greedy(IDS[:8], 12)
    text = IDS[:8] + generated
    assert len(generated) == 12
    # Seen all at once by the other implementation, each token is the arg max at the position before it.
    assert HuggingFaceLlama(weights).logits(text)[7:-1].argmax(-1).tolist() == generated


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "expected a list of one or more"),
        ([80], "the vocabulary is 80"),
        ([-1], "the vocabulary is 80"),
        ([1] * 65, "65 tokens are longer than the context of 64"),
    ],
)
def test_unusable_ids(tmp_path: Path, ids: list[int], message: str) -> None:
    small_checkpoint(tmp_path / "c", small_config())
    with pytest.raises(UsageError, match=message):
        Reference(open_checkpoint(tmp_path / "c")).logits(ids)


def test_context_counts_the_cache(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "c", small_config())
    reference = Reference(open_checkpoint(tmp_path / "c"))
    reference.logits([1] * 64)
    with pytest.raises(UsageError, match="65 tokens are longer"):
        reference.logits([1])

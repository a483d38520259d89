"""Random checkpoints: deterministic, initialised as the authors do, complete enough to export and chat with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from support.checkpoints import PATTERNS, small_config
from support.errors import raises_line
from tokenizers import Tokenizer

from fbiedge.config import PRESETS, preset
from fbiedge.errors import UsageError
from fbiedge.initialize import byte_tokenizer, init_checkpoint, xnor_scales
from fbiedge.weights import BinaryLinear, expected_shapes, open_checkpoint

Q = "model.layers.0.self_attn.q_proj"


def latents(folder: Path) -> np.ndarray:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as opened:
        return opened.get_tensor(f"{Q}.weight").float().numpy()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiny_in_every_pattern(tmp_path: Path, pattern) -> None:
    config = replace(preset("tiny"), scaling_pattern=pattern)
    init_checkpoint(config, tmp_path / "c")
    weights = open_checkpoint(tmp_path / "c")
    assert weights.config == config
    linear = weights.linear(Q)
    values = linear.dense() if isinstance(linear, BinaryLinear) else linear
    assert abs(values.std() - (0.02 if pattern == "none" else 0.016)) < 0.001  # E|x| of normal(0, 0.02) is 0.01596
    np.testing.assert_array_equal(weights.tensor("model.norm.weight"), np.ones(128, np.float32))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert abs(weights.tensor(name).std() - 0.02) < 0.001
        assert abs(weights.tensor(name).mean()) < 0.001
    assert not np.array_equal(weights.tensor("model.embed_tokens.weight"), weights.tensor("lm_head.weight"))


def test_a_qwen3(tmp_path: Path) -> None:
    config = replace(preset("tiny"), model_type="qwen3", tie_word_embeddings=True, head_dim=48, scaling_pattern="block")
    init_checkpoint(config, tmp_path / "c")
    weights = open_checkpoint(tmp_path / "c")
    assert weights.config == config
    np.testing.assert_array_equal(weights.tensor("model.layers.1.self_attn.q_norm.weight"), np.ones(48, np.float32))


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        init_checkpoint(small_config(), tmp_path / name, seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_tensor_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    """Another pattern, depth or vocabulary changes no other tensor."""
    init_checkpoint(small_config(), tmp_path / "a", 3)
    init_checkpoint(small_config("row", num_hidden_layers=1, vocab_size=99), tmp_path / "b", 3)
    np.testing.assert_array_equal(latents(tmp_path / "a"), latents(tmp_path / "b"))


def test_bfloat16_keeps_the_signs(tmp_path: Path) -> None:
    init_checkpoint(small_config(), tmp_path / "a")
    init_checkpoint(small_config(), tmp_path / "b", dtype="bfloat16")
    full, half = latents(tmp_path / "a"), latents(tmp_path / "b")
    np.testing.assert_allclose(half, full, rtol=2**-8)
    linear_a, linear_b = (open_checkpoint(tmp_path / name).linear(Q) for name in "ab")
    np.testing.assert_array_equal(linear_a.packed, linear_b.packed)
    # The scales fit what is stored, not what was drawn.
    np.testing.assert_array_equal(linear_b.alpha, xnor_scales(half, "column")[0].reshape(-1))
    assert (tmp_path / "b/model.safetensors").stat().st_size < 0.6 * (tmp_path / "a/model.safetensors").stat().st_size


def test_unknown_dtype(tmp_path: Path) -> None:
    with raises_line(UsageError, "unknown dtype 'int4'", "float32 or bfloat16"):
        init_checkpoint(small_config(), tmp_path / "c", dtype="int4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("pattern", "axis"), [("column", 0), ("row", 1), ("single", (0, 1))])
def test_xnor_scales_equal_torch(pattern, axis) -> None:
    weight = np.random.default_rng(0).normal(0.1, 1, (30, 50)).astype(np.float32)
    alpha, beta = xnor_scales(weight, pattern)
    latent = torch.from_numpy(weight)
    expected_beta = latent.mean(dim=axis, keepdim=True)
    expected_alpha = (latent - expected_beta).abs().mean(dim=axis, keepdim=True)
    assert alpha.shape == beta.shape == {"column": (1, 50), "row": (30, 1), "single": (1,)}[pattern]
    np.testing.assert_allclose(alpha.reshape(-1), expected_alpha.numpy().reshape(-1), rtol=1e-5)
    np.testing.assert_allclose(beta.reshape(-1), expected_beta.numpy().reshape(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 127, 128, 129, 256, 300])
def test_block_scales_are_group_means(k: int) -> None:
    weight = np.random.default_rng(0).normal(size=(5, k)).astype(np.float32)
    alpha, beta = xnor_scales(weight, "block")
    groups = [weight[:, start : start + 128] for start in range(0, k, 128)]
    assert beta is None
    np.testing.assert_allclose(alpha, np.stack([np.abs(group).mean(axis=1) for group in groups], axis=1), rtol=1e-5)


def test_progress_reaches_its_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    init_checkpoint(small_config(), tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    total = len(expected_shapes(small_config()))
    assert seen == [(i, total) for i in range(1, total + 1)]


def test_tokenizer_comes_along_where_it_fits(tmp_path: Path) -> None:
    init_checkpoint(small_config(vocab_size=258), tmp_path / "without")
    init_checkpoint(small_config(vocab_size=259), tmp_path / "with")
    assert "tokenizer.json" not in open_checkpoint(tmp_path / "without").files
    assert open_checkpoint(tmp_path / "with").files["tokenizer.json"] == byte_tokenizer()


def test_byte_tokenizer() -> None:
    tokenizer = Tokenizer.from_str(byte_tokenizer())
    assert tokenizer.get_vocab_size() == 259
    assert [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    text = "Hello,\n  wörld 😀\x00"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("name", "millions"), [("130m", 134), ("1.3b", 1364), ("7b", 6738), ("13b", 13016)])
def test_presets_have_the_size_of_their_name(name: str, millions: int) -> None:
    """Parameters of the ordinary Llama of that shape, from the headers alone."""
    shapes = expected_shapes(replace(PRESETS[name], scaling_pattern="none"))
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e6) == millions

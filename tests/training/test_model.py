"""The PyTorch Llama and its binary linears, against formulas and against Hugging Face transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fbiedge.config import BLOCK_SIZE, ModelConfig
from fbiedge.training.model import BinaryLinear, Llama, SignSTE
from fbiedge.training.shared_scales import share_scales

PATTERNS = ["column", "row", "single", "block"]


def config(pattern: str, kv_heads: int = 4) -> ModelConfig:
    return ModelConfig(
        vocab_size=97, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=64, scaling_pattern=pattern,
    )  # fmt: skip


def test_sign_maps_zero_to_plus_one_and_passes_gradients_through() -> None:
    latent = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0], requires_grad=True)
    sign = SignSTE.apply(latent)
    assert sign.tolist() == [-1, 1, 1, 1, 1]
    upstream = torch.arange(5.0)
    sign.backward(upstream)
    assert torch.equal(latent.grad, upstream)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(3, 5), (64, 172), (172, 256)])
def test_effective_weight_is_scale_times_sign_plus_offset(pattern: str, n: int, k: int) -> None:
    shape = {"column": (1, k), "row": (n, 1), "single": (1,), "block": (n, -(-k // BLOCK_SIZE))}[pattern]
    layer = BinaryLinear(k, n, pattern, shape)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    expected = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            index = {"column": (0, column), "row": (row, 0), "single": (0,), "block": (row, column // BLOCK_SIZE)}[
                pattern
            ]
            offset = 0.0 if pattern == "block" else layer.wbias[index]
            expected[row, column] = layer.wscale[index] * (1 if layer.weight[row, column] >= 0 else -1) + offset
    assert torch.equal(layer.effective_weight(), expected)


@pytest.mark.parametrize("pattern", ["column", "block"])
def test_compiled_the_effective_weight_and_its_gradients_are_the_same(pattern: str) -> None:
    n, k = 16, 704  # no whole number of blocks
    layer = BinaryLinear(k, n, pattern, (1, k) if pattern == "column" else (n, -(-k // BLOCK_SIZE)))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    upstream = torch.randn(n, k)
    results = []
    for effective_weight in (layer.effective_weight, torch.compile(layer.effective_weight)):
        layer.zero_grad()
        weight = effective_weight()
        weight.backward(upstream)
        results.append([weight.detach(), *(parameter.grad.clone() for parameter in layer.parameters())])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_scales_start_at_the_published_mean_and_mean_deviation() -> None:
    layer = BinaryLinear(8, 5, "column", (1, 8))
    torch.nn.init.normal_(layer.weight, mean=0.3)
    layer.reset_scales()
    torch.testing.assert_close(layer.wbias[0], layer.weight.mean(0))
    torch.testing.assert_close(layer.wscale[0], (layer.weight - layer.weight.mean(0)).abs().mean(0))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pattern", [*PATTERNS, "column-shared", "none"])
def test_logits_equal_transformers_with_the_dense_effective_weights(pattern: str, kv_heads: int) -> None:
    ours = Llama(config(pattern.removesuffix("-shared"), kv_heads)).initialize(seed=1, std=0.2)
    if pattern == "column-shared":
        share_scales(ours)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=kv_heads, head_dim=16, max_position_embeddings=64, rms_norm_eps=1e-5,
            tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        )
    )  # fmt: skip
    dense = {name: tensor for name, tensor in ours.state_dict().items() if not name.endswith(("wscale", "wbias"))}
    for name, module in ours.named_modules():
        if isinstance(module, BinaryLinear):
            dense[f"{name}.weight"] = module.effective_weight().detach()
    theirs.load_state_dict(dense)
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_same_seed_same_model() -> None:
    a, b, c = (Llama(config("column")).initialize(seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])

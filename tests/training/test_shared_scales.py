"""column-shared: tied while training, equal on the disk, and the same function as before where nothing had to give."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_run import model_config, training_config
from torch import Tensor, nn

from fbiedge.config import ModelConfig
from fbiedge.reference import Reference
from fbiedge.training.checkpoint import load_model, save_model
from fbiedge.training.model import BinaryLinear, Llama
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.shared_scales import FOLDED_SCALES, SMALLEST_SHARE, share_scales, storable_scales
from fbiedge.weights import BinaryLinear as StoredLinear
from fbiedge.weights import open_checkpoint

GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
FOLDED = ("self_attn.o_proj", "mlp.down_proj")
IDS = torch.arange(3, 35)[None]


def config(kv_heads: int = 4) -> ModelConfig:
    return model_config("column", num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=16)


def untied(kv_heads: int = 4, signed: bool = True) -> Llama:
    """A model whose scales differ everywhere, in sign too; q, k and v also in size."""
    model = Llama(config(kv_heads)).initialize(seed=1, std=0.2)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, BinaryLinear):
                size = {"v_proj": 0.05, "up_proj": 1.0}.get(name.rpartition(".")[2], 0.3)
                module.wscale.copy_(size * (1 + 0.5 * torch.rand(module.wscale.shape, generator=generator)))
                if signed:
                    module.wscale *= torch.randn(module.wscale.shape, generator=generator).sign()
                module.wbias.normal_(0, 0.02, generator=generator)
    return model


def linears(model: Llama) -> dict[str, BinaryLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BinaryLinear)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_scales_of_a_group_are_one_positive_parameter(kv_heads: int) -> None:
    model = untied(kv_heads)
    share_scales(model)
    by_name = linears(model)
    for layer in range(2):
        for first, *others in GROUPS:
            shared = by_name[f"model.layers.{layer}.{first}"].wscale
            assert all(by_name[f"model.layers.{layer}.{name}"].wscale is shared for name in others)
    assert all(bool((linear.scales() > 0).all()) for linear in by_name.values())
    names = [name for name, _ in model.named_parameters() if name.endswith("wscale")]
    assert len(names) == 2 * 4  # one for q/k/v, o, one for gate/up, down


def test_flipping_and_moving_sizes_change_no_output() -> None:
    """Groups whose scales are multiples of one another, of any sign, can be shared without loss."""
    model = untied()
    with torch.no_grad():
        for module in model.modules():
            for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                group = [getattr(module, name) for name in names if hasattr(module, name)]
                for factor, linear in zip((1.0, -0.5, 0.1), group, strict=False):
                    linear.wscale.copy_(factor * group[0].wscale)
        # k = 0.5 of q and -1: softmax sees q·k, so any factor can move between them
        before = model(IDS)
        share_scales(model)
        after = model(IDS)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_sharing_twice_changes_no_bit() -> None:
    model = untied()
    share_scales(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    share_scales(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_zero_latent_in_a_flipped_column_becomes_minus_one() -> None:
    model = untied()
    linear = linears(model)["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        linear.wscale[0, 3] = -0.25
        linear.weight[5, 3] = 0.0
        before = linear.effective_weight()[:, 3]
        share_scales(model)
    ratio = linear.effective_weight()[:, 3] / before  # what moved from up to down
    torch.testing.assert_close(ratio, ratio[5].expand_as(ratio))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_gradient_of_a_shared_scale_is_the_sum_of_its_parts(kv_heads: int) -> None:
    tied = Llama(config(kv_heads)).initialize(seed=3, std=0.2)
    share_scales(tied)
    parts = Llama(config(kv_heads))
    parts.load_state_dict(tied.state_dict())  # the same values, each matrix its own parameter
    for model in (tied, parts):
        model(IDS).float().square().mean().backward()
    whole, own = linears(tied), linears(parts)

    def gradient(linear: BinaryLinear) -> Tensor:
        assert linear.wscale.grad is not None
        return linear.wscale.grad

    for layer in ("model.layers.0.", "model.layers.1."):
        for names in GROUPS:
            total = sum(gradient(own[layer + name]) for name in names)
            torch.testing.assert_close(gradient(whole[layer + names[0]]), total, rtol=1e-4, atol=1e-7)
        o = layer + "self_attn.o_proj"
        by_head = gradient(own[o]).view(kv_heads, 4 // kv_heads, 16).sum(1)
        torch.testing.assert_close(gradient(whole[o]).view(kv_heads, -1, 16)[:, 0], by_head, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_is_stored_is_an_exact_column_checkpoint(kv_heads: int, tmp_path: Path) -> None:
    model = untied(kv_heads)
    share_scales(model)
    with torch.no_grad():
        linears(model)["model.layers.0.mlp.down_proj"].wscale[0, :2] = torch.tensor([0.0, -1e-9])
    save_model(model, tmp_path / "model", {})
    weights = open_checkpoint(tmp_path / "model")
    assert weights.config == config(kv_heads)  # `column`: no format of its own
    for layer in range(2):
        stored = {}
        for name in (*sum(GROUPS, ()), *FOLDED):
            linear = weights.linear(f"model.layers.{layer}.{name}")
            assert isinstance(linear, StoredLinear)
            stored[name] = linear.alpha
        for first, *others in GROUPS:
            assert all(np.array_equal(stored[first], stored[name]) for name in others)
        for name in FOLDED:
            alpha = stored[name]
            assert np.array_equal(alpha, alpha.astype(np.float16).astype(np.float32))
            assert abs(alpha).min() >= SMALLEST_SHARE * 0.999 * abs(alpha).max()
        heads = stored["self_attn.o_proj"].reshape(kv_heads, 4 // kv_heads, 16)
        assert np.array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape))
    # Rounding is all that differs between the model in training and the one stored.
    with torch.no_grad():
        for name, linear in linears(model).items():
            if not f"{name}.wscale".endswith(FOLDED_SCALES):
                continue
            scale = storable_scales(linear, linear.wscale)
            torch.testing.assert_close(scale, linear.scales(), rtol=2**-11, atol=float(2e-3 * scale.max()))
            linear.wscale.copy_(scale)
        expected = model(IDS)[0].numpy()
        loaded = load_model(tmp_path / "model")(IDS)[0].numpy()
    np.testing.assert_array_equal(loaded, expected)
    np.testing.assert_allclose(Reference(weights).logits(IDS[0].tolist()), expected, rtol=2e-4, atol=2e-4)


def test_other_forms_are_refused() -> None:
    with pytest.raises(ValueError, match="only `column` scales"):
        share_scales(Llama(ModelConfig.from_dict({**config().to_dict(), "scaling_pattern": "row"})))


def test_a_matrix_of_zero_scales_is_no_division_by_zero() -> None:
    model = untied()
    with torch.no_grad():
        nn.init.zeros_(linears(model)["model.layers.0.self_attn.v_proj"].wscale)
        share_scales(model)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_resumed_run_keeps_the_tie_and_repeats_the_uninterrupted_one(
    kv_heads: int, text: Path, tmp_path: Path
) -> None:
    training = training_config(steps=16, batch_size=2, checkpoint_every=5, eval_every=16)
    plan = RunPlan(model=config(kv_heads), training=training, teacher=None, shared_scales=True)
    prepare_run(tmp_path / "straight", plan, [text], [])
    assert RunPlan.load(tmp_path / "straight") == dataclasses.replace(plan, data=(str(text),))
    assert plan.scaling == "column-shared"
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    straight = [r.loss for r in execute_run(tmp_path / "straight")]
    killed = execute_run(tmp_path / "killed")
    for _ in range(8):  # 3 steps past the last save
        next(killed)
    killed.close()
    assert [r.loss for r in execute_run(tmp_path / "killed", resume=True)] == straight[5:]
    tensors = [load_model(tmp_path / name / "model").state_dict() for name in ("straight", "killed")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    prefix = "model.layers.1.self_attn."
    scales = [tensors[0][f"{prefix}{name}_proj.wscale"] for name in "qkv"]
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])
    start = Llama(plan.model).initialize(training.seed).state_dict()
    assert not torch.equal(scales[0], start[f"{prefix}q_proj.wscale"])  # it was trained

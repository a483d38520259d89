"""--init: a run that starts from a checkpoint, in its own scaling form or another."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_run import model_config, training_config

from fbiedge.config import BLOCK_SIZE
from fbiedge.errors import CheckpointError, FbiEdgeError, UsageError
from fbiedge.training import cli
from fbiedge.training.checkpoint import load_model, save_model
from fbiedge.training.model import BinaryLinear, Llama
from fbiedge.training.recipes import FINE_TUNE
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.start import least_squares, start_from
from fbiedge.weights import open_checkpoint

PATTERNS = ["column", "row", "single", "block"]
IDS = torch.arange(3, 35)[None]


def saved(pattern: str, path: Path, **changes: object) -> Llama:
    model = Llama(model_config(pattern, **changes)).initialize(seed=6, std=0.2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BinaryLinear):
                module.wscale *= 0.8 + 0.4 * torch.rand(module.wscale.shape, generator=torch.Generator().manual_seed(1))
    save_model(model, path, {})
    return model


@pytest.mark.parametrize("pattern", [*PATTERNS, "none"])
def test_the_same_form_starts_as_the_checkpoint_bit_for_bit(pattern: str, tmp_path: Path) -> None:
    model = saved(pattern, tmp_path / "c")
    started = start_from(tmp_path / "c", model.config.scaling_pattern)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), started.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("source", PATTERNS)
def test_a_binary_checkpoint_as_full_precision_computes_the_same(source: str, tmp_path: Path) -> None:
    model = saved(source, tmp_path / "c")
    with torch.no_grad():
        torch.testing.assert_close(start_from(tmp_path / "c", "none")(IDS), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_full_precision_checkpoint_gives_latents_and_published_scales(pattern: str, tmp_path: Path) -> None:
    dense = saved("none", tmp_path / "c").state_dict()
    started = start_from(tmp_path / "c", pattern)  # type: ignore[arg-type]
    for name, module in started.named_modules():
        if isinstance(module, BinaryLinear):
            before = module.wscale.clone()
            assert torch.equal(module.weight, dense[f"{name}.weight"])
            module.reset_scales()
            assert torch.equal(module.wscale, before)
    assert torch.equal(started.lm_head.weight, dense["lm_head.weight"])


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PATTERNS, 2)))
def test_another_form_is_the_least_squares_fit_and_keeps_how_firm_signs_are(
    source: str, target: str, tmp_path: Path
) -> None:
    model = saved(source, tmp_path / "c")
    started = start_from(tmp_path / "c", target)  # type: ignore[arg-type]
    for (name, old), new in zip(model.named_modules(), started.modules(), strict=True):
        if not isinstance(old, BinaryLinear):
            continue
        assert isinstance(new, BinaryLinear)
        assert torch.equal(new.weight.abs(), old.weight.abs()), name
        residual = (new.effective_weight() - old.effective_weight()).double().detach()
        sign = torch.where(new.weight >= 0, 1.0, -1.0).double()
        axes = {"column": (0,), "row": (1,), "single": (0, 1), "block": (1,)}[target]
        parts = torch.split(torch.stack([residual, sign]), BLOCK_SIZE if target == "block" else 1 << 30, dim=2)
        for error, s in parts:  # orthogonal to everything the scales can move
            assert (error * s).mean(axes).abs().max() < 1e-7
            assert target == "block" or error.mean(axes).abs().max() < 1e-7


def test_block_is_the_best_of_all_signs_and_scales() -> None:
    w = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    sign, alpha, beta = least_squares(w, "block")
    assert beta is None
    best = min(
        (w - a * torch.tensor(signs)).square().sum()
        for signs in itertools.product((-1.0, 1.0), repeat=6)
        for a in torch.linspace(0, 3, 301)
    )
    assert (w - alpha * sign).square().sum() <= best + 1e-6


def test_a_column_of_equal_weights_has_no_scale() -> None:
    sign, alpha, beta = least_squares(torch.full((4, 3), 0.25), "column")
    assert beta is not None and torch.equal(alpha * sign + beta, torch.full((4, 3), 0.25))


@pytest.mark.parametrize("kind", ["column", "none"])
def test_a_fine_tune_into_column_shared_resumes_without_its_start(
    kind: str, text: Path, teacher: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    source = RunPlan(model=model_config(kind), training=training_config(steps=20), teacher=str(teacher))
    prepare_run(tmp_path / "source", source, [text], [], chat_template="{{ bos_token }}")
    list(execute_run(tmp_path / "source"))
    shutil.copytree(tmp_path / "source" / "model", start)
    training = training_config(steps=20, learning_rate=1e-3)
    plan = RunPlan(
        model=model_config("column"), training=training, teacher=str(teacher), init=str(start), shared_scales=True
    )
    prepare_run(tmp_path / "straight", plan, [text], [])
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    straight = [r.loss for r in execute_run(tmp_path / "straight")]
    killed = execute_run(tmp_path / "killed")
    for _ in range(13):
        next(killed)
    killed.close()
    shutil.rmtree(start)
    assert [r.loss for r in execute_run(tmp_path / "killed", resume=True)] == straight[10:]
    weights = open_checkpoint(tmp_path / "killed" / "model")
    assert json.loads(weights.files["tokenizer_config.json"])["chat_template"] == "{{ bos_token }}"
    tensors = [load_model(tmp_path / name / "model").state_dict() for name in ("straight", "killed")]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    with pytest.raises(CheckpointError, match="doesn't exist"):  # before the first save the start is needed
        list(execute_run(tmp_path / "straight", resume=False))


def test_the_command_fine_tunes_with_defaults_of_its_own(
    text: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(text), "--teacher", str(teacher), "--sequence-length", "32", "--batch-size", "2"]
    cli.main(
        [*arguments, "--init", str(teacher), "--scaling", "column-shared", "--steps", "3", "-o", str(tmp_path / "a")]
    )
    printed = capsys.readouterr().out.replace("\n", "")
    assert "column-shared" in printed and "rounded to fp16" in printed and "--to gguf" in printed
    plan = RunPlan.load(tmp_path / "a")
    assert plan.init == str(teacher) and plan.shared_scales and plan.model == model_config("column")
    assert plan.training == dataclasses.replace(
        FINE_TUNE, steps=3, batch_size=2, sequence_length=32, bf16=plan.training.bf16
    )
    assert json.loads((tmp_path / "a" / "run.json").read_text())["shared_scales"] is True
    cli.main([*arguments, "--init", str(tmp_path / "a" / "model"), "--scaling-pattern", "row", "--steps", "1", "-o", str(tmp_path / "b")])  # fmt: skip
    assert open_checkpoint(tmp_path / "b" / "model").config.scaling_pattern == "row"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "TEACHER", "--resume"], "--init.* out"),
        (["--init", "TEACHER", "--preset", "tiny"], "leave --preset and --config out"),
        (["--init", "TEACHER", "--special-token", "<|x|>"], "leave --tokenizer and --special-token out"),
        (["--init", "/nonexistent"], "doesn't exist"),
        (["--init", "TEACHER", "--vocab-size", "310", "--sequence-length", "32"], "vocab_size 300, the model 310"),
        (["--init", "TEACHER", "--sequence-length", "512"], "longer than the model's 64 positions"),
    ],
)
def test_unusable_options_are_named(
    arguments: list[str], message: str, text: Path, teacher: Path, tmp_path: Path
) -> None:
    named = [str(teacher) if a == "TEACHER" else a for a in arguments]
    with pytest.raises(FbiEdgeError, match=message):
        cli.main([*named, "--data", str(text), "-o", str(tmp_path / "run")])


def test_a_start_of_another_shape_or_tokenizer_is_refused(text: Path, teacher: Path, tmp_path: Path) -> None:
    saved("column", tmp_path / "c", num_hidden_layers=1)
    shutil.copy(teacher / "tokenizer.json", tmp_path / "c")
    plan = RunPlan(
        model=model_config("column"), training=training_config(), teacher=str(teacher), init=str(tmp_path / "c")
    )
    with pytest.raises(UsageError, match="num_hidden_layers 1, the model 2"):
        prepare_run(tmp_path / "run", plan, [text], [])
    saved("column", tmp_path / "d")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {piece + "x" * (i > 290): i for piece, i in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["merges"] = []
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different tokenizers"):
        prepare_run(tmp_path / "run", dataclasses.replace(plan, init=str(tmp_path / "d")), [text], [])


def test_a_start_without_a_tokenizer_takes_the_teachers_or_the_one_named(
    text: Path, teacher: Path, tmp_path: Path
) -> None:
    saved("column", tmp_path / "bare")
    plan = RunPlan(model=model_config("column"), training=training_config(), teacher=None, init=str(tmp_path / "bare"))
    with pytest.raises(UsageError, match=r"has no tokenizer\.json; name its tokenizer with --tokenizer"):
        prepare_run(tmp_path / "a", plan, [text], [])
    prepare_run(tmp_path / "b", plan, [text], [], teacher / "tokenizer.json")
    prepare_run(tmp_path / "c", dataclasses.replace(plan, teacher=str(teacher)), [text], [])
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "c" / "tokenizer.json").read_bytes()


def test_rows_without_a_token_are_kept(text: Path, teacher: Path, tmp_path: Path) -> None:
    """A vocabulary of 310 for a tokenizer of 300, whether it starts there, learns from it, or both."""
    wide = tmp_path / "wide"
    model = saved("none", wide, vocab_size=310)
    shutil.copy(teacher / "tokenizer.json", wide)
    small = training_config(steps=1)
    for name, start, source in (("a", wide, None), ("b", None, wide), ("c", wide, wide)):
        init, taught = (None if path is None else str(path) for path in (start, source))
        plan = RunPlan(model=model_config("block", vocab_size=310), training=small, teacher=taught, init=init)
        prepare_run(tmp_path / name, plan, [text], [])
        list(execute_run(tmp_path / name))
        assert open_checkpoint(tmp_path / name / "model").tensor("lm_head.weight").shape == model.lm_head.weight.shape


def test_a_tokenizer_that_does_not_fit_says_what_would(text: Path, teacher: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "narrow"
    saved("none", narrow, vocab_size=290)
    shutil.copy(teacher / "tokenizer.json", narrow)
    for vocab, init, advice in (
        (
            290,
            str(narrow),
            "300 pieces with ids up to 299, the model's vocabulary 290; bring the tokenizer that it was",
        ),
        (290, None, "300 pieces with ids up to 299, the model's vocabulary 290; add --vocab-size 300"),
        (310, None, "300 pieces with ids up to 299, the model's vocabulary 310; add --vocab-size 300"),
    ):
        plan = RunPlan(
            model=model_config("none", vocab_size=vocab), training=training_config(), teacher=None, init=init
        )
        with pytest.raises(UsageError, match=advice):
            prepare_run(tmp_path / "run", plan, [text], [], None if init else teacher / "tokenizer.json")

"""Teachers from anywhere: Llamas of Hugging Face in every dtype and format, other architectures, ours; or one clear line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.errors import raises_line
from support.huggingface_folders import teacher_folder as huggingface
from support.tiny_run import model_config, training_config

from fbiedge.errors import CheckpointError, UsageError
from fbiedge.training.checkpoint import load_model
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.teacher import find_teacher, fitted, load_teacher, teacher_facts

IDS = torch.arange(3, 35)[None]


def logits(teacher: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return (teacher.features(IDS) @ teacher.lm_head.weight.T).float()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("held", ["fp32", "bf16"])
def test_a_llama_of_any_dtype_gives_its_own_logits(stored: torch.dtype, held: str, tmp_path: Path) -> None:
    model = huggingface(tmp_path, "Llama", stored, num_key_value_heads=1)
    teacher = load_teacher(tmp_path, held)  # type: ignore[arg-type]
    assert {p.dtype for p in teacher.parameters()} == {torch.float32 if held == "fp32" else torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    with torch.no_grad():
        expected = model.float()(IDS).logits
    tolerance = 1e-4 if held == "fp32" else 2e-2
    torch.testing.assert_close(logits(teacher), expected, rtol=tolerance, atol=tolerance)


def test_a_llama_in_bin_files_is_read_too(tmp_path: Path) -> None:
    model = huggingface(tmp_path, "Llama")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with torch.no_grad():
        torch.testing.assert_close(logits(load_teacher(tmp_path, "fp32")), model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["GPT2", "Qwen3"])
@pytest.mark.parametrize("held", ["fp32", "bf16"])
def test_another_architecture_gives_its_own_logits(architecture: str, held: str, tmp_path: Path) -> None:
    model = huggingface(tmp_path, architecture)
    facts = teacher_facts(tmp_path)
    assert (facts.vocab_size, facts.positions, facts.is_llama) == (300, 64, False)
    teacher = load_teacher(tmp_path, held)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(IDS).logits
    tolerance = 1e-4 if held == "fp32" else 3e-2
    torch.testing.assert_close(logits(teacher), expected, rtol=tolerance, atol=tolerance)


def test_llama_3_s_rope_is_left_to_transformers(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    model = huggingface(tmp_path, "Llama", rope_parameters=scaling)
    assert not teacher_facts(tmp_path).is_llama
    with torch.no_grad():
        torch.testing.assert_close(logits(load_teacher(tmp_path, "fp32")), model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_logits_that_the_loss_would_not_compute_are_refused(tmp_path: Path) -> None:
    huggingface(tmp_path, "Gemma2", head_dim=32, query_pre_attn_scalar=32, final_logit_softcapping=0.05)
    with raises_line(UsageError, "gemma2", "more than its last hidden state and its head"):
        load_teacher(tmp_path, "fp32")


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Qwen3"])
def test_a_student_learns_from_it(architecture: str, text: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    huggingface(folder, architecture, bos_token_id=None, eos_token_id=2)
    tokenizer = (teacher / "tokenizer.json").read_text()
    if architecture == "Qwen3":  # no <s>, no </s>, and nothing that begins a text
        tokenizer = tokenizer.replace('"<s>"', '"<|im_start|>"').replace('"</s>"', '"<|im_end|>"')
    (folder / "tokenizer.json").write_text(tokenizer)
    student = fitted(model_config("column"), teacher_facts(folder))
    plan = RunPlan(model=student, training=training_config(steps=20), teacher=str(folder), teacher_dtype="bf16")
    prepare_run(tmp_path / "run", plan, [text], [])
    reports = list(execute_run(tmp_path / "run"))
    losses = [report.distillation_loss for report in reports]
    assert None not in losses and losses[-1] < losses[0]  # type: ignore[operator]


def test_documents_are_parted_by_what_the_teacher_has(tmp_path: Path) -> None:
    huggingface(tmp_path, "Qwen3", bos_token_id=None, eos_token_id=7)
    fit = fitted(model_config("column", vocab_size=999), teacher_facts(tmp_path))
    assert (fit.vocab_size, fit.bos_token_id, fit.eos_token_id) == (300, 7, 7)


def test_a_binary_model_of_ours_teaches_in_bf16(text: Path, teacher: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=model_config("column"), training=training_config(steps=4), teacher=str(teacher))
    prepare_run(tmp_path / "first", plan, [text], [])
    list(execute_run(tmp_path / "first"))
    binary = tmp_path / "first" / "model"
    torch.testing.assert_close(logits(load_teacher(binary, "bf16")), logits(load_model(binary)), rtol=3e-2, atol=3e-2)
    second = dataclasses.replace(plan, teacher=str(binary), teacher_dtype="bf16")
    prepare_run(tmp_path / "second", second, [text], [])
    assert len(list(execute_run(tmp_path / "second"))) == 4


def test_the_same_size_is_not_the_same_vocabulary(text: Path, teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    huggingface(folder, "Llama")
    plan = RunPlan(model=model_config("column"), training=training_config(), teacher=str(folder))
    with raises_line(UsageError, "bare has no tokenizer.json; name its tokenizer with --tokenizer"):
        prepare_run(tmp_path / "a", plan, [text], [])
    prepare_run(tmp_path / "a", plan, [text], [], tokenizer=teacher / "tokenizer.json")
    shutil.copy(teacher / "tokenizer.json", folder)
    raw = json.loads((teacher / "tokenizer.json").read_text())
    pieces = {piece: at for at, piece in enumerate(raw["model"]["vocab"])}
    raw["model"] |= {"vocab": pieces | {"zz": 299}, "merges": []}
    raw["model"]["vocab"].pop(next(piece for piece, at in pieces.items() if at == 299))
    (tmp_path / "other.json").write_text(json.dumps(raw))
    with raises_line(UsageError, "different tokenizers; distillation needs the same one"):
        prepare_run(tmp_path / "b", plan, [text], [], tokenizer=tmp_path / "other.json")


def test_what_is_no_teacher_is_one_line(tmp_path: Path) -> None:
    with raises_line(CheckpointError, "nowhere doesn't exist"):
        teacher_facts(find_teacher(str(tmp_path / "nowhere")))
    huggingface(tmp_path / "torn", "Qwen3")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with raises_line(CheckpointError, "torn: transformers can't load it"):
        load_teacher(tmp_path / "torn", "fp32")


@pytest.mark.parametrize("kind", ["nothing-known", "clip", "qwen3"])
def test_a_config_that_describes_no_language_model_is_one_line(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": "many"}))
    with pytest.raises(CheckpointError, match="transformers can't (read|load)") as caught:
        teacher_facts(tmp_path)
        load_teacher(tmp_path, "fp32")
    assert "\n" not in str(caught.value)


def test_a_name_that_the_hub_does_not_give_is_one_line() -> None:
    pytest.importorskip("huggingface_hub")
    code = (
        "from fbiedge.training.teacher import find_teacher\n"
        "from fbiedge.errors import UsageError\n"
        "try: find_teacher('nobody/nothing-of-this-name')\n"
        "except UsageError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.count("\n") == 1
    assert "there is no folder nobody/nothing-of-this-name" in run.stdout and "name its folder" in run.stdout

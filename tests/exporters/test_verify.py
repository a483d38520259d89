"""`verify_export` finds what was lost, nothing where nothing was, and a wrong model where it is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from support.checkpoints import small_checkpoint, small_config
from tokenizers import Tokenizer

from fbiedge.config import preset
from fbiedge.errors import ModelFileError, UsageError
from fbiedge.exporters.onnx import default_text_ids, export_onnx, verify_export
from fbiedge.exporters.onnx import verify as verify_module
from fbiedge.initialize import init_checkpoint
from fbiedge.weights import Weights, open_checkpoint

IDS = list(range(20))


def test_fp32_loses_nothing(weights: Weights, tmp_path: Path) -> None:
    path = export_onnx(weights, tmp_path / "model.onnx", accuracy_level="fp32", head="fp32", kv_cache="fp32").model
    report = verify_export(weights, path, IDS)
    assert report.max_logit_error < 1e-4
    assert report.kl_divergence < 1e-8
    assert report.top1_agreement == 1
    assert report.tokens == 20


def test_int8_loses_a_little(weights: Weights, tmp_path: Path) -> None:
    path = export_onnx(weights, tmp_path / "model.onnx").model
    report = verify_export(weights, path, IDS)
    assert 1e-4 < report.max_logit_error < 2
    assert 1e-8 < report.kl_divergence < 0.05


def test_another_model_is_found_out(weights: Weights, tmp_path: Path) -> None:
    small_checkpoint(
        tmp_path / "other",
        small_config(head_dim=16),
        edit=lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].__imul__(-1),
    )
    path = export_onnx(open_checkpoint(tmp_path / "other"), tmp_path / "model.onnx", accuracy_level="fp32").model
    assert verify_export(weights, path, IDS).kl_divergence > 0.01


def test_a_costly_model_is_checked_on_fewer_tokens_and_streamed(
    weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = export_onnx(weights, tmp_path / "model.onnx", accuracy_level="fp32", head="fp32", kv_cache="fp32").model
    monkeypatch.setattr(verify_module, "_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(verify_module, "RESIDENT_LIMIT_BYTES", 0)
    report = verify_export(weights, path, IDS)
    assert report.tokens == 16
    assert report.max_logit_error < 1e-4
    assert report.note.startswith("16 tokens, cut from 20 tokens, ")


def test_says_which_engine_ran(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = export_onnx(weights, tmp_path / "model.onnx").model
    report = verify_export(weights, path, IDS)
    assert report.op_library and report.note.endswith("through the op library")
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", str(tmp_path / "absent.so"))
    report = verify_export(weights, path, IDS)
    assert not report.op_library and "through the stock-operator fallback (no op library at" in report.note
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", str(tmp_path / "broken.so"))
    report = verify_export(weights, path, IDS)
    assert not report.op_library and "broken.so" in report.note and "\n" not in report.note


def test_no_text(weights: Weights, tmp_path: Path) -> None:
    path = export_onnx(weights, tmp_path / "model.onnx").model
    with pytest.raises(UsageError, match="at least one token"):
        verify_export(weights, path, [])


def test_a_file_that_onnx_runtime_refuses(weights: Weights, tmp_path: Path) -> None:
    path = export_onnx(weights, tmp_path / "model.onnx").model
    model = onnx.load(path)
    model.graph.node[0].op_type = "NoSuchOp"
    onnx.save(model, path)
    with pytest.raises(ModelFileError, match="ONNX Runtime refuses") as caught:
        verify_export(weights, path, IDS)
    assert "\n" not in str(caught.value)


def test_default_text_is_tokenised_by_the_model(tmp_path: Path) -> None:
    init_checkpoint(preset("tiny"), tmp_path / "tiny")
    ids = default_text_ids(open_checkpoint(tmp_path / "tiny"))
    assert len(ids) == 128
    assert (
        Tokenizer.from_file(str(tmp_path / "tiny/tokenizer.json")).decode(ids).startswith("Once upon a time there was")
    )


def test_a_text_of_ones_own_is_not_cut_before_its_cost_is_known(tmp_path: Path) -> None:
    init_checkpoint(preset("tiny"), tmp_path / "tiny")
    assert len(default_text_ids(open_checkpoint(tmp_path / "tiny"), "word " * 200)) == 1001


def test_without_tokenizer_ids_are_random_but_the_same_each_time(weights: Weights) -> None:
    ids = default_text_ids(weights)
    assert ids == default_text_ids(weights)
    assert len(ids) == 128 and 0 <= min(ids) and max(ids) < 80 and len(set(ids)) > 40


@pytest.mark.parametrize("tokenizer", ["{", '{"version": "1.0"}'])
def test_unusable_tokenizer(tokenizer: str, weights: Weights) -> None:
    broken = SimpleNamespace(config=weights.config, files={"tokenizer.json": tokenizer})
    with pytest.raises(UsageError, match="tokenizer.json can't be used"):
        default_text_ids(broken)  # type: ignore[arg-type]

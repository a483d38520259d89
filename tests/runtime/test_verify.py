"""`fbiedge verify`: 0 where two models are the same, 1 where they aren't and by what, 2 where they can't be compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import small_config, small_tensors
from support.tiny_model import tiny_checkpoint, tiny_model

from fbiedge.engines import open_logits
from fbiedge.initialize import byte_tokenizer
from fbiedge.metrics import compare_logits, perplexity
from fbiedge.sample_text import SAMPLE_TEXT
from fbiedge.verify import Bounds, common_ids, verify
from fbiedge.weights import open_checkpoint, write_checkpoint

from .conftest import Run, one_error_line


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same shape and tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    files = dict(open_checkpoint(tiny_checkpoint(folder)).files)
    config = small_config(vocab_size=259, head_dim=16)
    write_checkpoint(folder, config, small_tensors(config, seed=1).items(), files)
    return folder


def test_the_same_model_in_two_forms(fbiedge: Run, plain_model: Path) -> None:
    checkpoint = plain_model.parent / "checkpoint"
    code, out, err = fbiedge("verify", checkpoint, plain_model, "--json")
    assert (code, err) == (0, "")
    *table, last = out.splitlines()
    report = json.loads(last)
    assert report["engine_a"] == "numpy reference, fp32" and "kernels" in report["engine_b"]
    assert report["kl_divergence"] < 1e-8 and report["top1_agreement"] == 1 and report["beyond"] == []
    assert report["max_logit_difference"] < 1e-3
    assert report["perplexity_a"] == pytest.approx(report["perplexity_b"], rel=1e-4)
    assert report["window"] == 64 and report["tokens"] == 469  # all of the built-in text, the rest at the end too
    assert re.fullmatch(r"same +within the bounds", table[-1])


def test_another_model_is_beyond_both_bounds(fbiedge: Run, plain_model: Path, other: Path) -> None:
    code, out, err = fbiedge("verify", plain_model, other, "--max-tokens", 100)
    assert (code, err) == (1, "")
    assert re.search(r"^differs +KL divergence \S+ is above --max-kl 0.001$", out, re.MULTILINE)
    assert re.search(r"^differs +top-1 agreement \S+ is below --min-agreement 0.99$", out, re.MULTILINE)
    assert "same " not in out
    bounds = ["--max-kl", 1e9, "--min-agreement", 0]
    assert fbiedge("verify", plain_model, other, "--max-tokens", 100, *bounds)[0] == 0


def test_each_bound_alone(fbiedge: Run, plain_model: Path, other: Path) -> None:
    for loose, tight in ((["--max-kl", 1e9], "--min-agreement"), (["--min-agreement", 0], "--max-kl")):
        code, out, _ = fbiedge("verify", plain_model, other, "--max-tokens", 50, "--json", *loose)
        reasons = json.loads(out.splitlines()[-1])["beyond"]
        assert code == 1 and len(reasons) == 1 and tight in reasons[0]


def test_chunks_add_up(plain_model: Path, other: Path) -> None:
    """Streamed over two windows and a rest, the numbers are those of all logits at once."""
    a, b = open_logits(plain_model, tokens=2048), open_logits(other, tokens=2048)
    ids = common_ids(a, b, SAMPLE_TEXT)[:150]
    report = verify(a, b, ids, bounds=Bounds())
    rows = []
    for engine in (a, b):
        windows = []
        for start in range(0, 150, 64):
            engine.reset()
            windows.append(engine.logits(ids[start : start + 64]))
        rows.append(windows)
    expected = compare_logits(np.concatenate(rows[0]), np.concatenate(rows[1]))
    assert report.tokens == expected.positions == 150
    assert report.kl_divergence == pytest.approx(expected.kl_divergence)
    assert report.top1_agreement == expected.top1_agreement
    assert report.max_logit_difference == pytest.approx(expected.max_abs_error)
    targets = np.concatenate([ids[1:64], ids[65:128], ids[129:]])
    logits = np.concatenate([window[:-1] for window in rows[1]])
    assert report.perplexity_b == pytest.approx(perplexity(logits, targets))


def test_logits_that_are_no_numbers_are_no_match(plain_model: Path) -> None:
    a, b = open_logits(plain_model, tokens=2048), open_logits(plain_model, tokens=2048)
    right = b.logits
    b.logits = lambda ids: right(ids) * np.float32(np.nan)  # type: ignore[method-assign]
    report = verify(a, b, list(range(20)), bounds=Bounds(max_kl=1e9, min_agreement=0))
    assert len(report.beyond) == 1 and "KL divergence nan" in report.beyond[0]
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["kl_divergence"] is None


def test_models_that_can_not_be_compared(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    larger = tiny_checkpoint(tmp_path / "larger", vocab_size=300)
    message = one_error_line(fbiedge("verify", plain_model, larger))
    assert "vocabulary of 259 tokens" in message and "one of 300" in message
    swapped = tiny_checkpoint(tmp_path / "swapped")
    tokenizer = json.loads(byte_tokenizer())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["n"] = vocab["n"], vocab["e"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = one_error_line(fbiedge("verify", plain_model, swapped))
    assert "split this text differently, from token 2 on" in message  # <s>, O, n
    for folder in (swapped, plain := tiny_checkpoint(tmp_path / "plain")):
        (folder / "tokenizer.json").unlink()
    assert "neither" in one_error_line(fbiedge("verify", swapped, plain))
    assert fbiedge("verify", swapped, plain_model)[0] == 0  # one tokenizer is enough


def test_bad_input(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    for models in ([plain_model, tmp_path / "no.onnx"], [tmp_path / "no.onnx", plain_model]):
        assert "does not exist" in one_error_line(fbiedge("verify", *models))
    same = ["verify", plain_model, plain_model]
    assert "can't read the text" in one_error_line(fbiedge(*same, "--text", tmp_path / "no.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "expected at least 2" in one_error_line(fbiedge(*same, "--text", tmp_path / "empty.txt"))
    for options, message in (
        (["--max-kl", "-1"], "--max-kl is -1.0"), (["--max-kl", "nan"], "--max-kl is nan"),
        (["--min-agreement", "1.5"], "--min-agreement is 1.5"), (["--min-agreement", "nan"], "--min-agreement is nan"),
        (["--max-tokens", "0"], "--max-tokens is 0"), (["--window", "0"], "--window is 0"),
    ):  # fmt: skip
        assert message in one_error_line(fbiedge(*same, *options))


def test_a_lossy_export_differs_by_what_it_lost(fbiedge: Run, tmp_path: Path) -> None:
    model = tiny_model(tmp_path, export={"accuracy_level": "int8", "head": "int4", "kv_cache": "int8"})
    arguments = ["verify", tmp_path / "checkpoint", model]
    assert fbiedge(*arguments, "--max-kl", 1, "--min-agreement", 0.5)[0] == 0
    assert fbiedge(*arguments, "--max-kl", 1e-7)[0] == 1

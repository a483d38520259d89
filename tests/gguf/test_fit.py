"""The fit of what doesn't fold: exact where it can be, no worse than any other d, and honest about what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises_line
from support.gguf_checkpoints import IDS, gguf_checkpoint, gguf_config
from support.stock_llama_cpp import StockLlamaCpp

from fbiedge.bits import pack_bits, unpack_bits
from fbiedge.errors import UsageError
from fbiedge.exporters.gguf import GgufReport, export_gguf
from fbiedge.exporters.gguf.fit import (
    Fit,
    ModelFit,
    choose_signs,
    fit_linear,
    fit_model,
    fit_scales,
    record_inputs,
    rms,
)
from fbiedge.exporters.gguf.fold import exactness
from fbiedge.exporters.gguf.folded import DenseWeights, FoldedModel
from fbiedge.gguf_file import GgufFile
from fbiedge.metrics import compare_logits
from fbiedge.reference import Reference, rms_norm
from fbiedge.weights import Weights

GENERATOR = np.random.default_rng(0)
PACKED = pack_bits(GENERATOR.normal(0, 1, (300, 256)))
SIGNS = unpack_bits(PACKED, 256).astype(np.float32)
NO_BETA = np.zeros(256, np.float32)


def correlated(tokens: int) -> np.ndarray:
    """Inputs of different sizes that move together."""
    mixing = GENERATOR.normal(0, 1, (256, 256)) / 16 + np.eye(256)
    return (GENERATOR.normal(0, 1, (tokens, 256)) * GENERATOR.uniform(0.1, 3, 256) @ mixing).astype(np.float32)


def outputs(d: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return inputs @ (SIGNS * np.repeat(d, 128, axis=1)).T


def test_a_ratio_of_one_a_block_is_found() -> None:
    ratio = np.repeat(np.array([0.7, 1.3], np.float32), 128)
    d, error = fit_scales(PACKED, PACKED, ratio, NO_BETA, correlated(500))
    assert np.allclose(d, [0.7, 1.3], atol=1e-5) and error < 1e-5


def test_no_other_scales_are_better() -> None:
    ratio, inputs = GENERATOR.uniform(0.5, 1.5, 256).astype(np.float32), correlated(2000)
    d, error = fit_scales(PACKED, PACKED, ratio, NO_BETA, inputs)
    wanted = inputs @ (SIGNS * ratio).T

    def left(scales: np.ndarray) -> np.ndarray:
        return np.square(outputs(scales, inputs) - wanted).sum(axis=0)  # by row

    assert np.isclose(error, np.sqrt(left(d).sum() / np.square(wanted).sum()), rtol=1e-4)
    for step in ([0.02, 0], [0, 0.02], [-0.02, 0.01]):
        assert (left(d + np.array(step, np.float32)) > left(d)).all()
    assert left(d).sum() < left(np.full_like(d, ratio.mean())).sum()


def test_signs_are_chosen_where_there_are_tokens_enough() -> None:
    """And help on inputs that they were not chosen for, too."""
    ratio, inputs = GENERATOR.uniform(0.1, 1.9, 256).astype(np.float32), correlated(6000)
    seen, others = inputs[:3000], inputs[3000:]
    assert fit_linear(PACKED, ratio, NO_BETA, seen[:511]).packed is None
    fit = fit_linear(PACKED, ratio, NO_BETA, seen)
    d, error = fit_scales(PACKED, PACKED, ratio, NO_BETA, seen)
    assert fit.packed is not None and fit.error < 0.9 * error
    signs = unpack_bits(fit.packed, 256).astype(np.float32)
    wanted = others @ (SIGNS * ratio).T
    new = np.square(others @ (signs * np.repeat(fit.d, 128, axis=1)).T - wanted).sum()
    assert new < 0.9 * np.square(outputs(d, others) - wanted).sum()


def test_signs_that_are_right_stay() -> None:
    """Also where d is below 0."""
    for factor in (1, -1):
        d = np.full((300, 2), factor, np.float32)
        signs = choose_signs(PACKED, np.full(256, factor, np.float32), d, correlated(1024))
        assert np.array_equal(signs, PACKED)


def test_few_tokens_do_no_harm() -> None:
    """With few positions, d stays near the mean of the ratio."""
    ratio = GENERATOR.uniform(0.9, 1.1, 256).astype(np.float32)
    d, _ = fit_scales(PACKED, PACKED, ratio, NO_BETA, correlated(16))
    assert np.abs(d - 1).max() < 0.2


def test_inputs_are_those_of_the_reference(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path, gguf_config())
    name = "model.layers.0.self_attn.q_proj"
    found = record_inputs(weights, IDS, {name}, resident=True)
    hidden = weights.tensor("model.embed_tokens.weight")[IDS]
    expected = rms_norm(hidden, weights.tensor("model.layers.0.input_layernorm.weight"), weights.config.rms_norm_eps)
    assert list(found) == [name] and np.array_equal(found[name], expected)
    assert np.allclose(rms(found[name]), np.sqrt(np.square(expected).mean(axis=0)))


def test_texts_longer_than_the_context_are_read_in_windows(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path, gguf_config(max_position_embeddings=16))
    name = "model.layers.1.mlp.gate_proj"
    found = record_inputs(weights, IDS, {name}, resident=False)
    assert found[name].shape == (20, 128)
    again = record_inputs(weights, IDS[16:], {name}, resident=True)
    assert np.allclose(found[name][16:], again[name], atol=1e-5)


def test_a_lossy_model_keeps_most(tmp_path: Path) -> None:
    """The fitted model is nearer to the original than one whose d are the plain mean."""
    weights = gguf_checkpoint(tmp_path, gguf_config(), shared=False)
    ids = [int(token) for token in GENERATOR.integers(0, 259, 200)]
    fit = fit_model(weights, exactness(weights), ids, resident=True)
    assert (fit.tokens, fit.widest) == (200, 128) and len(fit.linears) == 2 * 6
    assert all(0 < one.error < 1 for one in fit.linears.values())
    plain = {name: replace(one, d=np.full_like(one.d, 1)) for name, one in fit.linears.items()}
    expected = Reference(weights).logits(IDS)

    def loss(fitted: Mapping[str, Fit]) -> float:
        model = FoldedModel(weights=weights, folds=fit.folds, fitted=fitted)
        return float(np.abs(Reference(DenseWeights(model=model)).logits(IDS) - expected).mean())

    assert loss(fit.linears) < loss(plain)


@pytest.mark.parametrize(
    ("tokens", "most", "parts"),
    [
        (200, 240, ["200 tokens are few for a fit of 256 inputs", "--calibration-text FILE gives a better one"]),
        (240, 240, ["a fit of a model of this size takes 240 tokens, fewer than its 256 inputs"]),
        (300, 4096, ["from 512 tokens on signs are fitted too", "--calibration-text FILE"]),
        (300, 400, []),
        (512, 4096, []),
    ],
)
def test_what_would_make_a_fit_better(tokens: int, most: int, parts: list[str]) -> None:
    advice = ModelFit(folds=(), tokens=tokens, most_tokens=most, widest=256).advice()
    assert (advice is None) == (not parts) and all(part in (advice or "") for part in parts)


def loss_in_llama_cpp(weights: Weights, report: GgufReport, ids: list[int]) -> float:
    assert report.adapter
    llama = StockLlamaCpp(report.model, report.adapter)
    got = llama.logits(ids)
    llama.close()
    return compare_logits(Reference(weights).logits(ids), got).kl_divergence


def test_a_lossy_model_is_refused_with_numbers_and_a_way_out(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(), shared=False)
    for ids in (None, []):
        with raises_line(UsageError, "must be fitted to a text"):
            export_gguf(weights, tmp_path / "model.gguf", calibration_ids=ids, verify_ids=IDS)
    with raises_line(
        UsageError, "12 linears (q, k, v, gate, up, o)", "fitted to 10 tokens", "% rms there", "KL divergence", "perplexity",
        "on 10 others", "10 tokens are few for a fit of 128 inputs; --calibration-text FILE gives", "--allow-lossy",
        "fbiedge train --init CHECKPOINT --scaling column-shared",
    ):  # fmt: skip
        export_gguf(weights, tmp_path / "model.gguf", calibration_ids=IDS, verify_ids=IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_lossy_model_loses_what_the_report_says(tmp_path: Path) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(), shared=False)
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 259, 300)]
    report = export_gguf(
        weights, tmp_path / "model.gguf", allow_lossy=True, calibration_ids=ids, verify_ids=IDS
    )  # fmt: skip
    assert not report.exact and len(report.errors) == 12 and report.fit_tokens == 300
    assert report.costs and report.costs.without_adapter and report.costs.tokens == len(IDS)
    got = loss_in_llama_cpp(weights, report, IDS)
    assert 0.5 * got < report.costs.with_adapter.kl_divergence < 2 * got
    assert report.costs.in_llama_cpp and report.costs.in_llama_cpp.kl_divergence == pytest.approx(got, rel=0.05)
    assert GgufFile.open(report.model).metadata["fbiedge.exact"] is False


@pytest.mark.parametrize(
    ("calibration", "measured", "fitted", "on"),
    [
        (IDS, IDS, 10, 10),
        (IDS[:15], IDS, 10, 10),  # one text, of which both get a part
        (IDS, IDS[:4], 10, 10),
        (IDS[:3], IDS[:3], 1, 2),
        (IDS[::-1], IDS, 20, 20),
    ],
)
def test_no_text_is_fitted_to_and_measured_on(
    tmp_path: Path, calibration: list[int], measured: list[int], fitted: int, on: int
) -> None:
    weights = gguf_checkpoint(tmp_path / "in", gguf_config(), shared=False)
    report = export_gguf(
        weights, tmp_path / "model.gguf", allow_lossy=True, calibration_ids=calibration, verify_ids=measured
    )
    assert report.costs and (report.fit_tokens, report.costs.tokens) == (fitted, on)
    if on == 10:  # and they are the others
        loss = loss_in_llama_cpp(weights, report, IDS[10:])
        assert report.costs.in_llama_cpp and report.costs.in_llama_cpp.kl_divergence == pytest.approx(loss, rel=0.01)

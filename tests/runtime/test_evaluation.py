"""`fbiedge eval`: the published windows, equal to an independent implementation, and an interval that is one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.huggingface import HuggingFaceLlama
from support.tiny_model import tiny_checkpoint

from fbiedge import evaluation
from fbiedge.engines import open_logits
from fbiedge.errors import ModelFileError, UsageError
from fbiedge.evaluation import cut, evaluate
from fbiedge.exporters.onnx import export_onnx
from fbiedge.sample_text import SAMPLE_TEXT
from fbiedge.weights import open_checkpoint

from .conftest import Run, one_error_line


class Fake:
    """An engine whose logits are 2 for the token of its position modulo 5 and 0 for the others."""

    path, description, tokenizer = Path("fake"), "a fake", None

    def __init__(self, capacity: int = 10_000, fill: float = 2.0) -> None:
        self.capacity, self.fill = capacity, fill
        self.runs: list[list[int]] = []  # lengths of the calls, by window

    @property
    def config(self) -> object:
        raise AssertionError("not needed")

    def reset(self) -> None:
        self.runs.append([])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        start = sum(self.runs[-1])
        self.runs[-1].append(len(ids))
        rows = np.zeros((len(ids), 5), np.float32)
        rows[np.arange(len(ids)), (start + np.arange(len(ids))) % 5] = self.fill
        return rows


def test_windows() -> None:
    ids = list(range(10))
    assert cut(ids, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(ids, 4, rest=True) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cut(ids[:9], 4, rest=True) == cut(ids, 4)  # of one token nothing can be predicted
    assert cut(ids, 5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert cut(ids, 11) == cut(ids, 10) == [ids]
    for wrong in ([], [7]):
        with pytest.raises(UsageError, match="expected at least 2"):
            cut(wrong, 4)


def test_each_window_starts_anew_and_its_first_token_is_not_predicted() -> None:
    engine = Fake()
    report = evaluate(engine, [0] * 1000, window=300)
    assert engine.runs == [[128, 128, 43]] * 3  # the last token of a window isn't run: nothing follows
    assert (report.windows, report.window, report.tokens, report.left_out) == (3, 300, 3 * 299, 100)
    # Token 0 is expected at 1 position of 5, whose row says so.
    hit, miss = math.log(math.e**2 + 4) - 2, math.log(math.e**2 + 4)
    hits = math.ceil(299 / 5)
    assert report.nats_per_token == pytest.approx((hits * hit + (299 - hits) * miss) / 299)
    assert report.perplexity == pytest.approx(math.exp(report.nats_per_token))


def test_a_window_is_no_longer_than_the_context() -> None:
    report = evaluate(Fake(capacity=50), [0] * 120)
    assert (report.window, report.windows, report.left_out) == (50, 2, 20)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 5, 500)]
    expected = evaluate(Fake(), ids, window=200)
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    again = evaluate(Fake(), ids, window=200)
    assert (again.nats_per_token, again.interval) == (expected.nats_per_token, expected.interval)


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(Fake(), [0] * 1000, window=300, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {3 * 299} and seen[-1][0] == 3 * 299


def test_interval_is_that_of_the_mean() -> None:
    """Of independent losses: the mean plus and minus 1.96 standard errors."""
    losses = np.random.default_rng(1).normal(3, 0.5, (400, 50))
    low, high = map(math.log, evaluation._interval(list(losses)))
    error = losses.std() / math.sqrt(losses.size)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert (low + high) / 2 == pytest.approx(losses.mean(), abs=0.2 * error)
    assert evaluation._interval(list(losses)) == evaluation._interval(list(losses))


def test_parts_are_windows_where_there_are_many() -> None:
    many = evaluate(Fake(), [0] * 1000, window=50)
    assert many.parts == many.windows == 20 and many.interval is not None
    few = evaluate(Fake(), [0] * 1000, window=500)
    assert few.parts == 2 * 4 and few.windows == 2
    short = evaluate(Fake(), [0] * 100)
    assert short.parts == 1 and short.interval is None
    assert "too short" in " ".join(short.lines())


def test_logits_that_are_no_numbers() -> None:
    """Said at once, not after the whole text."""
    for fill in (math.nan, math.inf):
        engine = Fake(fill=fill)
        with pytest.raises(ModelFileError, match="not finite"):
            evaluate(engine, [0] * 1000, window=100)
        assert engine.runs == [[99]]


def test_a_hopeless_loss_is_infinite_and_still_json() -> None:
    report = evaluate(Fake(fill=1e6), [0] * 10)
    assert report.perplexity == math.inf
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["perplexity"] is None


@pytest.mark.parametrize("source", ["stories260k", "made here"])
def test_as_transformers_says(source: str, request: pytest.FixtureRequest, plain_model: Path, tmp_path: Path) -> None:
    """The same windows through Hugging Face's Llama and torch's cross entropy; through numpy and, at fp32, through ONNX."""
    trained_elsewhere = source == "stories260k"
    checkpoint: Path = request.getfixturevalue(source) if trained_elsewhere else plain_model.parent / "checkpoint"
    exported = tmp_path / "model.onnx"
    export_onnx(open_checkpoint(checkpoint), exported, accuracy_level="fp32", head="fp32", kv_cache="fp32")
    engine = open_logits(checkpoint, tokens=150)
    assert engine.tokenizer is not None and engine.description == "numpy reference, fp32"
    ids = engine.tokenizer.encode(SAMPLE_TEXT * 3)
    report = evaluate(engine, ids, window=150)
    total = 0.0
    for window in cut(ids, report.window):
        logits = HuggingFaceLlama(open_checkpoint(checkpoint)).logits(list(window))
        total += float(
            torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]), torch.tensor(window[1:]), reduction="sum")
        )
    assert report.windows >= 3 and report.window == (150 if trained_elsewhere else 64)
    assert report.nats_per_token == pytest.approx(total / report.tokens, rel=1e-5)
    onnx = evaluate(open_logits(exported, tokens=150, threads=1), ids, window=150)
    assert onnx.nats_per_token == pytest.approx(total / report.tokens, rel=1e-4)
    if trained_elsewhere:
        assert report.perplexity < 20  # of 512: it has learnt English stories


def test_the_torch_student_says_what_onnx_says(plain_model: Path) -> None:
    """The model that is trained, on the same windows, through torch's cross entropy."""
    from fbiedge.training.checkpoint import load_model

    engine = open_logits(plain_model, tokens=64)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(SAMPLE_TEXT)
    report = evaluate(engine, ids)
    student, total = load_model(plain_model.parent / "checkpoint").eval(), 0.0
    with torch.no_grad():
        for window in map(torch.tensor, cut(ids, 64)):
            logits = student(window[None, :-1])[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    assert report.nats_per_token == pytest.approx(total / report.tokens, rel=1e-4)


def test_checkpoint_and_onnx_agree(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT)
    reports = []
    for model in (plain_model.parent / "checkpoint", plain_model):
        code, out, err = fbiedge("eval", model, "--text", text, "--json")
        assert (code, err) == (0, "")
        *table, last = out.splitlines()
        reports.append(json.loads(last))
        assert re.search(
            r"^perplexity +[\d.]+ \(95 % interval [\d.]+ to [\d.]+, bootstrap over 7 windows\)", out, re.MULTILINE
        )
        assert len(table) == 6
    assert reports[0]["engine"] == "numpy reference, fp32" and "kernels, fp32 activations" in reports[1]["engine"]
    assert reports[0]["window"] == 64 and reports[0]["tokens"] == 63 * reports[0]["windows"]
    assert reports[0]["perplexity"] == pytest.approx(reports[1]["perplexity"], rel=1e-5)


def test_max_tokens(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 1000)
    _, out, _ = fbiedge(
        "eval", plain_model, "--text", tmp_path / "text.txt", "--max-tokens", 40, "--window", 16, "--json"
    )
    report = json.loads(out.splitlines()[-1])
    assert (report["windows"], report["tokens"], report["left_out"]) == (2, 30, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "1"], "--window is 1, expected at least 2"),
        (["--max-tokens", "1"], "--max-tokens is 1, expected at least 2"),
        (["--threads", "0"], "threads is 0, expected"),
    ],
)
def test_unusable_options(fbiedge: Run, plain_model: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "text.txt").write_text(SAMPLE_TEXT)
    assert message in one_error_line(fbiedge("eval", plain_model, "--text", tmp_path / "text.txt", *options))


def test_bits_per_byte(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    """With a token a byte: the loss in bits. Comparable with any other tokenizer."""
    (tmp_path / "text.txt").write_text("é" + SAMPLE_TEXT)
    _, out, _ = fbiedge("eval", plain_model, "--text", tmp_path / "text.txt", "--json")
    report = json.loads(out.splitlines()[-1])
    assert report["bits_per_byte"] == pytest.approx(report["nats_per_token"] / math.log(2))
    assert evaluate(Fake(), [0] * 10).bits_per_byte is None


def test_bits_per_byte_of_longer_tokens(stories260k: Path) -> None:
    engine = open_logits(stories260k, tokens=512)
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(SAMPLE_TEXT)
    report = evaluate(engine, ids)
    size = len(SAMPLE_TEXT.encode()) + 1  # the space that Llama's tokenizer puts before a text
    assert report.bits_per_byte == pytest.approx(report.nats_per_token * report.tokens / math.log(2) / size)


def test_bad_input(fbiedge: Run, plain_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("")
    assert "expected at least 2" in one_error_line(fbiedge("eval", plain_model, "--text", text))
    text.write_text(SAMPLE_TEXT)
    assert "can't read the text" in one_error_line(fbiedge("eval", plain_model, "--text", tmp_path / "no.txt"))
    assert "does not exist" in one_error_line(fbiedge("eval", tmp_path / "no.onnx", "--text", text))
    tiny_checkpoint(tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    assert "has no tokenizer" in one_error_line(fbiedge("eval", tmp_path / "mute", "--text", text))
    (tmp_path / "mute/tokenizer.json").write_text("{")
    assert "tokenizer can't be read" in one_error_line(fbiedge("eval", tmp_path / "mute", "--text", text))
    tiny_checkpoint(tmp_path / "small", vocab_size=100)
    assert "but the vocabulary is 100" in one_error_line(fbiedge("eval", tmp_path / "small", "--text", text))

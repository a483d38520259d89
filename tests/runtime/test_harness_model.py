"""Our runtime as a model of lm-evaluation-harness: what the harness's own model says of the same weights."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from support.huggingface_folders import llama_folder
from support.tiny_gguf import tiny_gguf
from support.tiny_model import tiny_model

from fbiedge.engines import open_logits
from fbiedge.errors import ModelFileError, UsageError
from fbiedge.harness.model import FbiEdgeLM
from fbiedge.sample_text import SAMPLE_TEXT

OPTIONS = [
    ("Once upon a time there was", " a small town"),
    ("Once upon a time there was", " an old mouse, who"),
    ("Once upon a time there was", "n't"),
    ("Question: why?\nAnswer:", " because"),
    ("Question: why?\nAnswer: ", "because"),  # the space goes over to the answer
    ("", "Nothing before it"),
    ("", " "),
    ("<s>It begins", " with its own beginning"),
    ("Ünïcode 🚀", " naïve 日本"),
    (SAMPLE_TEXT, " The end."),  # longer than the context: cut from the left
    (SAMPLE_TEXT[:40], SAMPLE_TEXT[40:100]),
]


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_folder(tmp_path_factory.mktemp("llama") / "model", tokenizer=request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def ours(folder: Path) -> FbiEdgeLM:
    return FbiEdgeLM(folder)


def test_known_to_the_harness_by_name(folder: Path) -> None:
    model = get_model("fbiedge").create_from_arg_string(
        f"path={folder},max_length=40", {"batch_size": 8, "device": "cpu"}
    )
    assert isinstance(model, FbiEdgeLM) and model.max_length == 40


def test_tokens(ours: FbiEdgeLM, theirs: HFLM) -> None:
    assert ours.prefix_token_id == theirs.prefix_token_id == 1 and ours.eot_token_id == theirs.eot_token_id == 2
    assert ours.max_length == theirs.max_length == 64
    for text in ("", " ", "Once upon", "<s>Once", SAMPLE_TEXT, "🚀"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)


def test_loglikelihoods(ours: FbiEdgeLM, theirs: HFLM) -> None:
    got = ours.loglikelihood(requests("loglikelihood", OPTIONS))
    expected = theirs.loglikelihood(requests("loglikelihood", OPTIONS))
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert np.allclose([value for value, _ in got], [value for value, _ in expected], rtol=1e-5, atol=1e-4)
    assert len({value for value, _ in got}) == len(OPTIONS) - 1  # one is asked in two ways


def test_answers_that_the_model_would_give(ours: FbiEdgeLM, theirs: HFLM) -> None:
    """And those that are wrong in the last token, or in the first."""
    context = ours.tok_encode("The wind blew so hard")
    drawn = open_logits(ours.engine.path, tokens=64)
    row, answer = drawn.logits(context)[-1], []
    for _ in range(6):
        answer.append(int(row.argmax()))
        row = drawn.logits(answer[-1:])[-1]
    answers = [answer, answer[:1], [*answer[:-1], answer[-1] ^ 1], [answer[0] ^ 1, *answer[1:]]]
    asked = [(("", ""), context, one) for one in answers]
    got, expected = ours._loglikelihood_tokens(asked), theirs._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected] == [True, True, False, False]
    assert np.allclose([value for value, _ in got], [value for value, _ in expected], rtol=1e-5, atol=1e-4)


def test_rolling(ours: FbiEdgeLM, theirs: HFLM) -> None:
    texts = [(SAMPLE_TEXT,), ("short",), (SAMPLE_TEXT[:100],)]
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert np.allclose(got, expected, rtol=1e-5)


def test_generation(ours: FbiEdgeLM, theirs: HFLM) -> None:
    options: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 12},
        {"until": ["a", "e"], "max_gen_toks": 20},
        {"until": "t", "max_gen_toks": 20, "do_sample": False},
    ]
    asked = [(text, one) for text in ("Once upon a time", SAMPLE_TEXT) for one in options]
    got, expected = (model.generate_until(requests("generate_until", asked)) for model in (ours, theirs))
    for mine, other in zip(got, expected, strict=True):
        # Tokens of one byte that make no UTF-8: the library replaces the whole run, byte by byte; we what is wrong in it.
        assert mine == other or (ours._tokenizer.byte_fallback and "\ufffd" in other)
    assert any(got) and got[0] != got[1]


def test_generation_by_chance_repeats(ours: FbiEdgeLM) -> None:
    asked = [("Once", {"max_gen_toks": 30, "do_sample": True, "temperature": 1.5, "until": []})]
    first, second = (ours.generate_until(requests("generate_until", asked)) for _ in range(2))
    assert first == second != ours.generate_until(requests("generate_until", [("Once", {"max_gen_toks": 30})]))


def test_logits_that_are_no_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer would be the right one, or none."""
    engine = open_logits(folder, tokens=64)
    monkeypatch.setattr(engine, "logits", lambda ids: np.full((len(ids), 400), np.nan, np.float32))
    for kind, asked in (("loglikelihood", ("a", " b")), ("generate_until", ("a", {"max_gen_toks": 3}))):
        with pytest.raises(ModelFileError, match="not finite"):
            getattr(FbiEdgeLM(engine), kind)(requests(kind, [asked]))


class Counting:
    """An engine that counts the tokens it reads."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.read = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def feed(self, ids: Sequence[int]) -> None:
        self.read += len(ids)
        self._engine.feed(ids)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.read += len(ids)
        rows: np.ndarray = self._engine.logits(ids)
        return rows


def test_what_options_share_is_read_once(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "model")
    engine = Counting(open_logits(folder, tokens=2048))
    model = FbiEdgeLM(engine)  # type: ignore[arg-type]
    question = "Once upon a time there was"
    asked = [(question, f" {answer}") for answer in ("a", "one", "no", "a mouse")]
    expected = model.loglikelihood(requests("loglikelihood", asked))
    context = len(model.tok_encode(question))
    answers = [len(model._encode_pair(*one)[1]) for one in asked]
    # The context but its last token once; for each answer that token, and all of the answer but its last.
    assert engine.read == context - 1 + sum(answers)
    before = engine.read
    again = model.loglikelihood(requests("loglikelihood", asked[:1] * 50))
    assert engine.read - before <= context + 50 * answers[0]
    assert {one for one, _ in again} == {expected[0][0]}


def test_onnx_says_what_its_checkpoint_says(plain_model: Path) -> None:
    """Also of the cache that is cut back and goes on, in our kernels."""
    asked = requests("loglikelihood", [one for one in OPTIONS if one != (SAMPLE_TEXT, " The end.")][:6])
    exact = FbiEdgeLM(plain_model.parent / "checkpoint").loglikelihood(asked)
    got = FbiEdgeLM(plain_model).loglikelihood(asked)
    assert np.allclose([value for value, _ in got], [value for value, _ in exact], rtol=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in exact]


def test_llama_cpp_says_what_the_checkpoint_says(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path, max_position_embeddings=512)
    asked = requests("loglikelihood", OPTIONS[:4])
    exact = FbiEdgeLM(tmp_path / "checkpoint").loglikelihood(asked)
    got = FbiEdgeLM(model, threads=1).loglikelihood(asked)  # its cache is of half precision
    assert np.allclose([value for value, _ in got], [value for value, _ in exact], rtol=1e-3)


def test_errors(tmp_path: Path, folder: Path, ours: FbiEdgeLM) -> None:
    with pytest.raises(UsageError, match="expected 1 to 64, which is the window"):
        ours.loglikelihood(requests("loglikelihood", [("x", SAMPLE_TEXT)]))
    with pytest.raises(UsageError, match="less than the window"):
        ours.generate_until(requests("generate_until", [("x", {"max_gen_toks": 64})]))
    mute = tiny_model(tmp_path / "mute")
    config = mute.parent / "checkpoint/tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(UsageError, match="no token that begins or ends a text"):
        FbiEdgeLM(mute.parent / "checkpoint").loglikelihood(requests("loglikelihood", [("", "x")]))
    (mute.parent / "checkpoint/tokenizer.json").unlink()
    with pytest.raises(UsageError, match="has no tokenizer"):
        FbiEdgeLM(mute.parent / "checkpoint")


def test_the_harness_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m fbiedge.harness` is lm_eval's, with our model among the others. (A whole run reads 14,000 tasks.)"""
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(get_model("fbiedge")))
    runpy.run_module("fbiedge.harness", run_name="__main__")
    assert seen == [FbiEdgeLM]

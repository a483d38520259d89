"""The bundled model in stock llama.cpp: its GGUF is exact, says the same, and comes back as the same ONNX."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundled import MODEL, PROMPT, UNSEEN_STORY, golden

from fbiedge.engines import open_logits
from fbiedge.exporters.gguf import export_gguf, open_gguf
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.llama_cpp_session import LlamaCppSession
from fbiedge.model_file import ModelFile
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer
from fbiedge.verify import Bounds, Verification, common_ids, verify

FP32: dict[str, Any] = {"accuracy_level": "fp32", "head": "fp32", "kv_cache": "fp32"}
HELD_OUT = "corpora/tinystories/valid_sample_794k.txt.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf with its adapter, and fp32.onnx, the same weights with fp32 activations."""
    path = tmp_path_factory.mktemp("bundled")
    weights = open_onnx(MODEL)
    assert export_gguf(weights, path / "model.gguf").exact
    export_onnx(weights, path / "fp32.onnx", **FP32)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_greedy_text_is_the_golden_one(threads: int, folder: Path) -> None:
    """Its first 64 tokens: llama.cpp rounds activations to 8 bits, and the margins there allow that."""
    session = LlamaCppSession.open(folder / "model.gguf", threads=threads)
    tokenizer = Tokenizer.from_model(session.model)
    ids: list[int] = []
    logits = session.forward(tokenizer.encode(PROMPT))
    while len(ids) < 64:
        ids.append(int(np.argmax(logits)))
        logits = session.forward(ids[-1:])
    text = tokenizer.decode(ids)
    assert text == golden("fp32")[: len(text)]


def compare(folder: Path, text: str, bounds: Bounds) -> Verification:
    ours = open_logits(folder / "fp32.onnx", tokens=512)
    theirs = open_logits(folder / "model.gguf", tokens=512, threads=1)
    return verify(ours, theirs, common_ids(ours, theirs, text)[:10_000], bounds=bounds)


def test_held_out_stories_are_predicted_alike(folder: Path, shared_data: Path) -> None:
    with lzma.open(shared_data / HELD_OUT, "rt", encoding="utf-8") as file:
        text = file.read(100_000)
    found = compare(folder, text, Bounds(max_kl=1e-3, min_agreement=0.99))
    assert found.tokens == 10_000
    assert not found.beyond, found.lines()


def test_an_unseen_story_is_predicted_alike(folder: Path) -> None:
    """In short, where the held-out stories are not at hand: of 83 tokens, two may be near ties that differ."""
    found = compare(folder, UNSEEN_STORY, Bounds(max_kl=1e-3, min_agreement=0.97))
    assert not found.beyond, found.lines()


def test_the_circle_closes(folder: Path) -> None:
    """checkpoint -> GGUF -> ONNX = checkpoint -> ONNX. The head in float32, since fp16 would round it."""
    export_gguf(open_onnx(MODEL), folder / "exact.gguf", head="f32")
    export_onnx(open_gguf(folder / "exact.gguf"), folder / "back.onnx", **FP32)
    ids = Tokenizer.from_model(ModelFile.open(folder / "back.onnx")).encode(UNSEEN_STORY)
    straight, round_about = (Session.open(folder / name).all_logits(ids) for name in ("fp32.onnx", "back.onnx"))
    np.testing.assert_allclose(round_about, straight, atol=1e-5 * np.abs(straight).max())

"""The bundled model, whole: one golden text through every engine, and what its model card promises.

tests/golden/fp32.txt   greedy, fp32 activations: numpy reference = torch = ONNX on every ISA = stock ops
tests/golden/int8.txt   greedy, the default level: every ISA and thread count
Both are continuations of PROMPT by TOKENS tokens. llama.cpp's side is in test_default_gguf.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundled import MODEL, PROMPT, UNSEEN_STORY, golden

from fbiedge import ops_library
from fbiedge.exporters.onnx import export_onnx, open_onnx
from fbiedge.metrics import perplexity
from fbiedge.reference import Reference
from fbiedge.session import Session
from fbiedge.tokenizer import Tokenizer
from fbiedge.training.model import BinaryLinear, Llama
from fbiedge.weights import Weights

TOKENS = 96


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_onnx(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_model(Session.open(MODEL, threads=1).model)


@pytest.fixture(scope="module")
def fp32_model(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with fp32 activations and an fp32 KV cache; its weights are the bundled ones."""
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_onnx(weights, path, accuracy_level="fp32", kv_cache="fp32")
    return path


def greedy(path: Path, tokenizer: Tokenizer, threads: int = 1) -> str:
    session = Session.open(path, threads=threads)
    ids: list[int] = []
    logits = session.forward(tokenizer.encode(PROMPT))
    while len(ids) < TOKENS:
        ids.append(int(np.argmax(logits)))
        logits = session.forward(ids[-1:])
    return tokenizer.decode(ids)


def torch_model(weights: Weights) -> Llama:
    """The training package's Llama with the packed weights: the latents are the signs."""
    model = Llama(weights.config)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, BinaryLinear):
            packed = weights.linear(name)
            signs = np.unpackbits(packed.packed, axis=1, count=packed.k, bitorder="little") * 2.0 - 1.0
            state[f"{name}.weight"] = torch.from_numpy(signs).float()
            state[f"{name}.wscale"] = torch.tensor(packed.alpha).reshape(module.wscale.shape)
            state[f"{name}.wbias"] = torch.tensor(packed.beta).reshape(module.wbias.shape)
    for name in model.state_dict():
        if name not in state:
            state[name] = torch.tensor(weights.tensor(name))
    model.load_state_dict(state)
    return model.eval()


def test_the_numpy_reference_writes_the_golden_text_with_a_margin(weights: Weights, tokenizer: Tokenizer) -> None:
    reference = Reference(weights)
    prompt, ids, margins = list(tokenizer.encode(PROMPT)), [], []
    logits = reference.logits(prompt)[-1]
    while len(ids) < TOKENS:
        second, first = np.partition(logits, -2)[-2:]
        margins.append(float(first - second))
        ids.append(int(np.argmax(logits)))
        logits = reference.logits(ids[-1:])[-1]
    assert tokenizer.decode(ids) == golden("fp32")
    assert min(margins) > 1e-2, "a near tie would let rounding choose; take another prompt"


def test_torch_writes_it(weights: Weights, tokenizer: Tokenizer) -> None:
    model = torch_model(weights)
    prompt = list(tokenizer.encode(PROMPT))
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + TOKENS:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids[len(prompt) :]) == golden("fp32")


@pytest.mark.parametrize("isa", ops_library.available_isas())
def test_onnx_writes_it_on_every_isa(
    isa: str, fp32_model: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", isa)
    assert Session.open(fp32_model).isa == isa
    assert greedy(fp32_model, tokenizer) == golden("fp32")


def test_stock_ops_write_it(fp32_model: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", "/nonexistent/library.so")
    assert Session.open(fp32_model).isa is None
    assert greedy(fp32_model, tokenizer) == golden("fp32")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ops_library.available_isas())
def test_the_default_level_has_its_own_text(
    isa: str, threads: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FBIEDGE_ISA", isa)
    assert Session.open(MODEL).accuracy_level == "int8"
    assert greedy(MODEL, tokenizer, threads) == golden("int8")


def test_stock_ops_agree_with_the_default_level(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock int8 kernels quantise otherwise (blocks of 32 inputs), so logits differ; at least 95 % of argmaxes agree."""
    ids = [*tokenizer.encode(PROMPT), *tokenizer.encode(golden("int8"))]
    ours = Session.open(MODEL).all_logits(ids)
    monkeypatch.setenv("FBIEDGE_OPS_LIBRARY", "/nonexistent/library.so")
    stock = Session.open(MODEL).all_logits(ids)
    assert (ours.argmax(-1) == stock.argmax(-1)).mean() >= 0.95


def loss_of(logits: np.ndarray, ids: Sequence[int]) -> float:
    return perplexity(logits[:-1], ids[1:])


def test_it_knows_simple_english(weights: Weights, tokenizer: Tokenizer) -> None:
    """Perplexity on a story written for this test: far below that of word salad, and the int8 level costs under 1 %."""
    ids = list(tokenizer.encode(UNSEEN_STORY))
    shuffled = list(np.random.default_rng(0).permutation(ids[1:]))
    exact = loss_of(Reference(weights).logits(ids), ids)
    salad = loss_of(Reference(weights).logits([ids[0], *shuffled]), [ids[0], *shuffled])
    int8 = loss_of(Session.open(MODEL).all_logits(ids), ids)
    assert exact < 12 and salad > 20 * exact
    assert abs(int8 / exact - 1) < 0.01


def test_it_is_small_and_says_what_it_is() -> None:
    assert MODEL.stat().st_size <= 12_000_000
    session = Session.open(MODEL)
    assert session.model.config.scaling_pattern == "column"
    assert session.model.metadata["chat_template"]
    rows = json.loads(session.model.metadata["inventory"])
    binary = [row for row in rows if row["form"].startswith("1-bit")]
    assert binary and all(row["bits_per_weight"] < 1.3 for row in binary)


def test_environment_is_clean() -> None:
    """A forced ISA or library in the developer's shell would make the tests above say less than they claim."""
    assert "FBIEDGE_ISA" not in os.environ and "FBIEDGE_OPS_LIBRARY" not in os.environ

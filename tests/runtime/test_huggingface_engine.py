"""Models that the numpy reference has no formulas for, through transformers: the logits are that library's own."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.huggingface_folders import VOCAB_SIZE, llama_folder, model_folder
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fbiedge.engines import open_logits
from fbiedge.sample_text import SAMPLE_TEXT

from .conftest import Run, one_error_line

SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
KINDS: dict[str, Any] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=VOCAB_SIZE, n_positions=64, n_embd=32, n_layer=2, n_head=2)),
    # Its window slides after 8 tokens, so that its cache can't go back.
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**SIZES, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, sliding_window=8),
    ),
    "mamba": (MambaForCausalLM, MambaConfig(**SIZES, state_size=4)),
}


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / request.param, *KINDS[request.param])


def test_logits_at_once_in_parts_and_after_going_back(folder: Path) -> None:
    engine = open_logits(folder, tokens=50)
    ids = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB_SIZE, 40)]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0].numpy()
    assert engine.vocab_size == VOCAB_SIZE and engine.capacity == 50
    assert engine.description.startswith("transformers ") and folder.name in engine.description
    assert np.allclose(engine.logits(ids), expected, atol=1e-5)
    engine.truncate(20)
    assert np.allclose(engine.logits(ids[20:30]), expected[20:30], atol=1e-5)
    engine.truncate(0)
    engine.feed(ids[:5])
    engine.truncate(5)
    assert np.allclose(engine.logits(ids[5:7]), expected[5:7], atol=1e-5)
    engine.reset()
    assert np.allclose(engine.logits(ids[:1]), expected[:1], atol=1e-5)


def test_perplexity_as_torch_says(fbiedge: Run, tmp_path: Path) -> None:
    """Of a GPT-2 through the command, and of a full-precision Llama, which numpy runs: both are windows of 64."""
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT * 3)
    for path in (model_folder(tmp_path / "gpt2", *KINDS["gpt2"]), llama_folder(tmp_path / "llama", tokenizer="pieces")):
        code, out, err = fbiedge("eval", path, "--text", text, "--json")
        assert (code, err) == (0, "")
        report = json.loads(out.splitlines()[-1])
        tokenizer = open_logits(path, tokens=64).tokenizer
        assert tokenizer is not None
        ids = torch.tensor(tokenizer.encode(SAMPLE_TEXT * 3))
        windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
        with torch.no_grad():
            loss = AutoModelForCausalLM.from_pretrained(path)(windows, labels=windows).loss.item()
        assert report["windows"] == len(windows) > 3
        assert report["nats_per_token"] == pytest.approx(loss, rel=1e-5)


def test_the_tokenizer_that_transformers_makes(tmp_path: Path) -> None:
    """Of GPT-2's own two files."""
    folder = model_folder(tmp_path / "gpt2", *KINDS["gpt2"])
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    names = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = open_logits(folder, tokens=64).tokenizer
    assert tokenizer is not None and tokenizer.eos_token == "</s>"
    assert tokenizer.decode(tokenizer.encode("the wind")) == "the wind"


def test_what_cannot_be_opened(fbiedge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE_TEXT)
    folder = model_folder(tmp_path / "gpt2", *KINDS["gpt2"])

    def error() -> str:
        return one_error_line(fbiedge("eval", folder, "--text", text))

    tensors = load_file(folder / "model.safetensors")
    dropped = next(name for name in tensors if "attn" in name)
    save_file({name: value for name, value in tensors.items() if name != dropped}, folder / "model.safetensors")
    assert "is no tensor that a gpt2 in this folder can do with or without" in error()
    save_file(tensors | {"transformer.h.0.attn.c_attn.wscale": np.ones(1, np.float32)}, folder / "model.safetensors")
    assert "wscale" in error()
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert f"transformers can't open {folder}" in error()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "never\nheard"}))
    assert f"transformers can't open {folder}" in error()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "which needs transformers and torch to run; transformers isn't installed" in error()


def test_code_in_a_folder_is_never_run(fbiedge: Run, tmp_path: Path) -> None:
    """Neither that of a model, of a known type or not, nor that of its tokenizer, nor a pickle's."""
    text, ran = tmp_path / "text.txt", tmp_path / "ran"
    text.write_text(SAMPLE_TEXT)
    folder = model_folder(tmp_path / "model", *KINDS["gpt2"])
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config | own | {"model_type": "unheard"}))
    assert f"transformers can't open {folder}" in one_error_line(fbiedge("eval", folder, "--text", text))
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Own", None]}}))
    assert "has no tokenizer" in one_error_line(fbiedge("eval", folder, "--text", text))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Opener(ran)))
    assert f"transformers can't open {folder}" in one_error_line(fbiedge("eval", folder, "--text", text))
    assert not ran.exists()


class Opener:
    """Whose pickle opens a file for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_model_that_looks_ahead(fbiedge: Run, tmp_path: Path) -> None:
    """BERT opens as a causal model, and its logits at a place know the token that they should predict."""
    (tmp_path / "text.txt").write_text(SAMPLE_TEXT)
    sizes = {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.4}
    folder = model_folder(tmp_path / "bert", BertLMHeadModel, BertConfig(**SIZES, **sizes))
    error = one_error_line(fbiedge("eval", folder, "--text", tmp_path / "text.txt"))
    assert "looks at what follows a token; expected a causal language model" in error


def test_a_llama_with_biases_is_none_of_the_reference(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama")
    assert open_logits(folder, tokens=64).description == "numpy reference, fp32"
    config = LlamaForCausalLM.from_pretrained(folder).config
    config.attention_bias = True
    shutil.rmtree(folder)
    assert "transformers" in open_logits(model_folder(folder, LlamaForCausalLM, config), tokens=64).description

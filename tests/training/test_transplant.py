"""A model with another vocabulary: its rows are those of the same bytes, and it learns far sooner than a new one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_run import DOCUMENTS, model_config, training_config
from tokenizers import Tokenizer as Tokenizers
from tokenizers import decoders, models

from fbiedge.cli import run as fbiedge
from fbiedge.initialize import init_checkpoint
from fbiedge.tokenizer import Tokenizer
from fbiedge.training.checkpoint import load_model
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.tokenizer import BOS, EOS, train_tokenizer
from fbiedge.transplant import transplant
from fbiedge.weights import open_checkpoint


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller tokenizer than the teacher's (300), of its own text and a marker."""
    folder = tmp_path_factory.mktemp("vocabulary")
    train_tokenizer(DOCUMENTS, 285, ("<|##|>",)).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": BOS, "eos_token": EOS, "chat_template": "x"})
    )
    return folder


def rows(checkpoint: Path) -> dict[bytes, np.ndarray]:
    """Embedding and head side by side, by what a piece spells."""
    weights = open_checkpoint(checkpoint)
    tokenizer = Tokenizer(weights.files["tokenizer.json"])
    both = np.concatenate([weights.tensor(n) for n in ("model.embed_tokens.weight", "lm_head.weight")], axis=1)
    return {tokenizer.token_bytes(token_id): both[token_id] for token_id in range(tokenizer.vocab_size)}


def test_its_own_vocabulary_changes_nothing(teacher: Path, tmp_path: Path) -> None:
    found = transplant(teacher, teacher / "tokenizer.json", tmp_path / "same")
    assert (found.pieces, found.own, found.spelled) == (300, 300, 0)
    ids = torch.arange(3, 35)[None]
    assert torch.equal(load_model(teacher)(ids), load_model(tmp_path / "same")(ids))


def test_pieces_have_the_rows_of_the_bytes_they_spell(
    teacher: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fbiedge(["transplant", str(teacher), str(vocabulary / "tokenizer.json"), "-o", str(out)]) == 0
    old, new = rows(teacher), rows(out)
    assert len(new) == 285
    shared = old.keys() & new.keys()
    assert len(shared) > 250
    for text in shared:
        np.testing.assert_array_equal(new[text], old[text])
    spelled = [old[bytes([byte])] for byte in b"<|##|>"]
    np.testing.assert_allclose(new[b"<|##|>"], np.mean(spelled, axis=0), rtol=1e-5, atol=1e-7)
    assert f"285 pieces, {len(shared)} with a row of the model's" in capsys.readouterr().out
    config = open_checkpoint(out).config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (285, 1, 2)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "x"
    before, after = open_checkpoint(teacher), open_checkpoint(out)
    np.testing.assert_array_equal(*(w.tensor("model.layers.1.mlp.up_proj.weight") for w in (before, after)))


def test_it_learns_sooner_than_a_new_model(teacher: Path, vocabulary: Path, text: Path, tmp_path: Path) -> None:
    transplant(teacher, vocabulary, tmp_path / "start")
    config = open_checkpoint(tmp_path / "start").config
    training = training_config(steps=15, eval_every=15)
    held_out = []
    for init in (str(tmp_path / "start"), None):
        run = tmp_path / f"run-{init is None}"
        plan = RunPlan(model=config, training=training, teacher=None, init=init)
        prepare_run(run, plan, [text], [], None if init else vocabulary / "tokenizer.json")
        held_out.append(list(execute_run(run))[-1].eval_loss)
    assert held_out[0] is not None
    assert held_out[1] is not None
    assert held_out[0] < 0.5 * held_out[1]


def test_what_cannot_be_transplanted_is_named(
    teacher: Path, vocabulary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init_checkpoint(model_config("column"), tmp_path / "binary")
    endless = tmp_path / "endless"
    endless.mkdir()
    (endless / "tokenizer.json").write_text((vocabulary / "tokenizer.json").read_text())
    (endless / "tokenizer_config.json").write_text('{"eos_token": "<|stop|>"}')
    (tmp_path / "none").mkdir()
    (tmp_path / "odd.json").write_text("{}")
    init_checkpoint(model_config("none", model_type="qwen3"), tmp_path / "qwen3")
    for model, tokenizer, message in (
        (tmp_path / "binary", vocabulary, "is binary (column), expected full precision; transplant its teacher"),
        (teacher, tmp_path / "none", "has no tokenizer.json; name one"),
        (teacher, tmp_path / "none" / "tokenizer.json", "can't read"),
        (teacher, endless, "has no <|stop|>; name both ends in tokenizer_config.json"),
        (tmp_path / "none", vocabulary, "config.json"),
        (tmp_path / "qwen3", vocabulary, "is a qwen3; training knows a Llama with unscaled RoPE only"),
        (teacher, tmp_path / "odd.json", "odd.json can't be read; name a tokenizer.json"),
    ):
        assert fbiedge(["transplant", str(model), str(tokenizer), "-o", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert fbiedge(["transplant", str(teacher), str(vocabulary), "-o", str(tmp_path / "binary")]) == 2
    assert "holds a checkpoint already, which would be replaced" in capsys.readouterr().err


def test_byte_tokens_stand_for_no_text(teacher: Path, vocabulary: Path, tmp_path: Path) -> None:
    """Llama-2's tokenizer has each byte as <0x..> before the pieces of text, which are what was trained."""
    letters = [chr(code) for code in range(97, 123)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *letters[:15]]
    whole = Tokenizers(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    whole.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    source = tmp_path / "source"
    shutil.copytree(teacher, source)
    (source / "tokenizer.json").write_text(whole.to_str())
    transplant(source, vocabulary, tmp_path / "out")
    old, new = open_checkpoint(source), rows(tmp_path / "out")
    embedding = old.tensor("model.embed_tokens.weight")
    width = embedding.shape[1]
    for letter in "ano":
        at = pieces.index(letter)
        np.testing.assert_array_equal(new[letter.encode()][:width], embedding[at])
    np.testing.assert_array_equal(new[b"z"][:width], embedding[pieces.index("<0x7A>")])

"""The held-out loss of a whole text, against a plain sum over its tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fbiedge.config import ModelConfig
from fbiedge.errors import UsageError
from fbiedge.evaluation import encode
from fbiedge.tokenizer import Tokenizer
from fbiedge.training.evaluation import held_out_loss
from fbiedge.training.model import Llama
from fbiedge.training.tokenizer import BOS, EOS, train_tokenizer


def test_a_marker_that_is_a_token_stays_one() -> None:
    tokenizer = train_tokenizer(["The hen saw a fox."], 262, ("<|endoftext|>",))
    known = Tokenizer(tokenizer.to_str(), {"bos_token": BOS, "eos_token": EOS})
    ids = encode(known, "The hen.<|endoftext|>The hen.", 262)
    assert ids.count(3) == 1 and 2 not in ids


def test_it_is_the_mean_over_every_whole_window(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"The hen saw {i} foxes." for i in range(40)))
    tokenizer = train_tokenizer([text.read_text()], 280)
    model = Llama(
        ModelConfig(
            vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=16,
        )
    ).initialize(3, std=0.3)  # fmt: skip
    loss = held_out_loss(model, text, tokenizer, tmp_path / "shard")

    ids: list[int] = []
    for i in range(40):
        ids += [1, *tokenizer.encode(f"The hen saw {i} foxes.", add_special_tokens=False).ids, 2]
    windows = (len(ids) - 1) // 16
    total = 0.0
    for w in range(windows):
        with torch.no_grad():
            log_p = model(torch.tensor([ids[16 * w : 16 * w + 16]]))[0].log_softmax(-1)
        total -= sum(log_p[t, ids[16 * w + t + 1]].item() for t in range(16))
    assert windows > 9 and loss.tokens == 16 * windows  # more than one batch of windows
    assert loss.nats_per_token == pytest.approx(total / loss.tokens, rel=1e-5)
    assert loss.perplexity == pytest.approx(math.exp(loss.nats_per_token))

    known = Tokenizer(tokenizer.to_str(), {"bos_token": BOS, "eos_token": EOS})
    assert encode(known, text.read_text(), 280) == ids, "fbiedge eval reads the same documents"

    text.write_text("The hen.")
    with pytest.raises(UsageError, match="expected 17 or more; give a longer text"):
        held_out_loss(model, text, tokenizer, tmp_path / "shard")

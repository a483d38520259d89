"""Text files -> shards -> batches: nothing lost, nothing twice, any step rebuilt alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from fbiedge.errors import UsageError
from fbiedge.training.data import Batches
from fbiedge.training.documents import encode, read_documents, split_held_out
from fbiedge.training.shards import Shard, open_shard, write_shard
from fbiedge.training.tokenizer import train_tokenizer

TEXT = "The cat sat on the mat.\n<|endoftext|>\nA dog ran to the cat, and the cat ran up.\n<|endofdoc|>\n\nOne \u00e9t\u00e9 \U0001f408."


def stream(tokens: np.ndarray) -> Shard:
    return Shard(path=Path("s.tokens"), tokens=tokens)


def test_documents_are_split_at_their_markers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    documents = list(read_documents([tmp_path / "a.txt"]))
    assert documents == [
        "The cat sat on the mat.",
        "A dog ran to the cat, and the cat ran up.",
        "One \u00e9t\u00e9 \U0001f408.",
    ]


def test_a_shard_decodes_to_its_documents_between_bos_and_eos(tmp_path: Path) -> None:
    documents = ["The cat sat.", "One \u00e9t\u00e9 \U0001f408."] * 40
    tokenizer = train_tokenizer(documents, 270)
    total = write_shard(tmp_path / "s.tokens", encode(documents, tokenizer, 1, 2), np.uint16)
    shard = open_shard(tmp_path / "s.tokens").tokens
    assert shard.shape == (total,) and shard.dtype == np.uint16
    assert (shard == 1).sum() == (shard == 2).sum() == len(documents)
    starts = np.flatnonzero(shard == 1)
    decoded = [
        tokenizer.decode(shard[a + 1 : b - 1].tolist()) for a, b in zip(starts, [*starts[1:], total], strict=True)
    ]
    assert decoded == documents


def test_ids_may_be_more_than_their_number(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 70_000}, unk_token="<unk>"))
    (ids,) = encode(["cat"], tokenizer, 1, 2)
    assert ids.dtype == np.uint32 and ids.tolist() == [1, 70_000, 2]


def test_special_tokens_are_one_id_and_vocabulary_is_exact() -> None:
    documents = [f"<|user|>hello number {i}<|end|>" for i in range(200)]
    tokenizer = train_tokenizer(documents, 280, ("<|user|>", "<|end|>"))
    assert tokenizer.get_vocab_size() == 280
    ids = tokenizer.encode("<|user|>hello<|end|>", add_special_tokens=False).ids
    assert ids[0] == tokenizer.token_to_id("<|user|>") == 3 and ids[-1] == tokenizer.token_to_id("<|end|>") == 4
    assert tokenizer.encode("hello").ids[0] == 1  # <s>, as every document of a shard
    with pytest.raises(UsageError, match="gave .* pieces, 5000 were asked for"):
        train_tokenizer(documents, 5000)
    with pytest.raises(UsageError, match="too small"):
        train_tokenizer(documents, 100)


def test_an_epoch_visits_every_window_once_and_targets_follow_inputs() -> None:
    tokens = np.arange(1003, dtype=np.uint32)
    batches = Batches([stream(tokens)], batch_size=3, sequence_length=10, seed=5)
    steps = batches.windows // 3
    starts = []
    for step in range(steps):
        inputs, targets = batches.batch(step)
        assert (targets == inputs + 1).all() and (np.diff(inputs, axis=1) == 1).all()
        starts += inputs[:, 0].tolist()
    assert len(set(starts)) == len(starts) == steps * 3
    assert len({s % 10 for s in starts}) == 1  # one phase an epoch: no two windows overlap
    assert starts != sorted(starts)


def test_processes_see_the_batches_of_one(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 2000).astype(np.uint16)
    whole = Batches([stream(tokens)], 12, 16, seed=1)
    for step in (0, 7, 30):
        parts = [Batches([stream(tokens)], 12, 16, seed=1).batch(step, slice(4 * r, 4 * r + 4)) for r in range(3)]
        for at in (0, 1):
            assert np.array_equal(np.concatenate([part[at] for part in parts]), whole.batch(step)[at])


def test_any_step_can_be_rebuilt_alone_and_epochs_differ() -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 2000).astype(np.uint16)
    straight = Batches([stream(tokens)], 4, 16, seed=1)
    in_order = [straight.batch(step)[0] for step in range(80)]
    alone = [Batches([stream(tokens)], 4, 16, seed=1).batch(step)[0] for step in range(80)]
    assert all(np.array_equal(a, b) for a, b in zip(in_order, alone, strict=True))
    other_seed = Batches([stream(tokens)], 4, 16, seed=2).batch(0)[0]
    assert not np.array_equal(in_order[0], other_seed)


def test_epochs_of_the_same_windows_differ_in_their_order_alone() -> None:
    batches = Batches([stream(np.arange(1000, dtype=np.uint16))], 3, 16, seed=5, same_windows=True)
    epochs = [
        [tuple(batches.batch(step)[0][row]) for step in range(200) for row in range(3)][at * batches.windows :][
            : batches.windows
        ]
        for at in range(2)
    ]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == batches.windows
    other = Batches([stream(np.arange(1000, dtype=np.uint16))], 3, 16, seed=5)
    assert [tuple(row) for row in other.batch(0)[0]] == epochs[0][:3], "the first epoch is that of any run"


@pytest.mark.parametrize("count", [1, 3, 49, 50, 130])
def test_what_is_held_out_is_not_trained_on_and_nothing_is_lost(count: int) -> None:
    documents = [f"{i} " + " ".join(f"w{i}x{j}" for j in range(60)) for i in range(count)]
    train, kept = ([part for part in parts if part] for parts in zip(*split_held_out(documents), strict=True))
    words = [word for document in documents for word in document.split()]
    assert sorted(word for part in (train, kept) for document in part for word in document.split()) == sorted(words)
    assert kept and len(" ".join(kept)) < 0.12 * len(" ".join(documents))


def test_unusable_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"latin1.txt: not UTF-8 text \(byte 3\)"):
        list(read_documents([tmp_path / "latin1.txt"]))
    with pytest.raises(UsageError, match="can't read .*missing.txt: No such file"):
        list(read_documents([tmp_path / "missing.txt"]))
    with pytest.raises(UsageError, match="not a token shard"):
        open_shard(tmp_path / "none.tokens")
    write_shard(tmp_path / "s.tokens", [np.arange(150, dtype=np.uint16)], np.uint16)
    data = (tmp_path / "s.tokens").read_bytes()
    (tmp_path / "s.tokens").write_bytes(data[:-4])
    with pytest.raises(UsageError, match="tokens found, .* expected"):
        open_shard(tmp_path / "s.tokens")
    with pytest.raises(UsageError, match="the training text has 100 tokens, expected 129 or more"):
        Batches([stream(np.zeros(100, np.uint16))], 2, 64, 0)

"""Corpora in shards: every token once, in any number of shards, by any number of processes; damage is named."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.errors import raises_line
from support.tiny_run import DOCUMENTS, model_config, training_config
from tokenizers import Tokenizer

from fbiedge.errors import UsageError
from fbiedge.training import corpus, shards
from fbiedge.training.corpus import DataOptions, Vocabulary, open_part, write_corpus
from fbiedge.training.data import Batches
from fbiedge.training.records import Corrupt
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.sample_shards import Job, run_job, write_sample_shards
from fbiedge.training.shards import Shard, ShardWriter, open_shards
from fbiedge.training.sources import open_sources


@pytest.fixture(scope="session")
def tokenizer(teacher: Path) -> Tokenizer:
    return Tokenizer.from_file(str(teacher / "tokenizer.json"))


def random_shards(folder: Path, sizes: list[int], sample_length: int = 0) -> list[Shard]:
    """Shards whose ids are all different: 0, 1, 2, ..."""
    with ShardWriter(folder, np.uint32) as writer:
        writer.sample_length = sample_length
        start = 0
        for size in sizes:
            writer.add(np.arange(start, start + size, dtype=np.uint32))
            writer.end_shard()
            start += size
    return open_shards(folder)


def epoch_windows(batches: Batches, epoch: int = 0) -> np.ndarray:
    """Windows of one epoch, in the order visited; the batch size must be 1."""
    steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
    return np.stack([np.append(batches.batch(step)[0][0], batches.batch(step)[1][0, -1]) for step in steps])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group_windows", [1, 12, 1 << 24])
def test_an_epoch_visits_every_window_of_every_shard_once(seed: int, group_windows: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 120, size=7).tolist()
    made = random_shards(tmp_path, sizes)
    batches = Batches(made, 1, 8, seed, group_windows=group_windows)
    visited = epoch_windows(batches, epoch=seed)
    assert (np.diff(visited, axis=1) == 1).all()  # no window crosses shards
    starts = visited[:, 0].tolist()
    assert len(set(starts)) == len(starts) == sum(max(0, (size - 1) // 8 - 1) for size in sizes)
    borders = np.cumsum([0, *sizes])
    for first, last in itertools.pairwise(borders):
        assert len({start % 8 for start in starts if first <= start < last}) <= 1  # so no two of a shard overlap


@pytest.mark.parametrize("length", [4, 7, 12])
def test_samples_are_never_crossed_and_sources_come_one_after_the_other(length: int, tmp_path: Path) -> None:
    made = random_shards(tmp_path, [13 * 6, 13 * 3, 13 * 8], sample_length=13)
    batches = Batches(made, 1, length, seed=3)
    visited = epoch_windows(batches)
    per_sample = 12 // length
    assert len(visited) == 17 * per_sample == len(set(visited[:, 0].tolist()))
    assert ((visited[:, 0] // 13) == (visited[:, -1] // 13)).all()
    chunk = np.searchsorted([13 * 6, 13 * 9], visited[:, 0], side="right")
    assert (np.diff(chunk) >= 0).all() and set(chunk.tolist()) == {0, 1, 2}
    assert visited[:, 0].tolist() != sorted(visited[:, 0].tolist())
    with raises_line(UsageError, "sequences of 13 tokens need samples of 14"):
        Batches(made, 1, 13, seed=3)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_any_number_of_processes_reads_the_same_global_batches(processes: int, tmp_path: Path) -> None:
    made = random_shards(tmp_path, [100, 61, 17, 230])
    whole = Batches(made, 6, 8, seed=1, group_windows=10)
    ranks = [Batches(open_shards(tmp_path), 6, 8, seed=1, group_windows=10) for _ in range(processes)]
    share = 6 // processes
    for step in (11, 3, 4, 200):  # in no order: nothing is remembered
        parts = [rank.batch(step, slice(i * share, (i + 1) * share)) for i, rank in enumerate(ranks)]
        for inputs_or_targets in (0, 1):
            together = np.concatenate([part[inputs_or_targets] for part in parts])
            assert np.array_equal(together, whole.batch(step)[inputs_or_targets])


@pytest.mark.parametrize("shard_tokens", [50, 1000, 1 << 28])
def test_texts_are_the_same_tokens_in_any_number_of_shards(
    shard_tokens: int, text: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SHARD_TOKENS", shard_tokens)
    vocabulary = Vocabulary(size=300, tokenizer=tokenizer)
    manifest = write_corpus(tmp_path, open_sources([text], Corrupt()), None, vocabulary, DataOptions(), Corrupt())
    kept, left_out = [], []
    for i, document in enumerate(DOCUMENTS * 2):
        (left_out if i % 50 == 0 else kept).append(document)
    for part, expected in (("train", kept), ("held_out", left_out)):
        tokens = np.concatenate([shard.tokens for shard in open_part(tmp_path, part)])
        decoded = [tokenizer.decode(ids[:-1].tolist()) for ids in np.split(tokens, np.flatnonzero(tokens == 1))[1:]]
        assert decoded == expected
        assert manifest["tokens"][part] == [len(shard.tokens) for shard in open_part(tmp_path, part)]
    assert (len(manifest["tokens"]["train"]) > 1) == (shard_tokens < 1 << 28)


@pytest.mark.parametrize("split", [True, False], ids=["split from the data", "named"])
def test_a_new_tokenizer_never_sees_held_out_texts(split: bool, tmp_path: Path) -> None:
    documents = [f"{'zq' * 200 if i % 50 == 0 else 'plain'} {document}" for i, document in enumerate(DOCUMENTS * 2)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    (tmp_path / "other.txt").write_text("The cat went to the park. " * 20, encoding="utf-8")
    plan = RunPlan(model=model_config("column"), training=training_config(), teacher=None)
    apart = [] if split else [tmp_path / "other.txt"]
    prepare_run(tmp_path / "run", plan, [tmp_path / "text.txt"], apart)
    pieces = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json")).get_vocab()
    assert any("ain" in piece for piece in pieces)
    assert any("zq" in piece for piece in pieces) is not split


def test_reading_stops_after_the_tokens_asked_for(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocabulary, options = Vocabulary(size=300, tokenizer=tokenizer), DataOptions(most_tokens=500)
    manifest = write_corpus(tmp_path, open_sources([text], Corrupt()), None, vocabulary, options, Corrupt())
    assert 500 <= sum(manifest["tokens"]["train"]) < 600


def test_an_attempt_that_was_killed_leaves_nothing_behind(text: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    random_shards(tmp_path / "train", [10] * 5)
    sources, vocabulary = open_sources([text], Corrupt()), Vocabulary(size=300, tokenizer=tokenizer)
    write_corpus(tmp_path, sources, None, vocabulary, DataOptions(), Corrupt())
    assert [path.name for path in sorted((tmp_path / "train").iterdir())] == ["00000.tokens", "00000.tokens.json"]


def amber(folder: Path, chunks: int, lines: int = 60, ids: int = 33) -> Path:
    """Chunks of samples as Amber's, of random ids below 300."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for chunk in range(chunks):
        rows = [json.dumps({"token_ids": row, "source": "x"}) for row in rng.integers(3, 300, (lines, ids)).tolist()]
        (folder / f"train_{chunk:03}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_amber_chunks_are_shards_of_samples(tmp_path: Path) -> None:
    folder = amber(tmp_path / "amber", 3)
    sources = open_sources([folder], Corrupt())
    write_corpus(tmp_path / "c", sources, None, Vocabulary(size=300), DataOptions(), Corrupt())
    train, kept = open_part(tmp_path / "c", "train"), open_part(tmp_path / "c", "held_out")
    assert [(len(s.tokens), s.sample_length) for s in (*train, *kept)] == [(1980, 33), (1980, 33), (1947, 33), (33, 33)]
    rows = [
        json.loads(line)["token_ids"] for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()
    ]
    assert np.concatenate([shard.tokens for shard in (*train, *kept)]).reshape(-1, 33).tolist() == rows


@pytest.mark.parametrize("processes", [1, 2])
def test_sources_are_written_by_any_number_of_processes_and_once(processes: int, tmp_path: Path) -> None:
    folder = amber(tmp_path / "amber", 3)
    broken = folder / "train_001.jsonl"
    good = broken.read_text()
    broken.write_text(good + "{\n")
    into, kept = tmp_path / "c" / "train", tmp_path / "c" / "held_out"
    sources = open_sources([folder], Corrupt()).samples
    with raises_line(UsageError, "train_001.jsonl: line 61 is not JSON"):
        write_sample_shards(into, kept, sources, 300, Corrupt(), processes=processes)
    first = into / "00000-00000.tokens"
    written = first.stat().st_ino
    broken.write_text(good)
    tokens = write_sample_shards(into, kept, sources, 300, Corrupt(), processes=processes)
    assert first.stat().st_ino == written  # it was done
    assert tokens == ([1980, 1980, 1947], [33])
    rows = [
        json.loads(line)["token_ids"] for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()
    ]
    together = np.concatenate([shard.tokens for shard in (*open_shards(into), *open_shards(kept))])
    assert together.reshape(-1, 33).tolist() == rows
    assert not list(into.glob(".*"))

    fewer = write_sample_shards(into, kept, sources[:1], 300, Corrupt(), most_tokens=330)
    assert fewer == ([297], [33]) and [path.name for path in into.glob("*.tokens")] == ["00000-00000.tokens"]


def test_the_note_of_a_source_counts_only_beside_its_shards(tmp_path: Path) -> None:
    (source,) = open_sources([amber(tmp_path / "amber", 1)], Corrupt()).samples
    job = Job(number=0, source=source, into=tmp_path / "c", held_out=None, vocab_size=300, skip_corrupt=False,
              most_tokens=None)  # fmt: skip
    done = run_job(job)
    shard = tmp_path / "c" / "00000-00000.tokens"
    written = shard.stat().st_ino
    assert run_job(job) == done and shard.stat().st_ino == written
    shard.unlink()
    assert run_job(job) == done and shard.exists()


def test_tokens_that_fewer_sources_have_are_held_out_of_too(tmp_path: Path) -> None:
    sources = open_sources([amber(tmp_path / "amber", 3)], Corrupt())
    into, kept = tmp_path / "c" / "train", tmp_path / "c" / "held_out"
    write_sample_shards(into, kept, sources.samples[:1], 300, Corrupt())  # an attempt with other sources
    manifest = write_corpus(
        tmp_path / "c", sources, None, Vocabulary(size=300), DataOptions(most_tokens=33 * 80), Corrupt()
    )
    assert manifest["tokens"] == {"train": [33 * 59, 33 * 21], "held_out": [33]}
    write_corpus(tmp_path / "c", sources, None, Vocabulary(size=300), DataOptions(), Corrupt())
    assert [len(shard.tokens) for shard in open_part(tmp_path / "c", "held_out")] == [33]


def test_a_run_on_amber_resumes_in_the_middle_of_a_shard(teacher: Path, tmp_path: Path) -> None:
    folder = amber(tmp_path / "amber", 2)
    plan = RunPlan(model=model_config("column"), training=training_config(steps=20), teacher=str(teacher))
    prepare_run(tmp_path / "straight", plan, [folder], [])
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    straight = [report.loss for report in execute_run(tmp_path / "straight")]
    killed = execute_run(tmp_path / "killed")
    for _ in range(13):
        next(killed)
    killed.close()
    assert [report.loss for report in execute_run(tmp_path / "killed", resume=True)] == straight[10:]


def test_shards_are_trained_on_where_they_lie(text: Path, teacher: Path, tmp_path: Path) -> None:
    made = tmp_path / "corpus"
    corpus.main(data=[str(text)], tokenizer=teacher / "tokenizer.json", out=made)
    own, borrowed = tmp_path / "own", tmp_path / "borrowed"
    plan = RunPlan(model=model_config("row"), training=training_config(steps=3), teacher=str(teacher))
    prepare_run(own, plan, [text], [])
    prepare_run(borrowed, plan, [made], [])
    assert not (borrowed / "train").exists()
    assert [r.loss for r in execute_run(borrowed)] == [r.loss for r in execute_run(own)]
    with raises_line(UsageError, "holds shards already"):
        corpus.main(data=[str(text)], tokenizer=teacher / "tokenizer.json", out=made)

    shutil.rmtree(made / "held_out")
    with raises_line(UsageError, "held_out holds 0 shards of 0 tokens, data.json notes 1"):
        prepare_run(tmp_path / "again", plan, [made], [])
    (made / "data.json").unlink()
    with raises_line(UsageError, "no held_out shards; name held-out data with --held-out"):
        prepare_run(tmp_path / "again", plan, [made], [])
    prepare_run(tmp_path / "again", plan, [made], [text])
    assert len(list(execute_run(tmp_path / "again"))) == 3


def test_shards_of_another_tokenizer_or_a_larger_vocabulary_are_refused(
    text: Path, teacher: Path, tmp_path: Path
) -> None:
    made = tmp_path / "corpus"
    corpus.main(data=[str(text)], tokenizer=teacher / "tokenizer.json", out=made)
    small = RunPlan(model=model_config("row"), training=training_config(), teacher=None)
    raw = json.loads((made / "tokenizer.json").read_text())
    raw["model"]["vocab"] = {piece + "x" * (i > 290): i for piece, i in raw["model"]["vocab"].items()}
    raw["model"]["merges"] = []
    (made / "tokenizer.json").write_text(json.dumps(raw))
    with raises_line(UsageError, "different tokenizers"):
        prepare_run(
            tmp_path / "a", RunPlan(model=small.model, training=small.training, teacher=str(teacher)), [made], []
        )
    header = next((made / "train").glob("*.json"))
    header.write_text(json.dumps(json.loads(header.read_text()) | {"largest_id": 900}))
    with raises_line(UsageError, "token ids up to 900, the model's vocabulary 300"):
        prepare_run(tmp_path / "b", small, [made], [])


def test_missing_and_damaged_shards_are_named(tmp_path: Path) -> None:
    random_shards(tmp_path / "train", [40, 40, 40])
    (tmp_path / "train" / "00002.tokens").unlink()
    with raises_line(UsageError, "00002.tokens: not a token shard", "No such file"):
        open_part(tmp_path, "train")
    (tmp_path / "train" / "00001.tokens").write_bytes(b"")
    with raises_line(UsageError, "00001.tokens: 0 tokens found, 40 expected"):
        open_part(tmp_path, "train")
    for path in (tmp_path / "train").glob("00001*"):
        path.unlink()
    with raises_line(UsageError, "lacks the shard 00001.tokens"):
        open_part(tmp_path, "train")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"tokens": 5}', '{"tokens": {"train": 5}}', '{"tokens": {"train": ["x"]}}', "\0"]
)
def test_a_damaged_note_of_what_there_is_is_named(content: str, tmp_path: Path) -> None:
    random_shards(tmp_path / "train", [40])
    (tmp_path / "data.json").write_text(content)
    with raises_line(UsageError, "data.json is damaged"):
        open_part(tmp_path, "train")


def test_a_number_of_tokens_is_positive() -> None:
    with raises_line(UsageError, "data_tokens is 0, expected a positive integer"):
        DataOptions(most_tokens=0)


def test_skipped_lines_are_counted_in_the_run(teacher: Path, tmp_path: Path) -> None:
    folder = amber(tmp_path / "amber", 1)
    with open(folder / "train_000.jsonl", "a") as chunk:
        chunk.write('{"token_ids": [1, 2\n')
    plan = RunPlan(model=model_config("column"), training=training_config(), teacher=str(teacher))
    with raises_line(UsageError, "train_000.jsonl: line 61 is not JSON"):
        prepare_run(tmp_path / "run", plan, [folder], [])
    assert not (tmp_path / "run" / "run.json").exists()
    assert not list((tmp_path / "run").rglob("*.tokens*"))
    told = prepare_run(tmp_path / "run", plan, [folder], [], options=DataOptions(skip_corrupt=True))
    assert "1 corrupt line of" in told
    skipped = json.loads((tmp_path / "run" / "data.json").read_text())["skipped_lines"]
    assert skipped == {str(folder / "train_000.jsonl"): 1}
    assert shards.open_shards(tmp_path / "run" / "train")


def test_shards_in_place_are_those_the_run_began_with(teacher: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=model_config("column"), training=training_config(steps=2), teacher=str(teacher))
    folder, held_out = tmp_path / "shards", amber(tmp_path / "amber", 1)
    random_shards(folder, [90, 80, 70])  # of other makers: no data.json says what belongs to them
    prepare_run(tmp_path / "run", plan, [folder], [held_out])
    random_shards(folder, [90, 80, 70, 50])
    with raises_line(UsageError, "holds 4 shards of 290 tokens, the run began with 3 of 240; put those back"):
        list(execute_run(tmp_path / "run"))
    with raises_line(UsageError, "data_tokens is 100, but", "shards holds token shards, which are read where they are"):
        prepare_run(tmp_path / "other", plan, [folder], [held_out], options=DataOptions(most_tokens=100))

"""With --cache-teacher a teacher is asked about each window once, and nothing else changes."""

from __future__ import annotations

import shutil
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.tiny_run import model_config, training_config

from fbiedge.errors import OutputError, UsageError
from fbiedge.training.corpus import DataOptions
from fbiedge.training.model import Llama
from fbiedge.training.parallel import team
from fbiedge.training.prepare import open_batches
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.start import start_anew
from fbiedge.training.teacher_cache import CachedTeacher

STEPS = 14


@pytest.fixture
def run(text: Path, teacher: Path, tmp_path: Path) -> Path:
    """A prepared run of some two epochs."""
    training = training_config(steps=STEPS, cache_teacher=True, checkpoint_every=4, eval_every=STEPS)
    plan = RunPlan(model=model_config("column"), training=training, teacher=str(teacher))
    prepare_run(tmp_path / "run", plan, [text], [], options=DataOptions(most_tokens=1000))
    return tmp_path / "run"


def losses(run: Path, resume: bool = False, until: int = STEPS) -> list[float]:
    seen: list[float] = []
    for report in execute_run(run, resume, stop=lambda: len(seen) + 1 == until):
        seen.append(report.loss)
    return seen


def always_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the same steps where nothing is ever found in the cache."""
    shutil.copytree(run, run.parent / "asked")
    with monkeypatch.context() as patch:
        patch.setattr(CachedTeacher, "_read", lambda self, key: None)
        return losses(run.parent / "asked")


def test_later_epochs_ask_no_teacher_and_have_the_same_losses(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = open_batches(run, RunPlan.load(run))[0].windows
    assert windows * 1.5 < STEPS * 4, "the run must go through its text more than once"
    expected = always_asked(run, monkeypatch)
    asked: list[int] = []
    ask = Llama.features

    def counting(model: Llama, ids: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and not model.training:
            asked.append(len(ids))
        return ask(model, ids)

    monkeypatch.setattr(Llama, "features", counting)
    with_evaluation = losses(run)
    assert with_evaluation == expected
    assert windows <= sum(asked) < windows + 4, "each window once, but for the batch in which the second epoch begins"
    assert not (run / "teacher").exists(), "no step needs it any more"


def test_without_a_cache_the_first_epoch_is_the_same(run: Path, tmp_path: Path, text: Path) -> None:
    plan = RunPlan.load(run)
    changed = {**plan.training.to_dict(), "cache_teacher": False}
    plain = RunPlan(model=plan.model, training=type(plan.training)(**changed), teacher=plan.teacher)
    prepare_run(tmp_path / "plain", plain, [text], [], options=DataOptions(most_tokens=1000))
    first = open_batches(run, plan)[0].windows // 4
    cached, uncached = losses(run), losses(tmp_path / "plain")
    assert cached[:first] == uncached[:first]
    assert cached != uncached, "later, without a cache, the text is cut elsewhere"


@pytest.mark.parametrize("damage", ["none", "keys", "features", "bytes"])
def test_a_stopped_run_goes_on_exactly_whatever_is_left(
    damage: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = always_asked(run, monkeypatch)
    assert losses(run, until=9) == expected[:9]
    records, entries = run / "teacher" / "0.features", run / "teacher" / "0.keys"
    if damage == "keys":
        entries.write_bytes(entries.read_bytes()[:-25])
    if damage == "features":
        records.write_bytes(records.read_bytes()[:-5000])
    if damage == "bytes":
        records.write_bytes(bytes(records.stat().st_size))
    assert losses(run, resume=True) == expected[9:]


def test_a_run_that_starts_anew_forgets_what_was_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = always_asked(run, monkeypatch)
    losses(run, until=9)
    records, entries = run / "teacher" / "0.features", run / "teacher" / "0.keys"
    size = records.stat().st_size // (entries.stat().st_size // 20)
    records.write_bytes(bytes(records.stat().st_size))  # zeros, with their CRC
    known = entries.read_bytes()
    crc = zlib.crc32(bytes(size)).to_bytes(4, "little")
    entries.write_bytes(b"".join(known[at : at + 16] + crc for at in range(0, len(known), 20)))
    assert losses(run) == expected


def test_a_finished_run_keeps_and_needs_no_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses(run)
    (run / "teacher").mkdir()  # as a kill just before the end leaves it
    (run / "teacher" / "0.features").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: pytest.fail("no room is needed"))
    assert losses(run, resume=True) == []
    assert not (run / "teacher").exists()


def test_a_teacher_that_learned_on_is_asked_again(tmp_path: Path) -> None:
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    said = []
    for seed in (1, 2, 1):
        teacher = start_anew(model_config("none"), seed).eval().requires_grad_(False)
        cached = CachedTeacher(teacher, tmp_path / "teacher", team(), length=32, windows=6, bf16=False)
        said.append(cached.features(ids))
        assert torch.equal(said[-1], teacher.features(ids))
    assert torch.equal(said[0], said[2])
    assert not torch.equal(said[0], said[1])
    assert (tmp_path / "teacher" / "0.keys").stat().st_size == 4 * 20, "two windows of two teachers"


def test_a_disk_without_room_is_said_before_the_first_step(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(
        UsageError, match=r"need 0\.0 GB more in .*teacher, where 0\.0 GB are free; make room, or begin"
    ):
        losses(run)


def test_what_cannot_be_written_is_named(run: Path) -> None:
    assert len(losses(run, until=2)) == 2
    (run / "teacher" / "0.features").unlink()
    (run / "teacher" / "0.features").mkdir()
    with pytest.raises(OutputError, match=r"can't write .*teacher: Is a directory; mend that, then --resume"):
        losses(run, resume=True)

"""1, 2 and 4 processes train the same model, and each number of them goes on from what another saved."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import train_worker
from support.huggingface_folders import teacher_folder
from support.processes import finish, start
from support.tiny_run import model_config, training_config

from fbiedge.config import ModelConfig
from fbiedge.errors import CheckpointError, UsageError
from fbiedge.training.corpus import DataOptions
from fbiedge.training.divergence import LossWatch
from fbiedge.training.loss import head_losses
from fbiedge.training.model import Llama
from fbiedge.training.parallel import Team, freeze
from fbiedge.training.prepare import open_batches
from fbiedge.training.run import RunPlan, execute_run, prepare_run
from fbiedge.training.shared_scales import share_scales
from fbiedge.training.start import start_anew, start_from
from fbiedge.training.state import RunState, saved_states
from fbiedge.training.teacher import load_teacher
from fbiedge.training.trainer import Objective
from fbiedge.weights import open_checkpoint

STEPS = 6
# fp32 sums in another order differ by 2^-24 of themselves, and six steps let that grow tenfold. In bf16 each process
# rounds its own part of a weight's gradient (2^-9 of it); AdamW makes of a gradient near zero a whole step up or down: of 4
# seeds on 2 and 4 processes, the 6 losses differed by at most 5e-7, 2e-5, 9e-5, 4e-4, 1.2e-3 and 1.0e-3.
TOLERANCES = {
    "column": 5e-6,
    "shared": 5e-6,
    "micro": 5e-6,
    "background": 5e-6,
    "bf16": 4e-3,
    "cached": 5e-6,
    "foreign": 5e-6,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="module")
def prepared(text: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prepared run of each kind."""
    folder = tmp_path_factory.mktemp("prepared")
    kinds: dict[str, tuple[ModelConfig, dict[str, Any], dict[str, Any]]] = {
        "column": (model_config("column", **GROUPED), {"teacher": None}, {}),
        "shared": (model_config("column", **GROUPED), {"shared_scales": True},
                   {"activation_checkpointing": True, "eval_every": 3}),  # as often as it saves
        "micro": (model_config("column", **GROUPED), {"shared_scales": True},
                  {"micro_batch_size": 1, "one_hot_share": 0.3, "head": "int8", "embedding": "int8"}),
        "background": (model_config("row"), {"init": str(teacher)}, {"async_checkpoint": True}),
        "bf16": (model_config("column", **GROUPED), {"teacher_dtype": "bf16"}, {"bf16": True}),
        "cached": (model_config("column", **GROUPED), {}, {"cache_teacher": True}),
        "foreign": (model_config("column", **GROUPED), {"teacher": str(folder / "gpt2")}, {}),
    }  # fmt: skip
    teacher_folder(folder / "gpt2", "GPT2")  # its head is its embedding
    shutil.copy(teacher / "tokenizer.json", folder / "gpt2")
    for kind, (config, how, changes) in kinds.items():
        training = training_config(
            **{"steps": STEPS, "batch_size": 8, "checkpoint_every": 3, "eval_every": STEPS, "bf16": False, **changes}
        )
        plan = RunPlan(**{"model": config, "training": training, "teacher": str(teacher), **how})
        few = DataOptions(most_tokens=800) if kind == "cached" else None  # two epochs
        prepare_run(folder / kind, plan, [text], [], options=few)
    return folder


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs as one process does them, with what they reported."""
    folder = tmp_path_factory.mktemp("alone")
    for kind in TOLERANCES:
        shutil.copytree(prepared / kind, folder / kind)
        reports = [report.loss for report in execute_run(folder / kind)]
        (folder / f"{kind}.json").write_text(json.dumps(reports))
    return folder


@pytest.fixture(scope="module")
def launches(prepared: Path) -> dict[int, tuple[Path, dict[str, Any]]]:
    """All of it on 2 and on 4 processes, in one launch each: the runs, one that stops and goes on, one that a single
    process began in the form of earlier versions, and one that 2 begin and 4 end."""
    launches = {}
    for size in (2, 4):
        folder = prepared.parent / f"on{size}"
        shutil.copytree(prepared, folder)
        shutil.copytree(prepared / "shared", folder / "stopped")
        shutil.copytree(prepared / "shared", folder / "old")
        write_old_state(folder / "old", 3)
        arguments = [str(folder / kind) for kind in TOLERANCES]
        arguments += [f"{folder / 'stopped'}:to=3", f"{folder / 'stopped'}:resume", f"{folder / 'old'}:resume"]
        handed = prepared.parent / "handed"
        if size == 2:
            shutil.copytree(prepared / "shared", handed)
        arguments.append(f"{handed}:to=2" if size == 2 else f"{handed}:resume")
        ended = finish(start(size, [train_worker.__file__, *arguments]))
        assert [process.code for process in ended] == [0] * size, [process.printed for process in ended]
        assert not any(process.printed for process in ended[1:])
        reports: dict[str, Any] = {}
        for line in ended[0].printed.splitlines():
            if line.startswith("{"):
                report = json.loads(line)
                reports.setdefault(report["run"], {})[report["step"]] = report
        launches[size] = folder, reports
    return launches


@pytest.fixture(scope="module", params=[2, 4])
def together(
    request: pytest.FixtureRequest, launches: dict[int, tuple[Path, dict[str, Any]]]
) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs of one launch, and its reports."""
    return launches[request.param]


def write_old_state(run: Path, steps: int) -> None:
    """What early versions left after `steps` steps: RUN/state.pt."""
    plan = RunPlan.load(run)
    done = 0

    def stop() -> bool:
        return done + 1 == steps

    for report in execute_run(run, stop=stop):
        done = report.step
    model = Llama(plan.model)
    if plan.shared_scales:
        share_scales(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    team = Team(rank=0, size=1, device=torch.device("cpu"))
    RunState(run, model, optimizer, LossWatch(2, 50), team).load()
    state = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, run / "state.pt")
    shutil.rmtree(run / "state")
    shutil.rmtree(run / "model")


@pytest.mark.parametrize("kind", TOLERANCES)
def test_several_processes_train_as_one_does(kind: str, together: tuple[Path, dict[str, Any]], alone: Path) -> None:
    folder, reports = together
    expected = json.loads((alone / f"{kind}.json").read_text())
    losses = [reports[kind][step]["loss"] for step in range(1, STEPS + 1)]
    assert losses == pytest.approx(expected, abs=TOLERANCES[kind])
    assert losses[0] == pytest.approx(expected[0], abs=5e-6)  # nothing has been added up yet
    assert losses[-1] < losses[0]
    mine, theirs = open_checkpoint(folder / kind / "model"), open_checkpoint(alone / kind / "model")
    assert mine.config == theirs.config and mine.files == theirs.files
    name = "model.layers.1.mlp.down_proj"
    changed = torch.from_numpy(mine.linear(name).dense() - theirs.linear(name).dense())  # type: ignore[union-attr]
    assert changed.abs().mean() < (5e-4 if kind == "bf16" else 1e-6)


def test_no_process_asks_for_what_another_has_asked(prepared: Path, tmp_path: Path) -> None:
    """Stopped in the second epoch, 2 processes have one record of each window, but for those of one batch."""
    shutil.copytree(prepared / "cached", tmp_path / "run")
    windows = open_batches(tmp_path / "run", RunPlan.load(tmp_path / "run"))[0].windows
    ended = finish(start(2, [train_worker.__file__, f"{tmp_path / 'run'}:to={STEPS - 1}"]))
    assert [process.code for process in ended] == [0, 0], [process.printed for process in ended]
    entries = sum(path.stat().st_size for path in (tmp_path / "run" / "teacher").glob("*.keys")) // 20
    assert 8 * (STEPS - 1) > 1.5 * windows
    assert windows <= entries < windows + 8


def test_a_resumed_run_repeats_the_uninterrupted_one(together: tuple[Path, dict[str, Any]]) -> None:
    _, reports = together
    whole, stopped = reports["shared"], reports["stopped"]
    for value in ("loss", "eval_loss"):
        assert [stopped[step][value] for step in stopped] == [whole[step][value] for step in whole]


def test_the_state_of_earlier_versions_is_resumed(together: tuple[Path, dict[str, Any]], alone: Path) -> None:
    folder, reports = together
    expected = json.loads((alone / "shared.json").read_text())[3:]
    assert [report["loss"] for report in reports["old"].values()] == pytest.approx(expected, abs=5e-6)
    assert len(saved_states(folder / "old")) == 1  # of two that are kept, so the old form still is the other
    assert (folder / "old" / "state.pt").exists()


@pytest.mark.parametrize("kind", ["shared", "background"])
def test_one_process_goes_on_from_what_several_saved(
    kind: str, together: tuple[Path, dict[str, Any]], alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(together[0] / kind, run)
    assert [path.name for path in saved_states(run)] == ["00000003", "00000006"]
    shutil.rmtree(run / "state" / "00000006")
    expected = json.loads((alone / f"{kind}.json").read_text())[3:]
    assert [report.loss for report in execute_run(run, resume=True)] == pytest.approx(expected, abs=5e-6)


def test_four_processes_go_on_from_what_two_saved(
    launches: dict[int, tuple[Path, dict[str, Any]]], alone: Path
) -> None:
    began, ended = (list(reports["handed"].values()) for _, reports in launches.values())
    assert [report["step"] for report in (*began, *ended)] == list(range(1, STEPS + 1))
    expected = json.loads((alone / "shared.json").read_text())
    assert [report["loss"] for report in (*began, *ended)] == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_without_values_has_the_structure_of_one_with(shared: bool, teacher: Path) -> None:
    """What process 0 brings to the others must find its place there: same names, shapes, dtypes and shared parameters."""

    def structure(model: torch.nn.Module) -> list[Any]:
        numbers: dict[torch.Tensor, int] = {}
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return [
            (name, tensor.shape, tensor.dtype, tensor.requires_grad, numbers.setdefault(tensor, len(numbers)))
            for name, tensor in tensors
        ]

    def made(values: bool) -> list[torch.nn.Module]:
        grouped = model_config("column", tie_word_embeddings=True, **GROUPED)
        students = [start_anew(grouped, 1, values), start_from(teacher, "column", values)]
        if shared:
            for student in students:
                share_scales(student)
        guides = [freeze(load_teacher(teacher, dtype, values), bf16=True) for dtype in ("fp32", "bf16")]
        return [*students, start_from(teacher, "none", values), *guides]

    for whole, bare in zip(made(True), made(False), strict=True):
        assert structure(bare) == structure(whole)
        assert all(parameter.is_meta for parameter in bare.parameters())


def test_one_process_resumes_the_old_form_exactly(prepared: Path, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(prepared / "shared", run)
    write_old_state(run, 2)
    expected = json.loads((alone / "shared.json").read_text())[2:]
    assert [report.loss for report in execute_run(run, resume=True)] == expected
    assert len(saved_states(run)) == 2 and not (run / "state.pt").exists()


def test_metadata_that_asks_for_code_is_refused(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone / "column", run)
    for state in saved_states(run):
        (state / ".metadata").write_bytes(pickle.dumps(shutil.rmtree))
    with pytest.raises(CheckpointError, match=r"asks for shutil\.rmtree; remove it to go on from step 3"):
        list(execute_run(run, resume=True))


def test_half_a_state_is_passed_over_and_goes(alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(alone / "column", run)
    (run / "state" / "00000006" / ".metadata").unlink()  # killed while it was written
    expected = json.loads((alone / "column.json").read_text())[3:]
    assert [report.loss for report in execute_run(run, resume=True)] == expected
    assert [path.name for path in (run / "state").iterdir() if not (path / ".metadata").exists()] == []


def test_what_is_saved_in_the_background_is_the_step_it_was_asked_at(tmp_path: Path) -> None:
    def state_of(model: Llama) -> RunState:
        team = Team(rank=0, size=1, device=torch.device("cpu"))
        return RunState(tmp_path, model, torch.optim.AdamW(model.parameters()), LossWatch(2, 50), team, True)

    model = Llama(model_config("column")).initialize(1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    state = state_of(model)
    state.save(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)  # as the next step would, while it is written
    state.finish()
    again = Llama(model.config)
    assert state_of(again).load() == 1
    assert all(map(torch.equal, again.parameters(), before))


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(micro: int) -> None:
    """Also where the last is smaller than the others."""
    rows = torch.randint(3, 300, (4, 33), generator=torch.Generator().manual_seed(0))

    class Fixed:
        batch_size = 4

        def batch(self, step: int, rows_wanted: slice) -> tuple[Any, Any]:
            return rows[rows_wanted, :-1].numpy(), rows[rows_wanted, 1:].numpy()

    found = []
    for size in (0, micro):
        model = Llama(model_config("column")).initialize(1)
        config = training_config(bf16=False, micro_batch_size=size)
        objective = Objective(Team(rank=0, size=1, device=torch.device("cpu")), model, None, config)
        loss = objective.backward(Fixed(), 0)  # type: ignore[arg-type]
        found.append((loss[0], [parameter.grad for parameter in model.parameters()]))
    assert found[1][0].item() == pytest.approx(found[0][0].item(), abs=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pattern", ["column", "none"])
def test_a_frozen_teacher_says_the_same(pattern: str) -> None:
    ids = torch.arange(3, 35)[None]
    teacher, frozen = (Llama(model_config(pattern)).initialize(5, std=0.2) for _ in range(2))
    freeze(frozen, bf16=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.features(ids), frozen.features(ids))
        losses = [head_losses(m.features(ids), m.lm_head.weight, ids, chunk=64).loss for m in (teacher, frozen)]
    assert losses[0] == losses[1]
    assert {p.dtype for n, p in frozen.named_parameters() if n.endswith("proj.weight")} == {torch.bfloat16}


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    team = Team(rank=1, size=4, device=torch.device("cpu"))
    assert team.rows(8) == slice(2, 4)
    with pytest.raises(UsageError, match="a batch of 6 sequences can't be shared by 4 processes"):
        team.rows(6)


def test_a_loss_that_rises_and_stays_ends_the_run_and_a_spike_does_not() -> None:
    watch = LossWatch(jump=2.0, patience=10)
    losses = [10 - 0.05 * step for step in range(100)]
    losses[60] = 9000.0
    for step, loss in enumerate(losses):
        assert watch.see(step, loss, 1.0) is None
        assert watch.is_calm == (step != 60)
    for step in range(9):
        assert watch.see(100 + step, 9.9, 1.0) is None and not watch.is_calm
    again = LossWatch(jump=2.0, patience=10)
    again.restore(watch.state())
    for each in (watch, again):
        problem = each.see(109, 9.9, 1.0)
        assert problem is not None and "has been more than 2 above that for 10 steps" in str(problem)


def test_one_easy_batch_at_the_start_is_no_level() -> None:
    watch = LossWatch(jump=2.0, patience=10)
    assert all(watch.see(step, 3.5 if step else 1.0, 1.0) is None for step in range(200))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_what_is_no_number_ends_the_run_at_once(loss: float, norm: float) -> None:
    assert LossWatch(2.0, 50).see(1, loss, norm) == f"step 1: loss {loss}, gradient norm {norm}"

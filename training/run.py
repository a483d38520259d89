"""Execute a run that was prepared (prepare.py): what `fbiedge train` and the recipes call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from fbiedge.weights import SIDECARS

from .model import Llama
from .parallel import agreed, is_first, team
from .plan import COLUMN_SHARED, RunPlan
from .prepare import check_teacher, open_batches, prepare_run
from .shared_scales import share_scales
from .start import start_anew, start_from
from .state import has_state
from .teacher import load_teacher, teacher_facts
from .trainer import LOG_EVERY, StepReport, train

__all__ = ["COLUMN_SHARED", "RunPlan", "execute_run", "prepare_run"]


def execute_run(
    run: Path,
    resume: bool = False,
    on_start: Callable[[Llama, RunPlan], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    log_every: int = LOG_EVERY,
) -> Iterator[StepReport]:
    """Train the run prepared in `run`, from its start or from its last saved state, until its end or until `stop()`.

    Reports of every `log_every`th step say what it did to each layer.
    """
    with agreed():  # what fails in all processes is said once
        plan = RunPlan.load(run)
        training, teacher = plan.training, None
        team().rows(training.batch_size)
        values = is_first()  # the others get their parts of them, see parallel.place
        if plan.teacher is not None:
            check_teacher(teacher_facts(Path(plan.teacher)), plan)
            loaded = load_teacher(Path(plan.teacher), plan.teacher_dtype, values)
            teacher = cast(Llama, loaded)  # or one that is used alike
        if plan.init is None or (resume and has_state(run)):
            model = start_anew(plan.model, training.seed, values)
        else:
            model = start_from(Path(plan.init), plan.model.scaling_pattern, values)
        if plan.shared_scales:
            share_scales(model)
        batches, held_out_batches = open_batches(run, plan)
        files = {name: (run / name).read_text() for name in SIDECARS if (run / name).exists()}
    if on_start is not None:
        on_start(model, plan)
    yield from train(
        run, model, teacher, batches, held_out_batches, training, files, resume, stop, log_every, plan.peak_tflops
    )

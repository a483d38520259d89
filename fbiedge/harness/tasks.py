"""Zero-shot tasks through lm-evaluation-harness: its own by name, or the questions of local files by its metrics.

    acc        the answer of the largest log-likelihood is right
    acc_norm   the same, each log-likelihood divided by the answer's length in characters

Beside every share stands its 95 % interval (Wilson's) and what guessing gives. The standard errors are the harness's.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cli_support import extra
from ..engines import LogitEngine
from ..errors import UsageError, printable
from ..evaluation import Progress, without_infinities
from ..hub import offline_if_unreachable, open_datasets, stay_offline, unreachable
from .files import TaskFile

# FBI-LLM's, and where the harness keeps them: to read only these takes no 15 seconds, as reading all 14,000 tasks does.
_FOLDERS = {
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
PUBLISHED = tuple(_FOLDERS)
_SHARES = ("acc", "acc_norm")
_Z = 1.959964  # of 95 %
_RESAMPLES = 1000  # for the few metrics whose standard error has no formula
_FEWSHOT_SEED = 1234  # the harness's own
_FILE = "fbiedge_file"  # in a task's metadata: where its questions come from


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task."""

    task: str
    file: str | None  # its questions; None for a task of the harness's own
    metric: str
    value: float
    standard_error: float | None
    interval: tuple[float, float] | None  # 95 %
    chance: float | None  # of guessing, for a share of right answers
    questions: int


@dataclass(frozen=True, kw_only=True)
class HarnessReport:
    """All scores of one model."""

    model: str
    engine: str
    window: int
    limit: int | None
    scores: list[Score]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity."""
        return without_infinities(asdict(self))

    def lines(self) -> list[str]:
        """For people."""
        rows = [("task", "metric", "value", "95 % interval", "chance", "questions")]
        for score in self.scores:
            interval = "-" if score.interval is None else "{:.4f} to {:.4f}".format(*score.interval)
            chance = "-" if score.chance is None else f"{score.chance:.4f}"
            rows.append((score.task, score.metric, f"{score.value:.4f}", interval, chance, f"{score.questions:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        first = f", the first {self.limit} questions of each task" if self.limit else ""
        return [f"model   {self.model}", f"engine  {self.engine}, window of {self.window} tokens{first}", *table]


def import_harness(*, hub: bool) -> None:
    """Import what runs the tasks, in silence; `hub`: may it be asked? Raises UsageError where it isn't installed."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # there is one progress bar, ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    offline_if_unreachable() if hub else stay_offline()
    with extra("eval"):
        importlib.import_module("lm_eval.evaluator")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    open_datasets()  # comes with it


def load_tasks(names: Sequence[str], files: Sequence[TaskFile]) -> dict[str, Any]:
    """The harness's tasks called `names`, and those of `files`, by name. Raises UsageError."""
    tasks: dict[str, Any] = {}
    for file in files:
        if file.name in tasks or file.name in names:
            raise UsageError(f"two tasks are called {file.name}; rename one of the files")
        tasks[file.name] = _file_task(file)
    if names:
        manager = _task_manager(names)
        for name in names:
            if name not in manager.all_tasks:
                raise UsageError(
                    f"lm-evaluation-harness has no task {printable(name)}; FBI-LLM's are {', '.join(PUBLISHED)}, and "
                    "`lm_eval ls tasks` lists the others"
                )
            try:
                loaded = manager.load([name])
            except ModuleNotFoundError as error:
                raise UsageError(
                    f"{name} needs {error.name}, which isn't installed: pip install {error.name}"
                ) from error
            except Exception as error:  # of a dozen libraries below, for the network, the cache and the task
                raise unreachable(name, error, "give its questions in a file, by --task-file FILE") from error
            if twice := min(set(loaded["tasks"]) & {file.name for file in files}, default=None):
                raise UsageError(f"two tasks are called {twice}; rename one of the files")
            tasks |= loaded["tasks"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UsageError(
                f"{name} needs more than text: it runs code of the model's, or shows it pictures or sounds"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return tasks


def run_tasks(
    engine: LogitEngine,
    tasks: dict[str, Any],
    *,
    window: int,
    limit: int | None = None,
    progress: Progress = lambda done, total: None,
) -> HarnessReport:
    """Score `engine` on `tasks`, at most the first `limit` questions of each. Raises UsageError, ModelFileError."""
    import lm_eval.evaluator

    from .model import FbiEdgeLM

    model = FbiEdgeLM(engine, max_length=window, progress=progress)
    found = lm_eval.evaluator.evaluate(
        lm=model,
        task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=_RESAMPLES,
    )
    scores = [
        score
        for name, task in tasks.items()
        for score in _scores(name, task, found["results"][name], found.get("samples", {}).get(name, []))
    ]
    return HarnessReport(
        model=str(engine.path), engine=engine.description, window=model.max_length, limit=limit, scores=scores
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """Bounds of a 95 % interval for a share seen among `count`, which never leave 0 to 1."""
    scale = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / scale
    reach = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _scores(name: str, task: Any, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[Score]:
    """The metrics of one task, which the harness names `acc,none` and `acc_stderr,none`."""
    options = [len(sample["arguments"]) for sample in samples]
    scores = []
    for key, value in results.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = results.get(f"{metric}_stderr,{filtered}")
        error = float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None
        interval, is_share = None, metric in _SHARES and min(options, default=1) > 1
        if is_share:
            interval = wilson(value, len(options))
        elif error is not None:
            interval = (value - _Z * error, value + _Z * error)
        scores.append(
            Score(
                task=name,
                file=(task.get_config("metadata") or {}).get(_FILE),
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=float(value),
                standard_error=error,
                interval=interval,
                chance=sum(1 / count for count in options) / len(options) if is_share else None,
                questions=len(options),
            )
        )
    return scores


def _task_manager(names: Sequence[str]) -> Any:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = {root / _FOLDERS[name] for name in names if name in _FOLDERS}
    if all(name in _FOLDERS for name in names) and all(folder.is_dir() for folder in folders):
        return lm_eval.tasks.TaskManager(include_path=sorted(folders), include_defaults=False)
    return lm_eval.tasks.TaskManager()


def _file_task(file: TaskFile) -> Any:
    """The harness's multiple choice over the questions of a file."""
    import datasets
    import lm_eval.api.task

    if file.varies == "contexts":  # the harness's form for WinoGrande: the "choices" are what is read first
        form = {
            "doc_to_text": lambda row: row["gold"],
            "doc_to_choice": lambda row: row["contexts"],
            "doc_to_target": lambda row: row["continuations"][0],
        }
    else:
        form = {
            "doc_to_text": lambda row: row["contexts"][0],
            "doc_to_choice": lambda row: row["continuations"],
            "doc_to_target": lambda row: row["gold"],
        }
    metrics = _SHARES[:1] if file.varies == "contexts" else _SHARES
    rows = datasets.Dataset.from_list([asdict(question) for question in file.questions])
    return lm_eval.api.task.ConfigurableTask(
        config={
            "task": file.name,
            "output_type": "multiple_choice",
            "custom_dataset": lambda **_: {"test": rows},
            "test_split": "test",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
            "metadata": {"version": 1.0, _FILE: str(file.path)},
            **form,
        }
    )

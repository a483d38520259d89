"""One thread a process: these models are too small to share, and a shared machine must not stall them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_run import DOCUMENTS, model_config, training_config

from fbiedge.training.run import RunPlan, execute_run, prepare_run

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text("\n<|endoftext|>\n".join(DOCUMENTS * 2), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def teacher(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    prepare_run(run, RunPlan(model=model_config("none"), training=training_config(), teacher=None), [text], [])
    reports = list(execute_run(run))
    assert reports[-1].eval_loss is not None
    assert reports[-1].eval_loss < 0.6 * reports[0].loss, "the teacher did not learn"
    return run / "model"

"""The command `fbiedge analyze`: pictures and tables of trainings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_support import extra


def analyze(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="folders of `fbiedge train`, finished or under way")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for PNG and CSV")],
) -> None:
    """Draw training curves, flip-flop ratios and distributions of scales, several runs in one plot."""
    from . import tables, terminal

    with extra("analyze"):
        importlib.import_module("matplotlib")
        training: Any = importlib.import_module("fbiedge.training.analysis")
    analysis = training.analyze(runs, output)
    tables.print_analysis(analysis)
    for path in analysis.files:
        terminal.print_text(f"wrote {path}")

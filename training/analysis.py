"""What `fbiedge analyze` makes of runs: training curves, flip-flop ratios and distributions of scales, drawn and as tables.

FOLDER/curves.png, curves.csv        losses, learning rate, gradient norm and speed over the tokens seen
FOLDER/flip_flop.png                 share of signs that a step changes, whole models
FOLDER/flip_flop_layers.png          the same layer by layer
FOLDER/layers.csv                    what both show, and mean and deviation of the scales over time
FOLDER/alphas.png, betas.png         distributions of the scales in RUN/model, by the kind of projection
FOLDER/scales.csv                    their quantiles
FOLDER/histograms.csv                what the pictures of the distributions show

The folder is replaced as a whole. Runs may be under way: RUN/model is then that of the last checkpoint.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from fbiedge.files import atomic_directory, require_only
from fbiedge.weights import HasScales, open_checkpoint

from .history import FIELDS, LAYER_FIELDS, History, read_histories
from .plots import Histogram, Panel, plot_curves, plot_distributions, plot_layers, plot_panels, save

FILES = (
    "curves.png", "curves.csv", "flip_flop.png", "flip_flop_layers.png", "layers.csv", "alphas.png", "betas.png",
    "scales.csv", "histograms.csv",
)  # fmt: skip
BINS = 60
FINAL = 3  # logged steps whose mean is the flip-flop ratio at the end: one step's is noisy
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
Scales = dict[tuple[str, str], npt.NDArray[np.float32]]  # by "alpha" or "beta" and the kind of projection


@dataclass(frozen=True, kw_only=True)
class ScaleSummary:
    """The scales of one kind of projection over all layers of one run."""

    run: str
    scale: str  # alpha or beta
    projection: str
    count: int
    mean: float
    std: float
    quantiles: tuple[float, ...]  # QUANTILES


@dataclass(frozen=True, kw_only=True)
class Findings:
    """One run in short."""

    run: str
    steps: int
    planned_steps: int
    tokens: int
    next_token_loss: float | None  # nats per token, of the last logged step
    best_held_out: float | None  # nats per token
    best_step: int | None
    flip_flop: float | None  # mean of the last FINAL logged steps
    alpha: tuple[float, float] | None  # mean and standard deviation over all of RUN/model
    beta: tuple[float, float] | None
    missing: tuple[str, ...]  # what it has not, and why


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found, and the files that show it."""

    findings: tuple[Findings, ...]
    scales: tuple[ScaleSummary, ...]
    files: tuple[Path, ...]


def analyze(runs: Sequence[Path], out: Path) -> Analysis:
    """Read `runs` and write the folder `out`. Raises UsageError, CheckpointError, OutputError; nothing is half written."""
    require_only(out, lambda entry: entry.name in FILES and entry.is_file(), "an analysis")
    histories = read_histories(runs)
    scales = {history.name: _read_scales(history.folder / "model") for history in histories}
    summaries = tuple(
        _summary(name, scale, projection, values)
        for name, found in scales.items()
        for (scale, projection), values in sorted(found.items(), key=lambda item: item[0][0])
    )
    names = [history.name for history in histories]
    figures = _curve_figures(histories)
    rows: list[dict[str, Any]] = []
    for scale, plural in (("alpha", "alphas"), ("beta", "betas")):
        if histograms := _histograms(scale, scales):
            figures[f"{plural}.png"] = plot_distributions(histograms, x_label=_SCALES[scale], names=names)
            rows += _histogram_rows(scale, histograms)
    tables: dict[str, Iterable[Mapping[str, Any]]] = {
        "curves.csv": _curve_rows(histories),
        "layers.csv": _layer_rows(histories),
        "scales.csv": [_scale_row(summary) for summary in summaries],
        "histograms.csv": rows,
    }
    with atomic_directory(out) as staging:
        for name, figure in figures.items():
            save(figure, staging / name)
        for name, table in tables.items():
            _write_csv(staging / name, iter(table))
        written = {path.name for path in staging.iterdir()}
    return Analysis(
        findings=tuple(_findings(history, scales[history.name]) for history in histories),
        scales=summaries,
        files=tuple(out / name for name in FILES if name in written),
    )


_SCALES = {"alpha": "alpha, what a sign stands for", "beta": "beta, what is added to it"}


def _curve_figures(histories: Sequence[History]) -> dict[str, Figure]:
    """Of what at least one run has."""
    panels = []
    for label, field, options in (
        ("next-token loss\n(nats/token)", "one_hot_loss", {"smooth": True, "height": 2.4}),
        ("distillation loss\n(nats/token)", "distillation_loss", {"smooth": True}),
        ("training loss\n(nats/token)", "loss", {"smooth": True}),
        ("held-out loss\n(nats/token)", "eval_loss", {"dots": True, "height": 2.4}),
        ("learning rate\n(× 10⁻³)", "learning_rate", {"may_coincide": True, "height": 1.4}),
        ("gradient norm", "grad_norm", {"smooth": True, "log_y": True, "height": 1.6}),
        ("tokens/s", "tokens_per_second", {"smooth": True, "height": 1.4}),
        ("MFU (%)", "mfu", {"smooth": True, "height": 1.4}),
    ):
        factor = {"learning_rate": 1e3, "mfu": 100}.get(field, 1)
        series = {h.name: (h.known(field)[0], factor * h.known(field)[1]) for h in histories if len(h.known(field)[0])}
        if field == "loss":  # elsewhere it is one of the two above
            series = {h.name: series[h.name] for h in histories if _is_mixed(h) and h.name in series}
        if series:
            panels.append(Panel(y_label=label, series=series, **options))
    names = [history.name for history in histories]
    figures = {"curves.png": plot_panels(panels, names=names)}
    layers = {h.name: h.known_layers("flip_flop") for h in histories if len(h.known_layers("flip_flop")[0])}
    if layers:
        whole = {h.name: (h.flip_flop()[0], 100 * h.flip_flop()[1]) for h in histories if h.name in layers}
        label = "signs flipped in a step (%)"
        figures["flip_flop.png"] = plot_curves(whole, y_label=label, log_y=True, smooth=True, names=names)
        percent = {name: (tokens, list(100 * flips)) for name, (tokens, flips) in layers.items()}
        figures["flip_flop_layers.png"] = plot_layers(percent, y_label=label, log_y=True)
    return figures


def _is_mixed(history: History) -> bool:
    return history.plan.teacher is not None and 0 < history.plan.training.one_hot_share < 1


def _read_scales(model: Path) -> Scales:
    """Alphas and betas of a checkpoint by kind of projection, all layers after one another; none where there is no model."""
    if not model.exists():
        return {}
    weights = open_checkpoint(model)
    if weights.config.scaling_pattern == "none":
        return {}
    assert isinstance(weights, HasScales)
    found: Scales = {}
    for linear in weights.config.linear_shapes():
        projection = linear.rpartition(".")[2]
        layers = range(weights.config.num_hidden_layers)
        alphas, betas = zip(*(weights.scales(f"model.layers.{layer}.{linear}") for layer in layers), strict=True)
        found["alpha", projection] = np.concatenate([alpha.reshape(-1) for alpha in alphas])
        if betas[0] is not None:
            found["beta", projection] = np.concatenate(betas)
    return found


def _summary(run: str, scale: str, projection: str, values: npt.NDArray[np.float32]) -> ScaleSummary:
    exact = values.astype(np.float64)
    return ScaleSummary(
        run=run, scale=scale, projection=projection, count=len(values), mean=float(exact.mean()),
        std=float(exact.std()), quantiles=tuple(np.quantile(exact, QUANTILES).tolist()),
    )  # fmt: skip


def _histograms(scale: str, runs: Mapping[str, Scales]) -> dict[str, dict[str, Histogram]]:
    """By projection and run, all over the same bins: from the lowest 0.1 % of any projection of a run to the highest."""
    values = {
        (projection, run): found
        for run, scales in runs.items()
        for (kind, projection), found in scales.items()
        if kind == scale
    }
    if not values:
        return {}
    ends = np.array([np.quantile(found.astype(np.float64), (0.001, 0.999)) for found in values.values()])
    low, high = ends[:, 0].min(), ends[:, 1].max()
    room = 0.02 * (high - low) or max(abs(low), 1e-6)  # all alike, as a run may start
    edges = np.linspace(low - room, high + room, BINS + 1)
    histograms: dict[str, dict[str, Histogram]] = {}
    for (projection, run), found in values.items():
        counts = np.histogram(found, edges)[0].astype(np.int64)
        histogram = Histogram(edges=edges, counts=counts, outside=len(found) - int(counts.sum()))
        histograms.setdefault(projection, {})[run] = histogram
    return histograms


def _findings(history: History, scales: Scales) -> Findings:
    missing = []
    best, best_step = None, None
    evaluated = history.columns["eval_loss"]
    if np.isnan(evaluated).all():
        missing.append("no held-out loss yet")
    else:
        at = int(np.nanargmin(evaluated))
        best, best_step = float(evaluated[at]), int(history.columns["step"][at])
    flips = history.flip_flop()[1]
    last_loss = float(history.columns["one_hot_loss"][-1])
    if history.plan.model.scaling_pattern != "none":
        if not flips.size:
            missing.append("no layers in its metrics, as an earlier version wrote them: no flip-flop ratio")
        if not scales:
            missing.append("no model saved yet: no scales")
    else:
        missing.append("full precision: no signs, no scales")
    moments: dict[str, tuple[float, float]] = {}
    for kind in ("alpha", "beta"):
        parts = [values for (scale, _), values in scales.items() if scale == kind]
        if parts:
            together = np.concatenate(parts).astype(np.float64)
            moments[kind] = float(together.mean()), float(together.std())
    return Findings(
        run=history.name, steps=history.steps, planned_steps=history.plan.training.steps,
        tokens=int(history.columns["tokens"][-1]), best_held_out=best, best_step=best_step,
        next_token_loss=None if np.isnan(last_loss) else last_loss,
        flip_flop=float(flips[-FINAL:].mean()) if flips.size else None,
        alpha=moments.get("alpha"), beta=moments.get("beta"), missing=tuple(missing),
    )  # fmt: skip


def _curve_rows(histories: Sequence[History]) -> Iterable[dict[str, Any]]:
    for history in histories:
        for index in range(len(history.columns["step"])):
            yield {"run": history.name, **{field: history.columns[field][index] for field in FIELDS}}


def _layer_rows(histories: Sequence[History]) -> Iterable[dict[str, Any]]:
    for history in histories:
        for index, step in enumerate(history.columns["step"]):
            for layer in range(len(history.layers["flip_flop"])):
                values = {field: history.layers[field][layer, index] for field in LAYER_FIELDS}
                if not np.isnan(values["flip_flop"]):
                    tokens = history.columns["tokens"][index]
                    yield {"run": history.name, "step": step, "tokens": tokens, "layer": layer, **values}


def _scale_row(summary: ScaleSummary) -> dict[str, Any]:
    row = {field.name: getattr(summary, field.name) for field in fields(summary) if field.name != "quantiles"}
    return row | {f"p{100 * q:02.0f}": value for q, value in zip(QUANTILES, summary.quantiles, strict=True)}


def _histogram_rows(scale: str, histograms: Mapping[str, Mapping[str, Histogram]]) -> list[dict[str, Any]]:
    return [
        {"run": run, "scale": scale, "projection": projection, "from": low, "to": high, "count": int(count)}
        for projection, by_run in histograms.items()
        for run, histogram in by_run.items()
        for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    ]


def _write_csv(path: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    """Numbers with as many digits as tell fp32 apart; what is not known is empty. No rows, no file."""
    first = next(rows, None)
    if first is None:
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(first)
        for row in chain([first], rows):
            writer.writerow([_cell(value) for value in row.values()])


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if np.isnan(value):
        return ""
    return int(value) if value.is_integer() else f"{value:.9g}"

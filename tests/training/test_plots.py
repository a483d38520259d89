"""Plots show the numbers they were given: read back from the figure's own lines, bars and legend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fbiedge.training.plots import Histogram, Panel, plot_curves, plot_distributions, plot_layers, plot_panels, save

X = np.arange(1, 401) * 4096.0
NOISY = 3 + np.random.default_rng(0).normal(0, 0.1, len(X))


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_a_curve_is_its_points_and_a_smoothed_one_their_running_mean_before_them() -> None:
    [axes] = plot_curves({"plain": (X, NOISY)}, y_label="loss").axes
    [line] = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), np.stack((X, NOISY), axis=1))
    [axes] = plot_curves({"smooth": (X, NOISY)}, y_label="loss", smooth=True).axes
    points, mean = axes.lines
    np.testing.assert_array_equal(points.get_ydata(), NOISY)
    assert mean.get_ydata()[200] == pytest.approx(NOISY[196:204].mean())
    assert mean.get_zorder() >= points.get_zorder() and points.get_alpha() < 0.5


def test_what_is_no_number_or_has_no_logarithm_is_a_gap() -> None:
    y = [1.0, float("nan"), 0.0, float("inf"), 2.0]
    [axes] = plot_curves({"run": (range(5), y)}, y_label="gradient norm", log_y=True).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1.0, np.nan, np.nan, np.nan, 2.0])


def test_a_series_has_one_colour_in_all_panels_and_the_legend_names_all() -> None:
    both, one = {"a": (X, NOISY), "b": (X, NOISY + 1)}, {"b": (X, NOISY)}
    figure = plot_panels([Panel(y_label="loss", series=both), Panel(y_label="rate", series=one, may_coincide=True)])
    upper, lower = figure.axes
    assert legend_of(figure) == ["a", "b"]
    assert upper.lines[1].get_color() == lower.lines[0].get_color() != upper.lines[0].get_color()
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == ("loss", "rate", "tokens seen")


def test_layers_are_told_apart_by_one_scale_of_colours_over_one_y() -> None:
    runs = {"scratch": (X, [NOISY, NOISY + 1]), "pretrained": (X, [NOISY * depth for depth in (1, 2, 3)])}
    figure = plot_layers(runs, y_label="signs flipped (%)", log_y=True)
    first, second, bar = figure.axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["scratch", "pretrained"]
    assert first.get_ylim() == second.get_ylim() and first.get_yscale() == "log"
    colours = [line.get_color() for line in second.lines]
    assert len(set(colours)) == 3 and [line.get_color() for line in first.lines] == colours[:2]
    assert bar.get_ylabel().startswith("layer")


@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_any_number_of_runs_has_room(count: int, tmp_path: Path) -> None:
    runs = {f"a run with a name that is rather long, {number}": NOISY + number for number in range(count)}
    figures = [
        plot_layers({name: (X, [y, 2 * y]) for name, y in runs.items()}, y_label="signs flipped (%)"),
        plot_curves({name: (X, y) for name, y in runs.items()}, y_label="loss"),
    ]
    for figure in figures:
        save(figure, tmp_path / "figure.png")  # which lays it out
        assert all(axes.get_window_extent().height > 200 for axes in figure.axes)


def test_equal_series_are_all_seen() -> None:
    series = {"a": (X, X), "b": (X[::2], X[::2]), "c": (X, 2 * X), "d": (X, X)}
    figure = plot_panels([Panel(y_label="learning rate", series=series, may_coincide=True)])
    assert [line.is_dashed() for line in figure.axes[0].lines] == [False, True, False, True]


def test_colours_of_several_plots_agree() -> None:
    one = plot_curves({"b": (X, NOISY)}, y_label="loss", names=["a", "b"]).axes[0].lines[0]
    both = plot_curves({"a": (X, NOISY), "b": (X, NOISY)}, y_label="loss").axes[0].lines
    assert one.get_color() == both[1].get_color() != both[0].get_color()


def test_a_distribution_is_in_shares_and_says_what_lies_outside() -> None:
    edges = np.linspace(0, 1, 5)
    histograms = {"run": Histogram(edges=edges, counts=np.array([1, 2, 3, 2]), outside=2)}
    figure = plot_distributions({"q_proj": histograms, "k_proj": histograms}, x_label="alpha")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["q_proj", "k_proj"]
    np.testing.assert_allclose(figure.axes[0].patches[0].get_data().values, [10, 20, 30, 20])
    assert figure.get_supxlabel() == "alpha; 20 % lie outside"


def test_a_figure_is_saved_whole_and_always_alike(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(plot_curves({"run": (X, NOISY)}, y_label="loss", smooth=True), tmp_path / name)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second and first.startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]

"""Plots of results: recall against k, accuracy against shots, calibration, and maps of embeddings."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.classification import reliability
from threetowers.eval.report.svg import DASHES, INK, Panel, new_figure, run_colour, to_svg

CURVE_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)
Floats32 = NDArray[np.float32]


def recall_panel(title: str, ranks: Sequence[Sequence[Floats32]], galleries: Sequence[int]) -> Panel:
    """Return a plot of recall against k, a line a run: the mean over galleries.

    Args:
        title: Title of the panel.
        ranks: `ranks[run][gallery]` are ranks (N,) counted from 1, NaN for an excluded query; a run without any is
            left out.
        galleries: Sizes of the galleries, which bound k.
    """
    figure, axes = new_figure(width=5.2, height=3.2)
    largest = max(1, min(galleries, default=1))
    ks = [k for k in CURVE_KS if k <= largest]
    for run, run_ranks in enumerate(ranks):
        if not run_ranks:
            continue
        scored = [rank_N[~np.isnan(rank_N)] for rank_N in run_ranks]
        recalls = []
        for k in ks:
            recalls.append(100 * np.mean([(rank_N <= k).mean() for rank_N in scored]))
        axes.plot(ks, recalls, color=run_colour(run), linestyle=DASHES[run % len(DASHES)])
    _log_axis(axes, [k for k in (1, 5, 10, 50, 100, 500, 1000) if k <= ks[-1]])
    axes.set_xlabel("k")
    axes.set_ylabel("recall at k, percent")
    axes.set_ylim(0, 100)
    return Panel(title, to_svg(figure, f"recall {title}"))


def fewshot_panel(title: str, metrics: Sequence[Mapping[str, float] | None]) -> Panel | None:
    """Return a plot of accuracy against shots, a line a run, with the deviation over seeds as a band.

    `metrics` are those of each run; None without few-shot metrics in any.
    """
    figure, axes = new_figure(width=4.4, height=2.9)
    ticks: set[int] = set()
    for run, values in enumerate(metrics):
        accuracy: dict[int, float] = {}
        deviation: dict[int, float] = {}
        for key, value in (values or {}).items():
            match = re.fullmatch(r"(\d+)-shot/(top1|top1_deviation)", key)
            if match:
                by_shots = accuracy if match[2] == "top1" else deviation
                by_shots[int(match[1])] = value
        if not accuracy:
            continue
        shots = sorted(accuracy)
        mean = np.array([100 * accuracy[count] for count in shots])
        spread = np.array([100 * deviation.get(count, 0.0) for count in shots])
        axes.plot(shots, mean, color=run_colour(run), linestyle=DASHES[run % len(DASHES)], marker="o", markersize=4)
        axes.fill_between(shots, mean - spread, mean + spread, color=run_colour(run), alpha=0.15, linewidth=0)
        ticks |= set(shots)
    if not ticks:
        return None
    _log_axis(axes, sorted(ticks))
    axes.set_xlabel("training images a class")
    axes.set_ylabel("top-1, percent")
    return Panel(title, to_svg(figure, f"few-shot {title}"))


def calibration_panel(title: str, predictions: Sequence[tuple[Floats32, Floats32] | None]) -> Panel | None:
    """Return a plot of accuracy against confidence, a line a run, the dots as large as the counts of their bins.

    `predictions` are (confidence_N, correct_N) of each run, the latter NaN for an item that does not count; None
    without predictions of any run.
    """
    if all(found is None for found in predictions):
        return None
    figure, axes = new_figure(width=4.4, height=3.4)
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    for run, found in enumerate(predictions):
        if found is None:
            continue
        confidence_N, correct_N = found
        counted_N = ~np.isnan(correct_N)
        bins = reliability(confidence_N[counted_N], correct_N[counted_N] > 0, bins=10)
        filled_K = bins.count_K > 0
        x = 100 * bins.confidence_K[filled_K]
        y = 100 * bins.accuracy_K[filled_K]
        size = bins.count_K[filled_K]
        axes.plot(x, y, color=run_colour(run), linestyle=DASHES[run % len(DASHES)])
        axes.scatter(x, y, s=8 + 60 * size / size.max(), color=run_colour(run), linewidths=0, zorder=3)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel("confidence, percent")
    axes.set_ylabel("right, percent")
    return Panel(title, to_svg(figure, f"calibration {title}"))


def map_panel(title: str, run: int, images_N2: Floats32, texts_N2: Floats32, explained_2: Floats32) -> Panel:
    """Return a map of images (dots) and captions (crosses) on the two principal axes of both.

    Args:
        title: Title of the panel.
        run: Index of the run, for its colour.
        images_N2: Coordinates of images.
        texts_N2: Coordinates of captions.
        explained_2: Share of the variance that each axis explains.
    """
    figure, axes = new_figure(width=4.0, height=3.6)
    size = float(np.clip(3000 / max(len(images_N2), 1), 3, 14))
    axes.scatter(texts_N2[:, 0], texts_N2[:, 1], s=size, marker="x", color=INK, linewidths=0.6, alpha=0.6)
    axes.scatter(images_N2[:, 0], images_N2[:, 1], s=size, color=run_colour(run), linewidths=0, alpha=0.7)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])  # the numbers on these axes mean nothing to a reader
    axes.set_yticks([])
    axes.set_xlabel(f"first axis, {100 * explained_2[0]:.0f} % of the variance")
    axes.set_ylabel(f"second axis, {100 * explained_2[1]:.0f} %")
    return Panel(title, to_svg(figure, f"map {title}"))


def _log_axis(axes: Any, ticks: Sequence[int]) -> None:
    """Make the x axis logarithmic, with some ticks alone."""
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()

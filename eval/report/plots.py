"""Plots of results: recall against k, few-shot curves, calibration, embedding maps."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.classification import reliability
from threetowers.eval.report.svg import DASHES, INK, Panel, new_figure, run_colour, to_svg

CURVE_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)
Floats32 = NDArray[np.float32]


def recall_panel(title: str, ranks: Sequence[Sequence[Floats32]], galleries: Sequence[int]) -> Panel:
    """Recall against k, a line a run: the mean over galleries. `ranks[run][gallery]` counts from 1, NaN: excluded."""
    figure, axes = new_figure(width=5.2, height=3.2)
    ks = [k for k in CURVE_KS if k <= max(1, min(galleries, default=1))]
    for run, by_gallery in enumerate(ranks):
        if by_gallery:
            kept = [rank_N[~np.isnan(rank_N)] for rank_N in by_gallery]
            values = [100 * np.mean([(rank_N <= k).mean() for rank_N in kept]) for k in ks]
            axes.plot(ks, values, color=run_colour(run), linestyle=DASHES[run % len(DASHES)])
    axes.set_xscale("log")
    axes.set_xticks([k for k in (1, 5, 10, 50, 100, 500, 1000) if k <= ks[-1]])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("k")
    axes.set_ylabel("recall at k, percent")
    axes.set_ylim(0, 100)
    return Panel(title, to_svg(figure, f"recall {title}"))


def fewshot_panel(title: str, metrics: Sequence[Mapping[str, float] | None]) -> Panel | None:
    """Accuracy against shots, a line a run with the deviation over seeds; None without few-shot metrics."""
    figure, axes = new_figure(width=4.4, height=2.9)
    seen: set[int] = set()
    for run, values in enumerate(metrics):
        found = {int(m[1]): v for k, v in (values or {}).items() if (m := re.fullmatch(r"(\d+)-shot/top1", k))}
        shots = sorted(found)
        if shots and values is not None:
            mean = np.array([100 * found[s] for s in shots])
            spread = np.array([100 * values.get(f"{s}-shot/top1_deviation", 0.0) for s in shots])
            axes.plot(shots, mean, color=run_colour(run), linestyle=DASHES[run % len(DASHES)], marker="o", markersize=4)
            axes.fill_between(shots, mean - spread, mean + spread, color=run_colour(run), alpha=0.15, linewidth=0)
            seen |= set(shots)
    if not seen:
        return None
    axes.set_xscale("log")
    axes.set_xticks(sorted(seen))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("training images a class")
    axes.set_ylabel("top-1, percent")
    return Panel(title, to_svg(figure, f"few-shot {title}"))


def calibration_panel(title: str, judged: Sequence[tuple[Floats32, Floats32] | None]) -> Panel | None:
    """How often predictions are right against how confident they were, a line a run: (confidence_N, correct_N)."""
    figure, axes = new_figure(width=4.4, height=3.4)
    drawn = False
    axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    for run, found in enumerate(judged):
        if found is not None:
            counted = ~np.isnan(found[1])
            bins = reliability(found[0][counted], found[1][counted] > 0, bins=10)
            kept = bins.count_K > 0
            x, y, size = 100 * bins.confidence_K[kept], 100 * bins.accuracy_K[kept], bins.count_K[kept]
            axes.plot(x, y, color=run_colour(run), linestyle=DASHES[run % len(DASHES)])
            axes.scatter(x, y, s=8 + 60 * size / size.max(), color=run_colour(run), linewidths=0, zorder=3)
            drawn = True
    if not drawn:
        return None
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel("confidence, percent")
    axes.set_ylabel("right, percent")
    return Panel(title, to_svg(figure, f"calibration {title}"))


def map_panel(title: str, run: int, images_N2: Floats32, texts_N2: Floats32, explained_2: Floats32) -> Panel:
    """Images (dots in the run's colour) and captions (crosses) on the two main axes of both."""
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

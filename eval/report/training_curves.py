"""Plots of training curves, and of recalls by gallery."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.report.svg import DASHES, INK, LINE, Panel, new_figure, run_colour, to_svg

MAX_POINTS = 240
SMOOTHING = 30  # the running mean spans this fraction of a run
EXACT = ("lr", "scale")  # not noisy: a running mean would only bend them
LABELS = {
    "loss": "Loss (weighted sum of terms)",
    "lr": "Learning rate",
    "images_per_s": "Images per second",
    "data_wait": "Share of time waiting for data",
    "grad_norm": "Gradient norm",
}
TERM_KINDS = {"loss": "Loss of each pair term", "accuracy": "In-batch accuracy", "scale": "Scale"}
GENERAL = "Run as a whole"


@dataclass(frozen=True)
class TrainingMetrics:
    """Curves of one run by metric: (steps, values), both float64 and finite; `unreadable` lines were left out."""

    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    unreadable: int = 0

    @classmethod
    def of(cls, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], unreadable: int) -> "TrainingMetrics":
        """Return curves from plain numbers, as the metadata of a model holds them."""
        arrays = {}
        for name, (steps, values) in curves.items():
            arrays[name] = (np.array(steps, np.float64), np.array(values, np.float64))
        return cls(arrays, unreadable)


def read_metrics(path: Path) -> TrainingMetrics:
    """Read the `metrics.jsonl` of a run: every finite number of every line that has a step.

    A line that is not a JSON object with a step is counted and left out: a run killed while writing leaves one.

    Raises:
        OSError: If the file cannot be read.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict) or not _is_number(entry.get("step")):
                unreadable += bool(line.strip())
                continue
            for name, value in entry.items():
                if name != "step" and _is_number(value):
                    points.setdefault(name, []).append((float(entry["step"]), float(value)))
    curves = {}
    for name, pairs in points.items():
        steps, values = np.array(pairs).T
        curves[name] = (steps, values)
    return TrainingMetrics(curves, unreadable)


def thinned(metrics: TrainingMetrics) -> dict[str, tuple[list[float], list[float]]]:
    """Return the curves that are drawn, as plain rounded numbers, long ones as means over equal stretches."""
    names = [name for name in LABELS if name in metrics.curves]
    names += [name for name in metrics.curves if re.fullmatch(rf"terms/[^/]+/({'|'.join(TERM_KINDS)})", name)]
    curves = {}
    for name in names:
        steps, values = _thin(*metrics.curves[name], 4 * MAX_POINTS)
        curves[name] = (np.round(steps, 1).tolist(), [float(f"{value:.5g}") for value in values])
    return curves


def training_panels(runs: Sequence[TrainingMetrics | None]) -> dict[str, list[Panel]]:
    """Return panels by heading, every run in each: loss, accuracy and scale of every pair term, then the other metrics.

    A faint line is the metric as logged (as means over `MAX_POINTS` stretches where it is longer), a strong one its
    running mean over 1/`SMOOTHING` of the run.
    """
    names = list(dict.fromkeys(name for run in runs if run for name in run.curves))
    sections: dict[str, list[Panel]] = {}
    for kind, heading in TERM_KINDS.items():
        terms = [name.split("/")[1] for name in names if re.fullmatch(rf"terms/[^/]+/{kind}", name)]
        panels = [_curve_panel(term, f"terms/{term}/{kind}", runs, kind) for term in terms]
        if panels:
            sections[heading] = panels
    general = [_curve_panel(label, name, runs, name) for name, label in LABELS.items() if name in names]
    if general:
        sections[GENERAL] = general
    return sections


def gallery_panel(
    title: str, galleries: Sequence[str], values: Sequence[Sequence[float]], chance: Sequence[float]
) -> Panel:
    """Return a plot of recalls: a line a gallery, a dot a run, chance as a tick.

    Args:
        title: Title of the panel.
        galleries: Names of the galleries.
        values: `values[run][gallery]`, in 0..1, NaN for none.
        chance: Of each gallery, in 0..1.
    """
    figure, axes = new_figure(width=5.2, height=0.7 + 0.45 * len(galleries))
    y = np.arange(len(galleries), dtype=float)
    axes.plot([100 * c for c in chance], y, "|", markersize=16, markeredgewidth=1.5, color=INK, clip_on=False)
    for run, run_values in enumerate(values):
        offset = (run - (len(values) - 1) / 2) * min(0.22, 0.66 / len(values))
        axes.plot(
            [100 * v for v in run_values],
            y + offset,
            "o",
            markersize=7,
            color=run_colour(run),
            clip_on=False,
            zorder=3,
        )
    axes.set_yticks(y, [name if len(name) <= 18 else f"{name[:17]}…" for name in galleries])
    axes.set_ylim(len(galleries) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("R@1 in percent")
    axes.grid(axis="x", visible=True)
    axes.grid(axis="y", visible=False)
    for boundary in y[1:] - 0.5:
        axes.axhline(boundary, color=LINE, linewidth=0.7)
    return Panel(title, to_svg(figure, title))


def _is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve_panel(title: str, name: str, runs: Sequence[TrainingMetrics | None], kind: str) -> Panel:
    """Return a plot of one metric, a line a run; `kind` is the metric without its term."""
    figure, axes = new_figure(width=4.4, height=2.6)
    for index, run in enumerate(runs):
        if run and name in run.curves:
            steps, values = run.curves[name]
            style = {"color": run_colour(index), "linestyle": DASHES[index % len(DASHES)]}
            window = 1 if kind in EXACT else max(1, len(steps) // SMOOTHING)
            if window > 1:  # otherwise the running mean is the metric itself
                axes.plot(*_thin(steps, values), color=run_colour(index), linewidth=0.8, alpha=0.35)
            smooth = _thin(steps, _running_mean(values, window))
            axes.plot(*smooth, **style, marker="o" if len(steps) == 1 else None)
    axes.set_xlabel("step")
    if kind in ("accuracy", "data_wait"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.set_ylim(bottom=0)
    if kind == "images_per_s":
        _speed_axis(axes, [run.curves[name][1] for run in runs if run and name in run.curves])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}")
    return Panel(title, to_svg(figure, f"{kind} {title}"))


def _speed_axis(axes: Any, values: Sequence[NDArray[np.float64]]) -> None:
    """Begin the axis of speeds at zero, or make it logarithmic where slow runs would lie on the axis."""
    typical = [float(np.median(v)) for v in values]
    if min(typical) > 0 and max(typical) > 6 * min(typical):
        axes.set_yscale("log")
        axes.set_ylabel("logarithmic")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
        axes.tick_params(axis="y", which="minor", length=0, labelsize=8)
    else:
        axes.set_ylim(bottom=0)


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the centered running mean, over a shorter window towards both ends."""
    weights = np.ones(window)
    smooth: NDArray[np.float64] = np.convolve(values, weights, "same")
    return smooth / np.convolve(np.ones_like(values), weights, "same")


def _thin(
    steps: NDArray[np.float64], values: NDArray[np.float64], points: int = MAX_POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a curve of at most some points, each the mean over an equal stretch."""
    if len(steps) <= points:
        return steps, values
    starts = np.linspace(0, len(steps), points, endpoint=False).astype(int)
    lengths = np.diff(starts, append=len(steps))
    return np.add.reduceat(steps, starts) / lengths, np.add.reduceat(values, starts) / lengths

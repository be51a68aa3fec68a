"""Plots of scores against how well the teacher fits the data, and against the seconds that they took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from reproduce.fit_regression import FitRegression
from threetowers.eval.metrics.bootstrap import ConfidenceInterval
from threetowers.eval.report.svg import DASHES, INK, Panel, new_figure, run_colour, to_svg

MARKERS = ("o", "s", "^", "D", "v", "P")
FIT_LABEL = "fit of the teacher: subgroups of validation concepts by its nearest neighbours, percent"
ARM_STYLES = {"equal": "solid", "large": "dashed"}


@dataclass(frozen=True)
class Point:
    """The runs of one recipe in a plot.

    Attributes:
        x: The teacher's fit in 0..1, or seconds.
        y: Their score, or a difference.
        label: Text beside the point.
        live: Estimated seconds without a cache.
        arm: Arm of the teacher; only points of one arm are joined.
    """

    x: float
    y: ConfidenceInterval
    label: str = ""
    live: float | None = None
    arm: str = ""


def fit_panel(title: str, series: Mapping[str, Sequence[Point]], level: ConfidenceInterval | None) -> Panel:
    """Return a plot of scores against the fit: a line a method and arm, and the level of the baseline."""
    figure, axes = new_figure(width=6.4, height=3.6)
    if level is not None:
        axes.axhspan(100 * level.low, 100 * level.high, color=INK, alpha=0.1, linewidth=0)
        axes.axhline(100 * level.mean, color=INK, linestyle=(0, (6, 2)), linewidth=1)
    # Points of one teacher stand above each other: its label goes to the highest.
    highest: dict[str, float] = {}
    for point in chain.from_iterable(series.values()):
        highest[point.label] = max(point.y.mean, highest.get(point.label, point.y.mean))
    for number, (name, points) in enumerate(series.items(), 1):  # the baseline is 0, as in the plot of seconds
        ordered = sorted(points, key=lambda point: point.x)
        for arm, style in ARM_STYLES.items():
            joined = [point for point in ordered if point.arm == arm]
            x = [100 * point.x for point in joined]
            y = [100 * point.y.mean for point in joined]
            axes.plot(x, y, color=run_colour(number), linewidth=1, linestyle=style)
        labelled = [p if p.y.mean == highest[p.label] else replace(p, label="") for p in ordered]
        _scatter(axes, labelled, number, name, 100)
    axes.set_xlabel(FIT_LABEL)
    axes.set_ylabel(f"{title}, percent")
    axes.legend(frameon=False, loc="upper left")
    caption = "solid: teachers of the main tower's size; dashed: large ones; the band is training from scratch"
    return Panel(f"{title} against the teacher's fit; {caption}", to_svg(figure, f"fit {title}"))


def slope_panel(title: str, points: Sequence[Point], lines: Mapping[str, FitRegression]) -> Panel:
    """Return a plot of a difference against the fit, with regression lines by the names of their teachers."""
    figure, axes = new_figure(width=6.4, height=3.6)
    axes.axhline(0, color=INK, linewidth=1)
    for number, (name, line) in enumerate(lines.items(), 1):
        x = [100 * end for end in line.ends]
        y = [100 * line.at(end) for end in line.ends]
        axes.plot(x, y, color=INK, linestyle=DASHES[number % len(DASHES)], linewidth=1, label=f"line: {name}")
    for number, arm in enumerate(ARM_STYLES, 1):
        _scatter(axes, [point for point in points if point.arm == arm], number, f"teacher of the {arm} arm", 100)
    axes.set_xlabel(FIT_LABEL)
    axes.set_ylabel("difference, points")
    axes.legend(frameon=False, loc="lower left", fontsize=8)
    return Panel(f"{title}, against the teacher's fit", to_svg(figure, f"slope {title}"))


def seconds_panel(title: str, series: Mapping[str, Sequence[Point]]) -> Panel:
    """Return a plot of scores against seconds: filled as measured, hollow as estimated with a live teacher."""
    figure, axes = new_figure(width=6.4, height=4.2)
    for number, (name, points) in enumerate(series.items()):
        # Where there is an estimate, the label stands beside it.
        _scatter(axes, [replace(point, label="" if point.live else point.label) for point in points], number, name, 1)
        for point in points:
            if point.live is not None:
                y = 100 * point.y.mean
                style = {"color": run_colour(number), "linestyle": (0, (1, 2)), "linewidth": 1}
                axes.plot([point.x, point.live], [y, y], **style)
                axes.plot([point.live], [y], color=run_colour(number), marker=_marker(number), markerfacecolor="none")
                _annotate(axes, point.label, point.live, y)
    axes.set_xscale("log", subs=[2, 5])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.set_xlabel("seconds on one core: the teacher's rows, and training")
    axes.set_ylabel(f"{title}, percent")
    axes.legend(frameon=False, loc="lower right")
    return Panel(
        f"{title} against the seconds spent; hollow: a live teacher, by arithmetic", to_svg(figure, f"seconds {title}")
    )


def _scatter(axes: Any, points: Sequence[Point], number: int, name: str, factor: float) -> None:
    """Draw points with their intervals; `number` chooses colour and marker, `factor` scales x."""
    style = {"color": run_colour(number), "marker": _marker(number), "markersize": 6, "linewidth": 1}
    for index, point in enumerate(points):
        x = factor * point.x
        y = 100 * point.y.mean
        interval = [[max(0.0, y - 100 * point.y.low)], [max(0.0, 100 * point.y.high - y)]]
        axes.errorbar([x], [y], yerr=interval, label=name if index == 0 else None, **style)
        _annotate(axes, point.label, x, y)


def _annotate(axes: Any, label: str, x: float, y: float) -> None:
    axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]

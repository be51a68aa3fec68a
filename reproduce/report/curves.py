"""The plots: quality against how well the teacher fits the data, and against the seconds that were spent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reproduce.slope import Slope
from threetowers.eval.metrics.bootstrap import ConfidenceInterval
from threetowers.eval.report.svg import DASHES, INK, Panel, new_figure, run_colour, to_svg

MARKERS = ("o", "s", "^", "D", "v", "P")
FIT = "fit of the teacher: subgroups of validation concepts by its nearest neighbours, percent"
LINES = {"equal": "solid", "large": "dashed"}  # by arm


@dataclass(frozen=True)
class Point:
    """One group of runs: `x` is its teacher's fit (a fraction), or seconds; `live`: seconds estimated with no cache.

    `arm`: of the teacher; only points of one arm can be joined.
    """

    x: float
    y: ConfidenceInterval
    label: str = ""
    live: float | None = None
    arm: str = ""


def fit_panel(title: str, series: Mapping[str, Sequence[Point]], level: ConfidenceInterval | None) -> Panel:
    """A line a method and arm over its teachers, and the level of the baseline that has none."""
    figure, axes = new_figure(width=6.4, height=3.6)
    if level is not None:
        axes.axhspan(100 * level.low, 100 * level.high, color=INK, alpha=0.1, linewidth=0)
        axes.axhline(100 * level.mean, color=INK, linestyle=(0, (6, 2)), linewidth=1)
    highest: dict[str, float] = {}
    for point in (point for points in series.values() for point in points):
        highest[point.label] = max(point.y.mean, highest.get(point.label, point.y.mean))
    for number, (name, points) in enumerate(series.items(), 1):  # 0 is the baseline's, as in the other plot
        ordered = [_named_once(point, highest) for point in sorted(points, key=lambda point: point.x)]
        for arm, style in LINES.items():
            x, y = [100 * p.x for p in ordered if p.arm == arm], [100 * p.y.mean for p in ordered if p.arm == arm]
            axes.plot(x, y, color=run_colour(number), linewidth=1, linestyle=style)
        _scatter(axes, ordered, number, name, 100)
    axes.set_xlabel(FIT)
    axes.set_ylabel(f"{title}, percent")
    axes.legend(frameon=False, loc="upper left")
    caption = "solid: teachers of the main tower's size; dashed: large ones; the band is training from scratch"
    return Panel(f"{title} against the teacher's fit; {caption}", to_svg(figure, f"fit {title}"))


def slope_panel(title: str, points: Sequence[Point], lines: Mapping[str, Slope]) -> Panel:
    """A difference by the fit of the teacher, with lines through some of its points."""
    figure, axes = new_figure(width=6.4, height=3.6)
    axes.axhline(0, color=INK, linewidth=1)
    for number, (name, line) in enumerate(lines.items(), 1):
        x, y = [100 * end for end in line.ends], [100 * line.at(end) for end in line.ends]
        axes.plot(x, y, color=INK, linestyle=DASHES[number % len(DASHES)], linewidth=1, label=f"line: {name}")
    for number, arm in enumerate(LINES, 1):
        _scatter(axes, [point for point in points if point.arm == arm], number, f"teacher of the {arm} arm", 100)
    axes.set_xlabel(FIT)
    axes.set_ylabel("difference, points")
    axes.legend(frameon=False, loc="lower left", fontsize=8)
    return Panel(f"{title}, against the teacher's fit", to_svg(figure, f"slope {title}"))


def seconds_panel(title: str, series: Mapping[str, Sequence[Point]]) -> Panel:
    """A dot a group of runs, filled as measured; dotted from it, hollow, with a live teacher as estimated."""
    figure, axes = new_figure(width=6.4, height=4.2)
    for number, (name, points) in enumerate(series.items()):
        _scatter(axes, [replace(p, label="" if p.live else p.label) for p in points], number, name, 1)
        for point in points:
            if point.live is not None:
                y = 100 * point.y.mean
                style = {"color": run_colour(number), "linestyle": (0, (1, 2)), "linewidth": 1}
                axes.plot([point.x, point.live], [y, y], **style)
                axes.plot([point.live], [y], color=run_colour(number), marker=_marker(number), markerfacecolor="none")
                _annotate(axes, point.label, point.live, y)
    axes.set_xscale("log", subs=[2, 5])
    for kind in ("major", "minor"):
        getattr(axes.xaxis, f"set_{kind}_formatter")("{x:,.0f}")
    axes.set_xlabel("seconds on one core: the teacher's rows, and training")
    axes.set_ylabel(f"{title}, percent")
    axes.legend(frameon=False, loc="lower right")
    return Panel(
        f"{title} against the seconds spent; hollow: a live teacher, by arithmetic", to_svg(figure, f"seconds {title}")
    )


def _named_once(point: Point, highest: Mapping[str, float]) -> Point:
    """Methods with one teacher stand above each other: its name goes to the highest."""
    return point if point.y.mean == highest[point.label] else replace(point, label="")


def _scatter(axes: Any, points: Sequence[Point], number: int, name: str, factor: float) -> None:
    colour = run_colour(number)
    for storage, point in enumerate(points):
        x, y = factor * point.x, 100 * point.y.mean
        bounds = [[max(0.0, y - 100 * point.y.low)], [max(0.0, 100 * point.y.high - y)]]
        axes.errorbar(
            [x], [y], yerr=bounds, color=colour, marker=_marker(number), markersize=6, linewidth=1,
            label=name if storage == 0 else None,
        )  # fmt: skip
        _annotate(axes, point.label, x, y)


def _annotate(axes: Any, label: str, x: float, y: float) -> None:
    axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]

"""The plots: quality against how well the teacher fits the data, and against the seconds that were spent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from threetowers.eval.bootstrap import Interval
from threetowers.eval.drawing import INK, Panel, new_figure, run_colour, to_svg

MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Point:
    """One group of runs: `x` is its teacher's fit (a fraction), or seconds; `hollow`: an estimate."""

    x: float
    y: Interval
    label: str = ""
    hollow: bool = False


def fit_panel(title: str, series: Mapping[str, Sequence[Point]], level: Interval | None) -> Panel:
    """A line a method over its teachers, and the level of the baseline that has none."""
    figure, axes = new_figure(width=6.4, height=3.6)
    if level is not None:
        axes.axhspan(100 * level.low, 100 * level.high, color=INK, alpha=0.1, linewidth=0)
        axes.axhline(100 * level.mean, color=INK, linestyle=(0, (6, 2)), linewidth=1)
    for number, (name, points) in enumerate(series.items()):
        ordered = sorted(points, key=lambda point: point.x)
        axes.plot(
            [100 * p.x for p in ordered], [100 * p.y.mean for p in ordered], color=run_colour(number), linewidth=1
        )
        _scatter(axes, ordered, number, name, 100)
    axes.set_xlabel("fit of the teacher: subgroups of validation concepts by its nearest neighbours, percent")
    axes.set_ylabel(f"{title}, percent")
    axes.legend(frameon=False)
    return Panel(
        f"{title} against the teacher's fit; the band is training from scratch", to_svg(figure, f"fit {title}")
    )


def seconds_panel(title: str, series: Mapping[str, Sequence[Point]]) -> Panel:
    """A dot a group of runs: filled as measured, hollow with a live teacher as estimated."""
    figure, axes = new_figure(width=6.4, height=3.6)
    for number, (name, points) in enumerate(series.items()):
        _scatter(axes, points, number, name, 1)
    axes.set_xscale("log")
    axes.set_xlabel("seconds on one core: the teacher's rows, and training")
    axes.set_ylabel(f"{title}, percent")
    axes.legend(frameon=False)
    return Panel(f"{title} against the seconds spent", to_svg(figure, f"seconds {title}"))


def _scatter(axes: object, points: Sequence[Point], number: int, name: str, factor: float) -> None:
    colour, marker = run_colour(number), MARKERS[number % len(MARKERS)]
    for place, point in enumerate(points):
        x, y = factor * point.x, 100 * point.y.mean
        bounds = [[max(0.0, y - 100 * point.y.low)], [max(0.0, 100 * point.y.high - y)]]
        face = "none" if point.hollow else colour
        axes.errorbar(  # type: ignore[attr-defined]
            [x], [y], yerr=bounds, color=colour, marker=marker, markerfacecolor=face, markersize=6, linewidth=1,
            label=name if place == 0 else None,
        )  # fmt: skip
        axes.annotate(point.label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)  # type: ignore[attr-defined]

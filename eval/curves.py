"""Training curves and gallery plots as inline SVG that takes its colours from the page, light or dark."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 240
SMOOTHING = 30  # the running mean spans this fraction of a run
EXACT = ("lr", "scale")  # not noisy: a running mean would only bend them
# Stand-ins that matplotlib draws with; in the SVG they become the page's own colours.
INK, LINE = "#010203", "#010204"
RUN_COLOURS = 8
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
DASH_ARRAYS = ("none", "9 3", "3 2", "10 3 2 3")  # the same, for the legend's swatches
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
    """Curves of one run: metric name → (steps, values), both float64 and finite. `unreadable` lines were left out."""

    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
    unreadable: int = 0


@dataclass(frozen=True)
class Panel:
    """One plot. `svg` is trusted markup, made here; `title` is text."""

    title: str
    svg: str


def read_metrics(path: Path) -> TrainingMetrics:
    """Read the `metrics.jsonl` of a run: every number of every line that has a step; null and NaN are gaps.

    A line that is not a JSON object with a step (a run killed while writing leaves one) is counted, not fatal. Raises
    OSError if the file cannot be read.
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


def training_panels(runs: Sequence[TrainingMetrics | None]) -> dict[str, list[Panel]]:
    """Panels by heading, every run in each: loss, accuracy and scale of every pair term, then the run as a whole.

    A faint line is what was logged (as means over `MAX_POINTS` stretches where it is longer), a strong one its running
    mean over 1/`SMOOTHING` of the run.
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
    """Recalls in percent: a line a gallery, a dot a run (`values[run][gallery]`, NaN for none), chance as a tick."""
    figure, axes = _figure(width=5.2, height=0.7 + 0.45 * len(galleries))
    y = np.arange(len(galleries), dtype=float)
    axes.plot([100 * c for c in chance], y, "|", markersize=16, markeredgewidth=1.5, color=INK, clip_on=False)
    for run, run_values in enumerate(values):
        offset = (run - (len(values) - 1) / 2) * min(0.22, 0.66 / len(values))
        axes.plot(
            [100 * v for v in run_values],
            y + offset,
            "o",
            markersize=7,
            color=_run_colour(run),
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
    return Panel(title, _svg(figure, title))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _curve_panel(title: str, name: str, runs: Sequence[TrainingMetrics | None], kind: str) -> Panel:
    figure, axes = _figure(width=4.4, height=2.6)
    for index, run in enumerate(runs):
        if run and name in run.curves:
            steps, values = run.curves[name]
            style = {"color": _run_colour(index), "linestyle": DASHES[index % len(DASHES)]}
            window = 1 if kind in EXACT else max(1, len(steps) // SMOOTHING)
            if window > 1:
                axes.plot(*_thin(steps, values), color=_run_colour(index), linewidth=0.8, alpha=0.35)
            smooth = _thin(steps, _running_mean(values, window))
            axes.plot(*smooth, **style, marker="o" if len(steps) == 1 else None)
    axes.set_xlabel("step")
    if kind in ("accuracy", "data_wait"):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.set_ylim(bottom=0)
    if kind == "images_per_s":
        _speed_axis(axes, [run.curves[name][1] for run in runs if run and name in run.curves])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}")
    return Panel(title, _svg(figure, f"{kind} {title}"))


def _speed_axis(axes: Any, values: Sequence[NDArray[np.float64]]) -> None:
    """From zero, or logarithmic where the runs differ so much that the slower ones would lie on the axis."""
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
    """Centred mean; towards both ends it covers what there is."""
    weights = np.ones(window)
    smooth: NDArray[np.float64] = np.convolve(values, weights, "same")
    return smooth / np.convolve(np.ones_like(values), weights, "same")


def _thin(steps: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(steps) <= MAX_POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), MAX_POINTS, endpoint=False).astype(int)
    lengths = np.diff(starts, append=len(steps))
    return np.add.reduceat(steps, starts) / lengths, np.add.reduceat(values, starts) / lengths


def _run_colour(index: int) -> str:
    return f"#0102{0x10 + index % RUN_COLOURS:02x}"


def _style() -> Any:
    return {
        "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # a $ in a name is a $
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.edgecolor": LINE,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "axes.formatter.useoffset": False,
    }


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element of no fixed size, in the page's colours and font, with nothing from outside."""
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context(_style() | {"svg.hashsalt": name}):  # ids unlike those of the page's other figures
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    used = set(re.findall(r"(?:url\(|href=\")#(\w+)", text))
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if "style" in attributes:
            attributes["style"] = _page_style(attributes["style"])
        element.attrib = attributes
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode")


def _page_style(style: str) -> str:
    style = re.sub(r"font-family: [^;]*;? ?", "", re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", style))
    style = style.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    return re.sub(r"#0102(1[0-7])", lambda match: f"var(--run-{int(match[1], 16) - 0x10})", style)

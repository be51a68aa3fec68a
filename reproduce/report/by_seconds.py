"""Section: scores against the seconds that they took, and would have taken with a live teacher."""

from collections.abc import Iterator

import numpy as np

from reproduce.report.document import Element, Figure, Heading, Paragraph
from reproduce.report.plots import Point, seconds_panel
from reproduce.report.report_data import BASELINE, ReportData
from reproduce.scores import Metric

LIVE = "live"  # the ablation in which the third tower is not cached


def seconds_section(data: ReportData) -> Iterator[Element]:
    """Yield a plot of the first metric against seconds."""
    if not data.claims.plotted:
        return
    yield Heading("By seconds")
    yield Paragraph(
        "Seconds are of one core, with another run beside it: the training, and the rows of the teacher's cache, "
        "once. Hollow: the same with a live teacher in place of the cache, by arithmetic: its rows' seconds, "
        "decoding included, once an epoch. "
        f"Where a live teacher was really run, in the ablation `{LIVE}`, it is a filled dot of its own."
    )
    key, metric = next(iter(data.metrics.items()))
    series = {}
    live = [f"{data.plan.mixing.method}/{LIVE}"] if data.plan.mixing is not None else []
    for name in (BASELINE, *data.claims.plotted, *live):
        points = _points(data, name, metric)
        if points:
            series[name] = points
    if series:
        yield Figure(seconds_panel(metric.title, series), f"seconds-{key}")


def _points(data: ReportData, name: str, metric: Metric) -> list[Point]:
    """Return a point a teacher of METHOD or METHOD/VARIANT: seconds of training and of the cache, and the score."""
    method, _, variant = name.partition("/")
    points = []
    for recipe, results in data.scores.results.items():
        if (recipe.method, recipe.variant or "") != (method, variant):
            continue
        score = data.scores.interval(name, recipe.teacher, metric)
        if score is None:
            continue
        training = float(np.mean([result.facts["seconds"] for result in results]))
        rows = 0.0 if variant else data.rows_seconds(recipe.teacher)
        live = training + rows * data.plan.epochs if rows else None
        points.append(Point(training + rows, score, recipe.teacher or "", live))
    return points

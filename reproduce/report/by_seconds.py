"""Scores by the seconds that they took, and what they would have taken with a live teacher."""

from collections.abc import Iterator

import numpy as np

from reproduce.report.curves import Point, seconds_panel
from reproduce.report.document import Block, Heading, Plot, Text
from reproduce.report.findings import BASELINE, PLOTTED, Findings
from reproduce.scores import Metric

LIVE = "live"  # the ablation in which the third tower is not cached


def blocks(findings: Findings) -> Iterator[Block]:
    yield Heading("By seconds")
    yield Text(
        "Seconds are of one core, with another run beside it: the training, and the rows of the teacher's cache, "
        "once. Hollow: the same with a live teacher in place of the cache, by arithmetic: its rows' seconds, "
        "decoding included, once an epoch. "
        f"Where a live teacher was really run, in the ablation `{LIVE}`, it is a filled dot of its own."
    )
    key, metric = next(iter(findings.metrics.items()))
    if spent := dict(_spent(findings, metric)):
        yield Plot(seconds_panel(metric.title, spent), f"seconds-{key}")


def _spent(findings: Findings, metric: Metric) -> Iterator[tuple[str, list[Point]]]:
    """Seconds of training and of the cache's rows; the baseline, the methods that are plotted, the live teacher."""
    live = f"{findings.plan.mixing.method}/{LIVE}"
    for name in (BASELINE, *PLOTTED, live):
        method, _, variant = name.partition("/")
        points = []
        for key, results in findings.scores.groups.items():
            if (key[0], key[2] or "") == (method, variant):
                y = findings.scores.interval(name, key[1], metric)
                if y is not None:
                    training = float(np.mean([result.facts["seconds"] for result in results]))
                    rows = 0.0 if variant else findings.rows_seconds(key[1])
                    estimate = training + rows * findings.plan.epochs if rows else None
                    points.append(Point(training + rows, y, key[1] or "", estimate))
        if points:
            yield name, points

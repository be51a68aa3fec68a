"""The teachers, and how scores and their differences go with how well a teacher fits the data."""

from collections.abc import Iterator

from reproduce.claims import ByFit, measure
from reproduce.folder import read_json
from reproduce.report.cells import ABSENT, percent, points
from reproduce.report.curves import Point, fit_panel, slope_panel
from reproduce.report.document import Block, Heading, Plot, Rows, Text
from reproduce.report.findings import BASELINE, PLOTTED, Findings
from reproduce.scores import Metric
from reproduce.slope import Slope, slope


def blocks(findings: Findings) -> Iterator[Block]:
    yield Heading("By the teacher's fit")
    yield Text(
        "Fit: subgroups of the validation concepts told by the teacher's own features, from their ten nearest "
        "training pictures. Own task: accuracy on pictures held back from its pretraining here."
    )
    heads = ["Teacher", "Arm", "Fit, percent", "Own task, percent", "Seconds of its rows"]
    yield Rows(heads, list(_teachers(findings)))
    for number, asked in enumerate(findings.claims.by_fit, 1):
        yield from _lines(findings, asked, f"slope-{number}")
    for key, metric in findings.metrics.items():
        yield from _panel(findings, key, metric)


def _teachers(findings: Findings) -> Iterator[list[str]]:
    for name, fit in findings.fits.items():
        path = findings.folder[f"teachers/{name}/pretraining.json"]
        own = read_json(path).get("held_back_accuracy") if path.exists() else None
        accuracy = ABSENT if own is None else f"{100 * own:.1f}"
        arm, seconds = findings.plan.teachers[name].arm, findings.rows_seconds(name)
        yield [name, arm, f"{100 * fit:.1f}", accuracy, f"{seconds:.0f}"]


def _lines(findings: Findings, asked: ByFit, plot: str) -> Iterator[Block]:
    """A difference by fit: a line a set of teachers and metric, and the first metric as a plot."""
    metrics = findings.metrics
    lines = {key: _slopes(findings, asked, metrics[key]) for key in asked.metrics}
    rows = [[name, metrics[key].title, *_cells(line)] for key, of in lines.items() for name, line in of.items()]
    if not rows:
        return
    over = f"{asked.first} over {asked.second}"
    yield Heading(f"{asked.title} by the teacher's fit", 3)
    yield Text(
        f"Lines by least squares through teachers. In points: what {asked.first}, {asked.second} and their "
        "difference change for ten points of fit, and the difference in the mean over these teachers. Even: "
        "the fit at which the line of the difference crosses zero, where it surely changes. Intervals are of "
        "concepts and seeds, the teachers taken as given. No verdict is drawn from this: it was asked when "
        "the claims had their answers."
    )
    yield Rows(["Teachers", "Metric", asked.first, asked.second, over, "Mean", "Even at a fit of", "Seeds"], rows)
    key = next(key for key in lines if lines[key])
    measured = list(_differences(findings, asked, metrics[key]))
    yield Plot(slope_panel(f"{over}: {metrics[key].title}", measured, lines[key]), plot)


def _slopes(findings: Findings, asked: ByFit, metric: Metric) -> dict[str, Slope]:
    lines = {}
    for name, teachers in asked.lines.items():
        fits = {teacher: findings.fits[teacher] for teacher in teachers if teacher in findings.fits}
        if (line := slope(findings.scores, (asked.first, asked.second), fits, metric)) is not None:
            lines[name] = line
    return lines


def _differences(findings: Findings, asked: ByFit, metric: Metric) -> Iterator[Point]:
    for name in dict.fromkeys(teacher for teachers in asked.lines.values() for teacher in teachers):
        measured = measure(findings.scores, (asked.first, asked.second), name, metric)
        if name in findings.fits and measured is not None:
            yield Point(findings.fits[name], measured[1], name, arm=findings.plan.teachers[name].arm)


def _cells(line: Slope) -> list[str]:
    """Points for each ten points of fit, the mean difference, and the fit at which there is none."""
    tens = [points(side, 10) for side in (line.first, line.second, line.difference)]
    return [*tens, points(line.mean), percent(line.even), str(line.seeds)]


def _panel(findings: Findings, key: str, metric: Metric) -> Iterator[Plot]:
    """Scores by fit, where there are any."""
    series = {
        method: [
            Point(fit, y, teacher, arm=findings.plan.teachers[teacher].arm)
            for teacher, fit in findings.fits.items()
            if (y := findings.scores.interval(method, teacher, metric)) is not None
        ]
        for method in PLOTTED
    }
    if any(series.values()):
        level = findings.scores.interval(BASELINE, None, metric)
        yield Plot(fit_panel(metric.title, {name: s for name, s in series.items() if s}, level), f"fit-{key}")

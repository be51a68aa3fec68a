"""Section: the teachers, and scores and their differences against how well a teacher fits the data."""

from collections.abc import Iterator
from itertools import chain

from reproduce.claims import ByFit, measure_difference
from reproduce.fit_regression import FitRegression, fit_regression
from reproduce.folder import read_json
from reproduce.report.cells import NOT_AVAILABLE, percent_text, points_text
from reproduce.report.document import Element, Figure, Heading, Paragraph, TextTable
from reproduce.report.plots import Point, fit_panel, slope_panel
from reproduce.report.report_data import BASELINE, ReportData
from reproduce.scores import Metric


def fit_section(data: ReportData) -> Iterator[Element]:
    """Yield the teachers, the regressions of differences on the fit, and plots of scores against it."""
    if not data.claims.plotted:
        return
    yield Heading("By the teacher's fit")
    yield Paragraph(
        "Fit: subgroups of the validation concepts told by the teacher's own features, from their ten nearest "
        "training images. Own task: accuracy on images held out from its pretraining here."
    )
    heads = ["Teacher", "Arm", "Fit, percent", "Own task, percent", "Seconds of its rows"]
    yield TextTable(heads, [_teacher_row(data, name, fit) for name, fit in data.fits.items()])
    for number, by_fit in enumerate(data.claims.by_fit, 1):
        yield from _difference_by_fit(data, by_fit, f"slope-{number}")
    for key, metric in data.metrics.items():
        yield from _scores_by_fit(data, key, metric)


def _teacher_row(data: ReportData, name: str, fit: float) -> list[str]:
    path = data.folder[f"teachers/{name}/pretraining.json"]
    accuracy = read_json(path).get("held_out_accuracy") if path.exists() else None
    own_task = NOT_AVAILABLE if accuracy is None else f"{100 * accuracy:.1f}"
    return [name, data.plan.teachers[name].arm, f"{100 * fit:.1f}", own_task, f"{data.rows_seconds(name):.0f}"]


def _difference_by_fit(data: ReportData, by_fit: ByFit, plot: str) -> Iterator[Element]:
    """Yield the regressions of a difference, a row a metric and set of teachers, and a plot of the first metric."""
    rows = []
    plotted: tuple[Metric, dict[str, FitRegression]] | None = None
    for key in by_fit.metrics:
        metric = data.metrics[key]
        lines = _regressions(data, by_fit, metric)
        for name, line in lines.items():
            slopes = [points_text(slope, 10) for slope in (line.first, line.second, line.difference)]
            rows.append([name, metric.title, *slopes, points_text(line.mean), percent_text(line.even), str(line.seeds)])
        if lines and plotted is None:
            plotted = metric, lines
    if plotted is None:
        return
    over = f"{by_fit.first} over {by_fit.second}"
    yield Heading(f"{by_fit.title} by the teacher's fit", 3)
    yield Paragraph(
        f"Lines by least squares through teachers. In points: what {by_fit.first}, {by_fit.second} and their "
        "difference change for ten points of fit, and the difference in the mean over these teachers. Even: "
        "the fit at which the line of the difference crosses zero, where it surely changes. Intervals are of "
        "concepts and seeds, the teachers taken as given. No verdict is drawn from this: it was asked when "
        "the claims had their answers."
    )
    heads = ["Teachers", "Metric", by_fit.first, by_fit.second, over, "Mean", "Even at a fit of", "Seeds"]
    yield TextTable(heads, rows)
    metric, lines = plotted
    yield Figure(slope_panel(f"{over}: {metric.title}", _difference_points(data, by_fit, metric), lines), plot)


def _regressions(data: ReportData, by_fit: ByFit, metric: Metric) -> dict[str, FitRegression]:
    """Return the regression through each set of teachers that has enough of them."""
    lines = {}
    for name, teachers in by_fit.lines.items():
        fits = {teacher: data.fits[teacher] for teacher in teachers if teacher in data.fits}
        line = fit_regression(data.scores, (by_fit.first, by_fit.second), fits, metric)
        if line is not None:
            lines[name] = line
    return lines


def _difference_points(data: ReportData, by_fit: ByFit, metric: Metric) -> list[Point]:
    """Return a point for each teacher of any line that was measured."""
    points = []
    for teacher in dict.fromkeys(chain.from_iterable(by_fit.lines.values())):
        measured = measure_difference(data.scores, (by_fit.first, by_fit.second), teacher, metric)
        if teacher in data.fits and measured is not None:
            arm = data.plan.teachers[teacher].arm
            points.append(Point(data.fits[teacher], measured.difference, teacher, arm=arm))
    return points


def _scores_by_fit(data: ReportData, key: str, metric: Metric) -> Iterator[Figure]:
    """Yield a plot of one metric, if it was measured with any teacher."""
    series: dict[str, list[Point]] = {}
    for method in data.claims.plotted:
        for teacher, fit in data.fits.items():
            score = data.scores.interval(method, teacher, metric)
            if score is not None:
                point = Point(fit, score, teacher, arm=data.plan.teachers[teacher].arm)
                series.setdefault(method, []).append(point)
    if series:
        level = data.scores.interval(BASELINE, None, metric)
        yield Figure(fit_panel(metric.title, series, level), f"fit-{key}")

"""Section: the papers' claims with their verdicts, line by line, and differences under several conditions."""

from collections.abc import Iterator, Mapping

from reproduce.claims import RULE, VERDICTS, ClaimResult, evaluate_claims, measure_difference
from reproduce.report.cells import NOT_AVAILABLE, difference_cells
from reproduce.report.document import Element, Heading, Paragraph, TextTable
from reproduce.report.report_data import ReportData
from reproduce.scores import Metric

DIFFERENCE_HEADS = ["First", "Second", "Points", "95 % interval", "Seeds"]


def verdicts_section(data: ReportData) -> Iterator[Element]:
    """Yield the rule, a count of verdicts, the claims, their lines, and the trends."""
    claims = data.claims
    results = evaluate_claims(claims, data.scores)
    measured = [result for result in results if result.lines]
    yield Heading("Claims")
    yield Paragraph(RULE.format(margin=claims.margin, lines=sum(len(result.lines) for result in measured)))
    for metric in data.metrics.values():
        if metric.note:
            yield Paragraph(f"*{metric.title}*: {metric.note}")

    counts = [[verdict, str(sum(result.verdict == verdict for result in measured))] for verdict in VERDICTS]
    yield TextTable(["Of all claims that were measured", str(len(measured))], counts)

    claim_rows = []
    line_rows: list[list[str]] = []
    for number, result in enumerate(measured, 1):
        title = f"{number}. {result.claim.title}"
        claim_rows.append([title, result.claim.source, result.verdict, _explanation(result, claims.metrics)])
        line_rows += _line_rows(number, result, claims.metrics)
    yield TextTable(["Claim", "Where it is from", "Verdict", "By metric and teacher, where they differ"], claim_rows)
    yield Heading("Line by line", 3)
    yield TextTable(["Claim", "Compared", "Metric", "Teacher", *DIFFERENCE_HEADS, "Verdict"], line_rows)
    if not_measured := [result.claim.title for result in results if not result.lines]:
        yield Paragraph(f"Not measured in this run: {'; '.join(not_measured)}.")
    yield from _trends(data)


def _explanation(result: ClaimResult, metrics: Mapping[str, Metric]) -> str:
    """Return the verdicts by metric and teacher if they differ, and the lines that were not measured."""
    parts = []
    if len({line.verdict for line in result.lines}) > 1:
        teachers: dict[str, dict[str, list[str]]] = {}  # by metric and verdict
        for line in result.lines:
            teachers.setdefault(line.metric, {}).setdefault(line.verdict, []).append(line.teacher or "")
        for metric, by_verdict in teachers.items():
            texts = []
            for verdict, names in by_verdict.items():
                texts.append(f"{verdict} with {', '.join(names)}" if any(names) else f"{verdict}{', '.join(names)}")
            parts.append(f"{metrics[metric].title}: {'; '.join(texts)}.")
    if result.missing:
        parts.append(f"Not measured: {', '.join(result.missing)}.")
    return " ".join(parts)


def _line_rows(number: int, result: ClaimResult, metrics: Mapping[str, Metric]) -> list[list[str]]:
    """Return a row of the table of lines for each line of a claim."""
    rows = []
    sides = f"{result.claim.first} over {result.claim.second}"
    for line in result.lines:
        heads = [str(number), sides, metrics[line.metric].title, line.teacher or NOT_AVAILABLE]
        rows.append([*heads, *difference_cells(line.measured), line.verdict])
    return rows


def _trends(data: ReportData) -> Iterator[Element]:
    """Yield a table of each difference under several conditions; no verdict is drawn from them."""
    for trend in data.claims.trends:
        metric = data.metrics[trend.metric]
        rows = []
        for name, sides in trend.at.items():
            measured = measure_difference(data.scores, sides, trend.teacher, metric)
            if measured is not None:
                rows.append([name, *difference_cells(measured)])
        if rows:
            yield Heading(f"{trend.title}: {metric.title}, teacher {trend.teacher}", 3)
            yield TextTable(["", *DIFFERENCE_HEADS], rows)

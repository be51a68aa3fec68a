"""The papers' claims with their verdicts, line by line, and where differences go as circumstances change."""

from collections.abc import Iterator, Mapping

from reproduce.claims import RULE, VERDICTS, Judged, judge, measure
from reproduce.report.cells import ABSENT, compared
from reproduce.report.document import Block, Heading, Rows, Text
from reproduce.report.findings import Findings
from reproduce.scores import Metric

COMPARED = ["First", "Second", "Points", "95 % interval", "Seeds"]


def blocks(findings: Findings) -> Iterator[Block]:
    claims = findings.claims
    judged = judge(claims, findings.scores)
    asked = [one for one in judged if one.lines]
    yield Heading("Claims")
    yield Text(RULE.format(margin=claims.margin, lines=sum(len(one.lines) for one in asked)))
    for metric in findings.metrics.values():
        if metric.note:
            yield Text(f"*{metric.title}*: {metric.note}")
    yield Rows(
        ["Of all claims that were measured", str(len(asked))],
        [[verdict, str(sum(one.verdict == verdict for one in asked))] for verdict in VERDICTS],
    )
    yield Rows(
        ["Claim", "Where it is from", "Verdict", "By metric and teacher, where they differ"],
        [
            [f"{number}. {one.claim.title}", one.claim.source, one.verdict, _parts(one, claims.metrics)]
            for number, one in enumerate(asked, 1)
        ],
    )
    yield Heading("Line by line", 3)
    yield Rows(
        ["Claim", "Compared", "Metric", "Teacher", *COMPARED, "Verdict"],
        [row for number, one in enumerate(asked, 1) for row in _lines(number, one, claims.metrics)],
    )
    if unasked := [one.claim.title for one in judged if not one.lines]:
        yield Text(f"Not measured in this run: {'; '.join(unasked)}.")
    yield from _trends(findings)


def _parts(judged: Judged, metrics: Mapping[str, Metric]) -> str:
    """Where the lines of a claim differ, which of them say what."""
    groups: dict[str, dict[str, list[str]]] = {}
    for line in judged.lines:
        groups.setdefault(line.metric, {}).setdefault(line.verdict, []).append(line.teacher or "")
    parts = []
    if len({line.verdict for line in judged.lines}) > 1:
        for metric, verdicts in groups.items():
            said = [f"{v}{' with ' if any(t) else ''}{', '.join(t)}" for v, t in verdicts.items()]
            parts.append(f"{metrics[metric].title}: {'; '.join(said)}.")
    if judged.missing:
        parts.append(f"Not measured: {', '.join(judged.missing)}.")
    return " ".join(parts)


def _lines(number: int, judged: Judged, metrics: Mapping[str, Metric]) -> Iterator[list[str]]:
    for line in judged.lines:
        yield [
            str(number),
            f"{judged.claim.first} over {judged.claim.second}",
            metrics[line.metric].title,
            line.teacher or ABSENT,
            *compared(line.means, line.difference, line.seeds),
            line.verdict,
        ]


def _trends(findings: Findings) -> Iterator[Block]:
    """Where a difference goes as circumstances change; no verdict is drawn from it."""
    for trend in findings.claims.trends:
        metric, rows = findings.metrics[trend.metric], []
        for name, sides in trend.at.items():
            if (measured := measure(findings.scores, sides, trend.teacher, metric)) is not None:
                rows.append([name, *compared(*measured)])
        if rows:
            yield Heading(f"{trend.title}: {metric.title}, teacher {trend.teacher}", 3)
            yield Rows(["", *COMPARED], rows)

"""All results: the grid, the third tower at test time, the ablations."""

from collections.abc import Iterator, Sequence

import numpy as np

from reproduce.report.cells import ABSENT, percent
from reproduce.report.document import Block, Heading, Rows, Text
from reproduce.report.findings import BASELINE, Findings
from reproduce.scores import MIXED, THIRD


def blocks(findings: Findings) -> Iterator[Block]:
    plan, scores = findings.plan, findings.scores
    yield Heading("All results")
    yield Text(f"In percent, with 95 % intervals over seeds and items. Of {'; '.join(_sizes(findings))}.")
    grid = [key for key in scores.groups if key[2] is None]
    yield _table(findings, [(method, teacher) for method, teacher, _ in grid])
    mixing = plan.mixing.method
    groups = [t for m, t, v in scores.groups if m == mixing and v is None]
    if mixed := [t for t in groups if t is not None and t in scores.shares]:
        yield Heading("With the third tower at test time", 3)
        shares = ", ".join(f"{teacher} {scores.shares[teacher]}" for teacher in mixed)
        yield Text(f"Share of the third tower's logits, chosen on the validation concepts: {shares}.")
        yield _table(findings, [(f"{mixing}{mix}", t) for t in mixed for mix in ("", f"+{MIXED}", f"+{THIRD}")])
    if ablated := [(f"{m}/{v}", t) for m, t, v in scores.groups if v is not None]:
        yield Heading("Ablations", 3)
        yield Text(
            f"Of {len(plan.ablations.seeds)} seeds each, beside `{mixing}` and `{BASELINE}` as above. "
            "The teacher has the main tower's size in each."
        )
        base = [(m, t) for m, t, _ in grid if t in (None, plan.ablations.teacher) and m in (mixing, BASELINE)]
        yield _table(findings, [*base, *ablated])


def _sizes(findings: Findings) -> Iterator[str]:
    """What each metric is a mean over."""
    results = [result for group in findings.scores.groups.values() for result in group]
    for metric in findings.metrics.values():
        strata = next((found for result in results if (found := result.strata(metric)) is not None), None)
        if strata is not None:
            items = sum(len(stratum.value_N) for stratum in strata)
            concepts = len(np.unique(np.concatenate([stratum.group_N for stratum in strata])))
            yield f"{metric.title}: {items:,} items of {concepts:,} concepts"


def _table(findings: Findings, groups: Sequence[tuple[str, str | None]]) -> Rows:
    metrics = findings.metrics.values()
    scores = [[percent(findings.scores.interval(*group, metric)) for metric in metrics] for group in groups]
    rows = [[name, teacher or ABSENT, *cells] for (name, teacher), cells in zip(groups, scores, strict=True)]
    return Rows(["Run", "Teacher", *(metric.title for metric in metrics)], rows)

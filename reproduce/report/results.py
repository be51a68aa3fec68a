"""Section: all results, of the grid, with the third tower at test time, and of the ablations."""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from reproduce.report.cells import NOT_AVAILABLE, percent_text
from reproduce.report.document import Element, Heading, Paragraph, TextTable
from reproduce.report.report_data import BASELINE, ReportData
from reproduce.scores import MIXED, THIRD


def results_section(data: ReportData) -> Iterator[Element]:
    """Yield the scores of the grid, of mixtures with the third tower, and of the ablations."""
    plan, scores = data.plan, data.scores
    yield Heading("All results")
    yield Paragraph(f"In percent, with 95 % intervals over seeds and items. Of {'; '.join(_sizes(data))}.")
    grid = [(recipe.method, recipe.teacher) for recipe in scores.results if recipe.variant is None]
    yield _table(data, grid)

    mixing = plan.mixing.method
    mixed = [teacher for method, teacher in grid if method == mixing and teacher in scores.shares]
    if mixed:
        yield Heading("With the third tower at test time", 3)
        shares = ", ".join(f"{teacher} {scores.shares[teacher]}" for teacher in mixed if teacher is not None)
        yield Paragraph(f"Share of the third tower's logits, chosen on the validation concepts: {shares}.")
        rows = []
        for teacher in mixed:
            rows += [(mixing, teacher), (f"{mixing}+{MIXED}", teacher), (f"{mixing}+{THIRD}", teacher)]
        yield _table(data, rows)

    ablated = [(f"{r.method}/{r.variant}", r.teacher) for r in scores.results if r.variant is not None]
    if ablated:
        yield Heading("Ablations", 3)
        yield Paragraph(
            f"Of {len(plan.ablations.seeds)} seeds each, beside `{mixing}` and `{BASELINE}` as above. "
            "The teacher has the main tower's size in each."
        )
        base = []
        for method, teacher in grid:
            if method in (mixing, BASELINE) and teacher in (None, plan.ablations.teacher):
                base.append((method, teacher))
        yield _table(data, [*base, *ablated])


def _sizes(data: ReportData) -> Iterator[str]:
    """Yield the numbers of items and concepts that each metric is a mean over."""
    for metric in data.metrics.values():
        for result in chain.from_iterable(data.scores.results.values()):
            strata = result.strata(metric)
            if strata is not None:
                items = sum(len(stratum.value_N) for stratum in strata)
                concepts = len(np.unique(np.concatenate([stratum.group_N for stratum in strata])))
                yield f"{metric.title}: {items:,} items of {concepts:,} concepts"
                break


def _table(data: ReportData, runs: Sequence[tuple[str, str | None]]) -> TextTable:
    """Return the scores of runs, by name and teacher, in every metric."""
    metrics = list(data.metrics.values())
    rows = []
    for name, teacher in runs:
        cells = [percent_text(data.scores.interval(name, teacher, metric)) for metric in metrics]
        rows.append([name, teacher or NOT_AVAILABLE, *cells])
    return TextTable(["Run", "Teacher", *(metric.title for metric in metrics)], rows)

"""Section: all results, of the grid, with the third tower at test time, and of the ablations."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from reproduce.report.cells import NOT_AVAILABLE, percent_text
from reproduce.report.document import Element, Heading, Paragraph, TextTable
from reproduce.report.report_data import BASELINE, ReportData
from reproduce.run_teachers import learned_temperatures
from reproduce.scores import MIXED, THIRD, Recipe


def results_section(data: ReportData) -> Iterator[Element]:
    """Yield the scores of the grid, of mixtures with the third tower, of runs that teach, and of the ablations."""
    plan, scores = data.plan, data.scores
    yield Heading("All results")
    yield Paragraph(f"In percent, with 95 % intervals over seeds and items. Of {'; '.join(_sizes(data))}.")
    teaching = {Recipe(run.method, run.teacher, run.variant): name for name, run in plan.teacher_runs.items()}
    recipes = [recipe for recipe in scores.results if recipe not in teaching]
    grid = [(recipe.method, recipe.teacher) for recipe in recipes if recipe.variant is None]
    yield _table(data, grid)
    yield from _teacher_runs(data, {name: recipe for recipe, name in teaching.items() if recipe in scores.results})

    mixing = plan.mixing.method if plan.mixing is not None else None
    mixed = [teacher for method, teacher in grid if method == mixing and teacher in scores.shares]
    if mixed:
        yield Heading("With the third tower at test time", 3)
        shares = ", ".join(f"{teacher} {scores.shares[teacher]}" for teacher in mixed if teacher is not None)
        yield Paragraph(f"Share of the third tower's logits, chosen on the validation concepts: {shares}.")
        rows = []
        for teacher in mixed:
            rows += [(f"{mixing}{mix}", teacher) for mix in ("", f"+{MIXED}", f"+{THIRD}")]
        yield _table(data, rows)

    ablated = [(f"{r.method}/{r.variant}", r.teacher) for r in recipes if r.variant is not None]
    if ablated:
        yield Heading("Ablations", 3)
        beside = [name for name in (mixing, BASELINE) if name is not None]
        names = " and ".join(f"`{name}`" for name in beside)
        text = f"Of {len(plan.ablations.seeds)} seeds each, beside {names} as above. {plan.ablations.note}"
        yield Paragraph(text.rstrip())
        base = []
        for method, teacher in grid:
            if method in beside and teacher in (None, plan.ablations.teacher):
                base.append((method, teacher))
        yield _table(data, [*base, *ablated])


def _teacher_runs(data: ReportData, recipes: Mapping[str, Recipe]) -> Iterator[Element]:
    """Yield the scores of runs that teach, by name, with the temperatures that they learned."""
    if not recipes:
        return
    temperatures = learned_temperatures(data.plan, data.folder)
    rows = []
    for name, recipe in recipes.items():
        run = f"{recipe.method}/{recipe.variant}" if recipe.variant is not None else recipe.method
        cells = [percent_text(data.scores.interval(run, recipe.teacher, metric)) for metric in data.metrics.values()]
        temperature = f"{temperatures[name]:.4g}" if name in temperatures else NOT_AVAILABLE
        rows.append([name, run, recipe.teacher or NOT_AVAILABLE, temperature, *cells])
    yield Heading("The runs that teach", 3)
    yield Paragraph("Each is one run; its students read the embeddings of it that are in its caches.")
    titles = [metric.title for metric in data.metrics.values()]
    yield TextTable(["Teacher", "Run", "Its own teacher", "Temperature", *titles], rows)


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

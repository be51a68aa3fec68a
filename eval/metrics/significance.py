"""Intervals of every result, and tests of which differences between models are real, on the same items."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile

import numpy as np

from threetowers.eval.metrics.bootstrap import BootstrapDraws, Stratum, holm, resample, same_items
from threetowers.eval.record import EvalRecord
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.tables import DIRECTIONS, NO_VALUE, RETRIEVAL, Table, TableCell, TableRow

LEVEL = 0.05
MAX_MODELS_ALL_PAIRS = 5  # with more models, each is compared with the best alone
HEADLINE = tuple(f"{direction}/recall@1" for direction in DIRECTIONS)


@dataclass(frozen=True)
class ComparedModel:
    """One run, or the runs of one recipe that differ in their seed alone; `members` index the list of results."""

    name: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Significance:
    """Tables of intervals (a row a metric, a column a model) and of differences (a row a metric and pair)."""

    models: list[ComparedModel]
    intervals: Table | None
    differences: Table | None


@dataclass(frozen=True)
class _MetricKey:
    """A metric of a task; its mean is over the means of some galleries."""

    task: str
    galleries: tuple[str, ...]
    metric: str

    def heads(self) -> tuple[str, str, str]:
        """Return task, data and metric as a row of a table begins with them."""
        data = self.galleries[0] if len(self.galleries) == 1 else f"mean of {len(self.galleries)} galleries"
        return self.task, data, self.metric


@dataclass(frozen=True)
class _Comparison:
    """One metric of the models that were scored on the same items; `models` index the list of compared models."""

    key: _MetricKey
    models: list[int]
    bootstrap: BootstrapDraws


def significance(results: Sequence[RunResult]) -> Significance:
    """Compare the metrics that are means over items, for the models that saw the same items."""
    models = group_by_recipe(results)
    comparisons = []
    for key in _comparable_metrics(results):
        comparison = _compare_models(results, models, key)
        if comparison is not None:
            comparisons.append(comparison)
    return Significance(models, _interval_table(models, comparisons), _difference_table(models, comparisons))


def group_by_recipe(results: Sequence[RunResult]) -> list[ComparedModel]:
    """Return runs of one recipe with different seeds as one model, named by the common start of their names.

    The share of an ensemble, which ends a name from its `+` on, stays.
    """
    by_recipe: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        recipes = {(record.recipe, record.seed) for record in result.records}
        recipe, seed = recipes.pop() if len(recipes) == 1 else (None, None)
        key = f"run {index}" if recipe is None or seed is None else f"recipe {recipe}"
        by_recipe.setdefault(key, []).append(index)
    models = []
    for members in by_recipe.values():
        names = [results[index].name for index in members]
        if len(names) == 1:
            name = names[0]
        else:
            runs, _, ensembles = zip(*(name.partition("+") for name in names), strict=True)
            equal = takewhile(lambda letters: len(set(letters)) == 1, zip(*runs, strict=False))
            start = re.sub(r"([-_. ]+s|[-_. ]*seed)?[-_.= ]*$", "", "".join(letters[0] for letters in equal))
            ensemble = f"+{ensembles[0]}" if ensembles[0] and len(set(ensembles)) == 1 else ""
            name = f"{start + ensemble if start else ' / '.join(names)} ({len(names)} seeds)"
        models.append(ComparedModel(name, tuple(members)))
    return models


def _comparable_metrics(results: Sequence[RunResult]) -> list[_MetricKey]:
    """Return R@1 as the mean of the shared galleries, and every other metric over items for each gallery."""
    galleries: dict[str, None] = {}
    scored = []
    for result in results:
        own = [record.spec.data for record in result.records if record.spec.task == RETRIEVAL]
        galleries |= dict.fromkeys(own)
        if own:
            scored.append(own)
    shared = tuple(name for name in galleries if all(name in own for own in scored))
    keys: dict[_MetricKey, None] = {}
    if shared:
        keys |= dict.fromkeys(_MetricKey(RETRIEVAL, shared, metric) for metric in HEADLINE)
    for result in results:
        for record in result.records:
            if record.spec.task == RETRIEVAL:
                continue
            for metric in record.items:
                if metric in record.metrics:
                    keys[_MetricKey(record.spec.task, (record.spec.data,), metric)] = None
    return list(keys)


def _compare_models(
    results: Sequence[RunResult], models: Sequence[ComparedModel], key: _MetricKey
) -> _Comparison | None:
    """Bootstrap one metric for the models that have it on the items of the first one; None where none has it."""
    scores: dict[int, list[list[Stratum]]] = {}
    reference: list[Stratum] | None = None
    for number, model in enumerate(models):
        seeds = []
        for index in model.members:
            strata = _strata(results[index], key)
            if strata is not None:
                seeds.append(strata)
        if len(seeds) < len(model.members):
            continue
        if reference is None:
            reference = seeds[0]
        if all(same_items(reference, strata) for strata in seeds):
            scores[number] = seeds
    return _Comparison(key, list(scores), resample(list(scores.values()))) if scores else None


def _strata(result: RunResult, key: _MetricKey) -> list[Stratum] | None:
    """Return the scores of a metric in each of its galleries; None where one of them lacks it."""
    strata = []
    for gallery in key.galleries:
        record = _find_record(result, key.task, gallery)
        items = {} if record is None else result.items_of(record)
        if key.metric not in items:
            return None
        value_N = np.asarray(items[key.metric], dtype=np.float64)
        prefix = key.metric.rpartition("/")[0]
        group_N = items.get(f"{prefix}/group", items.get("group"))
        strata.append(Stratum(value_N, np.arange(len(value_N)) if group_N is None else group_N))
    return strata


def _find_record(result: RunResult, task: str, gallery: str) -> EvalRecord | None:
    for record in result.records:
        if (record.spec.task, record.spec.data) == (task, gallery):
            return record
    return None


def _interval_table(models: Sequence[ComparedModel], comparisons: Sequence[_Comparison]) -> Table | None:
    if not comparisons:
        return None
    rows = []
    for comparison in comparisons:
        cells = [TableCell(NO_VALUE)] * len(models)
        for position, number in enumerate(comparison.models):
            interval = comparison.bootstrap.interval(position)
            cells[number] = TableCell(
                f"{100 * interval.mean:.1f}  [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
            )
        rows.append(TableRow((*comparison.key.heads(), f"{comparison.bootstrap.groups:,}"), tuple(cells)))
    return Table(("Task", "Data", "Metric", "Groups"), tuple(model.name for model in models), tuple(rows))


def _difference_table(models: Sequence[ComparedModel], comparisons: Sequence[_Comparison]) -> Table | None:
    """Return every difference with its verdict, the p-values adjusted for all rows of the table."""
    heads = []
    differences = []
    for comparison in comparisons:
        for first, second in _pairs(comparison):
            names = (models[comparison.models[first]].name, models[comparison.models[second]].name)
            heads.append((*comparison.key.heads(), f"{names[0]} over {names[1]}"))
            differences.append(comparison.bootstrap.difference(first, second))
    if not differences:
        return None
    rows = []
    adjusted = holm([difference.p for difference in differences])
    for head, difference, p in zip(heads, differences, adjusted, strict=True):
        real = p < LEVEL
        cells = (
            TableCell(f"{100 * difference.mean:+.1f}"),
            TableCell(f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"),
            TableCell("< 0.001" if p < 0.001 else f"{p:.3f}"),
            TableCell("real" if real else "may be chance", best=real),
        )
        rows.append(TableRow(head, cells))
    columns = ("Points", "95 % interval", "p, adjusted", "Verdict")
    return Table(("Task", "Data", "Metric", "Compared"), columns, tuple(rows))


def _pairs(comparison: _Comparison) -> list[tuple[int, int]]:
    """Return pairs of models, the better one first: all pairs of a few models, the best with each other of many."""
    order = np.argsort(-comparison.bootstrap.mean_M, kind="stable").tolist()
    pairs = list(combinations(order, 2))
    return pairs if len(order) <= MAX_MODELS_ALL_PAIRS else pairs[: len(order) - 1]

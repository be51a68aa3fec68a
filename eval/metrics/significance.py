"""Which differences are real: intervals of every result, and every two models compared on the same items."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile

import numpy as np

from threetowers.eval.metrics.bootstrap import Resampled, Stratum, holm, resample
from threetowers.eval.record import EvalRecord
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.tables import ABSENT, DIRECTIONS, RETRIEVAL, Cell, Row, Table

LEVEL = 0.05
ALL_PAIRS = 5  # models; with more, each is compared with the best alone
HEADLINE = tuple(f"{direction}/recall@1" for direction in DIRECTIONS)


@dataclass(frozen=True)
class Group:
    """A model, or the runs of one recipe that differ in their seed alone. `members`: places in the list of results."""

    name: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Significance:
    """`intervals`: a row a metric, a column a group. `differences`: a row a metric and pair, with the verdict."""

    groups: list[Group]
    intervals: Table | None
    differences: Table | None


@dataclass(frozen=True)
class _Compared:
    """One metric over some galleries, scored for some groups on the same items."""

    heads: tuple[str, str, str]  # task, data, metric
    groups: list[int]
    resampled: Resampled


def significance(results: Sequence[RunResult]) -> Significance:
    """Compare what can be compared: metrics that are means over items, where models saw the same items."""
    groups = grouped(results)
    compared = [c for wanted in _wanted(results) if (c := _compare(results, groups, *wanted)) is not None]
    return Significance(groups, _intervals(groups, compared), _differences(groups, compared))


def grouped(results: Sequence[RunResult]) -> list[Group]:
    """Runs of one recipe with different seeds are one group, named by what their names share."""
    by_recipe: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        facts = {(r.recipe, r.seed) for r in result.records}
        recipe, seed = facts.pop() if len(facts) == 1 else (None, None)
        alone = recipe is None or seed is None
        by_recipe.setdefault(f"one {index}" if alone else f"recipe {recipe}", []).append(index)
    groups = []
    for members in by_recipe.values():
        names = [results[index].name for index in members]
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        shared = re.sub(r"[-_. ]*(seed)?[-_.= ]*$", "", "".join(letters[0] for letters in same)) or " / ".join(names)
        groups.append(Group(names[0] if len(names) == 1 else f"{shared} ({len(names)} seeds)", tuple(members)))
    return groups


def _wanted(results: Sequence[RunResult]) -> list[tuple[str, tuple[str, ...], str]]:
    """(task, galleries, metric): R@1 as the mean of all galleries, every other mean over items for each gallery."""
    wanted: dict[tuple[str, tuple[str, ...], str], None] = {}
    galleries = tuple(
        dict.fromkeys(r.spec.data for result in results for r in result.records if r.spec.task == RETRIEVAL)
    )
    scored = [{r.spec.data for r in result.records if r.spec.task == RETRIEVAL} for result in results]
    shared = tuple(name for name in galleries if all(name in found for found in scored if found))
    for metric in HEADLINE if shared else ():
        wanted[RETRIEVAL, shared, metric] = None
    for result in results:
        for record in result.records:
            if record.spec.task != RETRIEVAL:
                for metric in record.items:
                    if metric in record.metrics:
                        wanted[record.spec.task, (record.spec.data,), metric] = None
    return list(wanted)


def _compare(
    results: Sequence[RunResult], groups: Sequence[Group], task: str, galleries: tuple[str, ...], metric: str
) -> _Compared | None:
    scores: dict[int, list[list[Stratum]]] = {}
    reference: list[Stratum] | None = None
    for number, group in enumerate(groups):
        seeds = [_strata(results[index], task, galleries, metric) for index in group.members]
        known = [strata for strata in seeds if strata is not None]
        if len(known) < len(seeds):
            continue
        reference = reference or known[0]
        if all(_same(reference, strata) for strata in known):
            scores[number] = known
    if not scores:
        return None
    data = galleries[0] if len(galleries) == 1 else f"mean of {len(galleries)} galleries"
    resampled = resample(list(scores.values()))
    return _Compared((task, data, metric), list(scores), resampled)


def _strata(result: RunResult, task: str, galleries: Sequence[str], metric: str) -> list[Stratum] | None:
    strata = []
    for gallery in galleries:
        record = _record(result, task, gallery)
        items = {} if record is None else result.items_of(record)
        if metric not in items:
            return None
        value_N = np.asarray(items[metric], dtype=np.float64)
        units = items.get(f"{metric.rpartition('/')[0]}/group", items.get("group"))
        strata.append(Stratum(value_N, np.arange(len(value_N)) if units is None else units))
    return strata


def _record(result: RunResult, task: str, gallery: str) -> EvalRecord | None:
    return next((r for r in result.records if (r.spec.task, r.spec.data) == (task, gallery)), None)


def _same(one: Sequence[Stratum], other: Sequence[Stratum]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.unit_N, b.unit_N) and np.array_equal(np.isnan(a.value_N), np.isnan(b.value_N))
        for a, b in zip(one, other, strict=True)
    )


def _intervals(groups: Sequence[Group], compared: Sequence[_Compared]) -> Table | None:
    rows = []
    for found in compared:
        cells = {}
        for storage, number in enumerate(found.groups):
            i = found.resampled.interval(storage)
            cells[number] = Cell(f"{100 * i.mean:.1f}  [{100 * i.low:.1f}, {100 * i.high:.1f}]")
        row = tuple(cells.get(number, Cell(ABSENT)) for number in range(len(groups)))
        rows.append(Row((*found.heads, f"{found.resampled.units:,}"), row))
    return Table(("Task", "Data", "Metric", "Units"), tuple(g.name for g in groups), tuple(rows)) if rows else None


def _differences(groups: Sequence[Group], compared: Sequence[_Compared]) -> Table | None:
    asked = [(found, first, second) for found in compared for first, second in _pairs(found)]
    differences = [found.resampled.difference(first, second) for found, first, second in asked]
    rows = []
    for (found, first, second), d, p in zip(asked, differences, holm([d.p for d in differences]), strict=True):
        real = p < LEVEL
        names = (groups[found.groups[first]].name, groups[found.groups[second]].name)
        texts = (
            f"{100 * d.mean:+.1f}",
            f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
            "< 0.001" if p < 0.001 else f"{p:.3f}",
            "real" if real else "may be chance",
        )
        cells = tuple(Cell(text, best=real and number == len(texts) - 1) for number, text in enumerate(texts))
        rows.append(Row((*found.heads, f"{names[0]} over {names[1]}"), cells))
    heads = ("Task", "Data", "Metric", "Compared")
    return Table(heads, ("Points", "95 % interval", "p, adjusted", "Verdict"), tuple(rows)) if rows else None


def _pairs(found: _Compared) -> list[tuple[int, int]]:
    """The better one first; all pairs of a few models, of many the best with each other."""
    order = np.argsort(-found.resampled.mean_M, kind="stable").tolist()
    pairs = list(combinations(order, 2))
    return pairs if len(order) <= ALL_PAIRS else pairs[: len(order) - 1]

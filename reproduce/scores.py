"""Scores of finished experiments, by recipe, and the choices that are made by validation scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as pydantic_dataclass

from reproduce.experiment import VALIDATION, validation_score
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import STRICT, Experiment, Plan
from threetowers.eval.metrics.bootstrap import ConfidenceInterval, Stratum, resample
from threetowers.eval.record import EvalRecord, read_items, read_record

MIXED, THIRD = "mixed", "third"


@pydantic_dataclass(frozen=True, config=STRICT)
class Metric:
    """A mean over items of a task of an evaluation set; over several kinds of items, the mean of their means.

    `note` is printed beside the claims.
    """

    title: str
    set: str
    task: str
    items: list[str]
    note: str = ""


@dataclass(frozen=True)
class ExperimentResult:
    """One finished experiment: the content of its file, and its records with their items, by share and set."""

    facts: Mapping[str, Any]
    records: Mapping[tuple[str, str], tuple[EvalRecord, Mapping[str, NDArray[Any]]]]

    def strata(self, metric: Metric, share: str = "0") -> list[Stratum] | None:
        """Return the items of a metric with a share of the third tower; None if it was not evaluated."""
        for (record_share, _), (record, items) in self.records.items():
            if record_share == share and (record.spec.data, record.spec.task) == (metric.set, metric.task):
                return [_stratum(items, name) for name in metric.items]
        return None


class Recipe(NamedTuple):
    """The settings that experiments of different seeds have in common."""

    method: str
    teacher: str | None
    variant: str | None


@dataclass(frozen=True)
class Scores:
    """Results of each recipe, a list over seeds, and the chosen share of the third tower by teacher."""

    results: Mapping[Recipe, list[ExperimentResult]]
    shares: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str, teacher: str | None, metric: Metric) -> dict[int, list[Stratum]]:
        """Return the items, by seed, of METHOD, METHOD/VARIANT, METHOD+mixed or METHOD+third; empty for no results.

        A method without a choice of teachers has none, and a variant may have its own: both match any `teacher`.
        """
        base, _, mix = name.partition("+")
        method, _, variant = base.partition("/")
        share = {"": "0", MIXED: self.shares.get(teacher or "", ""), THIRD: "1"}[mix]
        by_seed = {}
        for recipe, results in self.results.items():
            if (recipe.method, recipe.variant or "") != (method, variant):
                continue
            if recipe.variant is None and recipe.teacher not in (teacher, None):
                continue
            for result in results:
                strata = result.strata(metric, share)
                if strata is not None:
                    by_seed[int(result.facts["seed"])] = strata
        return by_seed

    def interval(self, name: str, teacher: str | None, metric: Metric) -> ConfidenceInterval | None:
        """Return the mean over seeds and items with its 95 % interval; None for no results."""
        by_seed = self.find(name, teacher, metric)
        return resample([list(by_seed.values())]).interval(0) if by_seed else None


def read_scores(plan: Plan, folder: Folder) -> Scores:
    """Read the results of the experiments that are finished, and choose the shares of the third tower."""
    results: dict[Recipe, list[ExperimentResult]] = {}
    for experiment in plan.experiments():
        if folder.finished(experiment.name).exists():
            recipe = Recipe(experiment.method, experiment.teacher, experiment.variant)
            results.setdefault(recipe, []).append(_read_result(folder, experiment))
    shares: dict[str, str] = {}
    if plan.mixing is None:
        return Scores(results, shares)
    for teacher in plan.teachers:
        share = _best_share(results.get(Recipe(plan.mixing.method, teacher, None), []))
        if share is not None:
            shares[teacher] = share
    return Scores(results, shares)


def choose_rates(plan: Plan, folder: Folder) -> dict[str, float]:
    """Choose the learning rate of each method by its finished trials and write them; none for one without trials."""
    tried: dict[str, dict[str, float]] = {}
    for experiment in plan.trials():
        if not folder.finished(experiment.name).exists():
            continue  # its teacher is not finished either
        file = read_json(folder.finished(experiment.name))["records"]["0"][VALIDATION]
        score = validation_score(read_record(folder["records"] / file))
        tried.setdefault(experiment.method, {})[f"{experiment.rate:g}"] = score
    chosen = {method: float(max(scores, key=scores.__getitem__)) for method, scores in tried.items()}
    write_json(folder["rates.json"], {"chosen": chosen, "tried": tried})
    return chosen


def _read_result(folder: Folder, experiment: Experiment) -> ExperimentResult:
    facts = read_json(folder.finished(experiment.name))
    records = {}
    for share, sets in facts["records"].items():
        for name, file in sets.items():
            record = read_record(folder["records"] / file)
            records[share, name] = (record, read_items(record, folder["records"]))
    return ExperimentResult(facts, records)


def _best_share(results: Sequence[ExperimentResult]) -> str | None:
    """Return the share, between 0 and 1, with the best validation score in the mean over seeds."""
    by_share: dict[str, list[float]] = {}
    for result in results:
        for (share, name), (record, _) in result.records.items():
            if name == VALIDATION and 0 < float(share) < 1:
                by_share.setdefault(share, []).append(validation_score(record))
    return max(by_share, key=lambda share: float(np.mean(by_share[share])), default=None)


def _stratum(items: Mapping[str, NDArray[Any]], name: str) -> Stratum:
    value_N = np.asarray(items[name], np.float64)
    prefix = name.rpartition("/")[0]
    group_N = items.get(f"{prefix}/group", np.arange(len(value_N)))
    return Stratum(value_N, np.asarray(group_N, np.int64))

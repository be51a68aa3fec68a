"""What the records of finished experiments say, gathered by what differs in nothing but the seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as checked

from reproduce.experiment import VALIDATION, validation_score
from reproduce.folder import Folder, read_json
from reproduce.plan import STRICT, Experiment, Plan
from threetowers.eval.metrics.bootstrap import ConfidenceInterval, Stratum, resample
from threetowers.eval.record import EvalRecord, read_items, read_record

MIXED, THIRD = "mixed", "third"


@checked(frozen=True, config=STRICT)
class Metric:
    """A mean over items of a task of a set; over several kinds of items, the mean of their means.

    `note`: what a reader of its verdicts should know.
    """

    title: str
    set: str
    task: str
    items: list[str]
    note: str = ""


@dataclass(frozen=True)
class Result:
    """One finished experiment: what was written down of it, and its records with their items, by share and set."""

    facts: Mapping[str, Any]
    records: Mapping[tuple[str, str], tuple[EvalRecord, Mapping[str, NDArray[Any]]]]

    def strata(self, metric: Metric, share: str = "0") -> list[Stratum] | None:
        """The items of a metric; None where it was not asked for."""
        for (one, _), (record, items) in self.records.items():
            if one == share and (record.spec.data, record.spec.task) == (metric.set, metric.task):
                return [_stratum(items, name) for name in metric.items]
        return None


@dataclass(frozen=True)
class Scores:
    """Results by (method, teacher, variant), a list over seeds. `shares`: the third tower's, chosen by validation."""

    groups: Mapping[tuple[str, str | None, str | None], list[Result]]
    shares: Mapping[str, str] = field(default_factory=dict)  # by teacher

    def find(self, name: str, teacher: str | None, metric: Metric) -> dict[int, list[Stratum]]:
        """The items, by seed, of METHOD, METHOD/VARIANT, METHOD+mixed or METHOD+third; empty where there are none.

        A method without a third tower has no teacher, and a variant may have its own, whichever is asked for.
        """
        base, _, mix = name.partition("+")
        method, _, variant = base.partition("/")
        results = [
            result
            for (of, by, varied), group in self.groups.items()
            if (of, varied or "") == (method, variant) and (varied or by in (teacher, None))
            for result in group
        ]
        share = {"": "0", MIXED: self.shares.get(teacher or "", ""), THIRD: "1"}[mix]
        found = {int(result.facts["seed"]): result.strata(metric, share) for result in results}
        return {seed: strata for seed, strata in found.items() if strata is not None}

    def interval(self, name: str, teacher: str | None, metric: Metric) -> ConfidenceInterval | None:
        """The mean over seeds and items with its 95 % interval."""
        found = self.find(name, teacher, metric)
        return resample([list(found.values())]).interval(0) if found else None


def gather(plan: Plan, folder: Folder) -> Scores:
    """Read what the plan's experiments left; those that are not finished are not there."""
    groups: dict[tuple[str, str | None, str | None], list[Result]] = {}
    for one in plan.experiments():
        if folder.finished(one.name).exists():
            groups.setdefault((one.method, one.teacher, one.variant), []).append(_result(folder, one))
    mixing = plan.mixing.method
    chosen = {teacher: _best_share(groups.get((mixing, teacher, None), [])) for teacher in plan.teachers}
    return Scores(groups, {teacher: share for teacher, share in chosen.items() if share is not None})


def _result(folder: Folder, one: Experiment) -> Result:
    facts = read_json(folder.finished(one.name))
    records = {}
    for share, sets in facts["records"].items():
        for name, file in sets.items():
            record = read_record(folder["records"] / file)
            records[share, name] = (record, read_items(record, folder["records"]))
    return Result(facts, records)


def _best_share(results: Sequence[Result]) -> str | None:
    """The share between none and all that is best on the validation concepts, in the mean over seeds."""
    by_share: dict[str, list[float]] = {}
    for result in results:
        for (share, name), (record, _) in result.records.items():
            if name == VALIDATION and 0 < float(share) < 1:
                by_share.setdefault(share, []).append(validation_score(record))
    return max(by_share, key=lambda share: float(np.mean(by_share[share])), default=None)


def _stratum(items: Mapping[str, NDArray[Any]], name: str) -> Stratum:
    value_N = np.asarray(items[name], np.float64)
    group_N = items.get(f"{name.rpartition('/')[0]}/group", np.arange(len(value_N)))
    return Stratum(value_N, np.asarray(group_N, np.int64))

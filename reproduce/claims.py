"""The papers' claims as measured differences, each with a verdict by one stated rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.dataclasses import dataclass as checked

from reproduce.plan import STRICT, BadPlan, Positive
from reproduce.scores import Metric, Scores
from threetowers.cache.schema import parse_as
from threetowers.eval.metrics.bootstrap import PairedDifference, resample

Verdict = Literal["holds", "does not hold", "cannot be told here"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "cannot be told here"
VERDICTS = (HOLDS, FAILS, OPEN)
RULE = (
    "Each line is the difference of two means, in points, over the seeds that both sides have, with its 95 % interval "
    "from resampling concepts and seeds, the same for both sides. *Better* holds where the whole interval is above "
    "zero, does not hold where all of it is below, and cannot be told here where zero is inside. *Not worse* holds "
    "where the whole interval is above -{margin:g} percent of what the second scores, does not hold where all of it is "
    "below that, and cannot be told here otherwise. A claim over several lines holds where every line does, and does "
    "not hold where one does not. Intervals are not widened for the number of lines: of {lines}, about one in twenty "
    "misses its true value; those of two seeds no more often, as long as most of what varies is a concept's luck in "
    "one seed (simulated in `tests/eval/test_bootstrap.py`)."
)


@checked(frozen=True, config=STRICT)
class Claim:
    title: str
    source: str
    asks: Literal["better", "not-worse"]
    first: str
    second: str
    metrics: list[str]
    teachers: list[str] = field(default_factory=list)


@checked(frozen=True, config=STRICT)
class Trend:
    """One difference under several circumstances: by their names, the first and the second."""

    title: str
    metric: str
    teacher: str
    at: dict[str, tuple[str, str]]


@checked(frozen=True, config=STRICT)
class ByFit:
    """One difference over several teachers: how it goes with how well they fit the data. `lines`: through which."""

    title: str
    first: str
    second: str
    metrics: list[str]
    lines: dict[str, list[str]]


@checked(frozen=True, config=STRICT)
class Claims:
    """`margin`: percent of the second's score that may be lost where a claim is of not being worse."""

    margin: Positive
    metrics: dict[str, Metric]
    claims: list[Claim]
    trends: list[Trend] = field(default_factory=list)
    by_fit: list[ByFit] = field(default_factory=list)


@dataclass(frozen=True)
class Line:
    """One difference that a claim is judged by. `seeds`: how many both sides have in common."""

    metric: str
    teacher: str | None
    means: tuple[float, float]  # of the first and of the second
    difference: PairedDifference
    seeds: int
    verdict: Verdict


@dataclass(frozen=True)
class Judged:
    """A claim with its lines; `missing` says what of it was not measured."""

    claim: Claim
    lines: list[Line]
    missing: list[str]
    verdict: Verdict


def load_claims(path: Path) -> Claims:
    """Return the checked claims of a YAML file. Raises BadPlan."""
    try:
        return parse_claims(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, yaml.YAMLError) as error:
        raise BadPlan(f"{path}: cannot be read as YAML: {error}") from error


def parse_claims(tree: Mapping[str, Any], source: str = "claims") -> Claims:
    """Return the checked claims of a plain tree. Raises BadPlan."""
    found = parse_as(Claims, tree, BadPlan, f"{source} holds no valid claims")
    asked: list[Claim | ByFit] = [*found.claims, *found.by_fit]
    for claim in asked:
        if unknown := sorted(set(claim.metrics) - found.metrics.keys()):
            raise BadPlan(f"{source}: {claim.title!r}: {unknown} are no metrics; they are {sorted(found.metrics)}")
    return found


def measure(
    scores: Scores, sides: tuple[str, str], teacher: str | None, metric: Metric
) -> tuple[tuple[float, float], PairedDifference, int] | None:
    """The means of two sides over their common seeds, their difference, and how many seeds; None where there are none.

    In pairs, as one seed means the same batches to both, and often the same weights to start from.
    """
    first, second = (scores.find(side, teacher, metric) for side in sides)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    found = resample([[side[seed] for seed in seeds] for side in (first, second)], paired=True)
    means = float(found.mean_M[0]), float(found.mean_M[1])
    return means, found.difference(0, 1), len(seeds)


def judge(claims: Claims, scores: Scores) -> list[Judged]:
    """Measure every claim on what there is."""
    return [_judged(claim, claims, scores) for claim in claims.claims]


def verdict_of(difference: PairedDifference, asks: str, margin: float) -> Verdict:
    """The rule for one line. `margin`: how much may be lost, in the difference's own unit."""
    bound = -margin if asks == "not-worse" else 0.0
    if difference.low > bound:
        return HOLDS
    return FAILS if difference.high < bound else OPEN


def together(verdicts: Sequence[Verdict], complete: bool) -> Verdict:
    """The rule for a claim; one that was not measured in all its lines cannot hold."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if complete and verdicts and set(verdicts) == {HOLDS} else OPEN


def _judged(claim: Claim, claims: Claims, scores: Scores) -> Judged:
    lines: list[Line] = []
    missing: list[str] = []
    teachers: list[str | None] = [*claim.teachers] or [None]
    for name in claim.metrics:
        for teacher in teachers:
            measured = measure(scores, (claim.first, claim.second), teacher, claims.metrics[name])
            if measured is None:
                missing.append(f"{name}{f' with {teacher}' if teacher else ''}")
                continue
            means, difference, seeds = measured
            verdict = verdict_of(difference, claim.asks, claims.margin / 100 * means[1])
            lines.append(Line(name, teacher, means, difference, seeds, verdict))
    return Judged(claim, lines, missing, together([line.verdict for line in lines], not missing))

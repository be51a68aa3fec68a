"""The papers' claims as measured differences, each with a verdict by one stated rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from reproduce.plan import STRICT, BadPlan, Positive
from reproduce.scores import Metric, Scores
from threetowers.cache.schema import parse_as
from threetowers.eval.metrics.bootstrap import PairedDifference, resample

Verdict = Literal["holds", "does not hold", "cannot be told here"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
UNDECIDED: Verdict = "cannot be told here"
VERDICTS = (HOLDS, FAILS, UNDECIDED)
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


@pydantic_dataclass(frozen=True, config=STRICT)
class Claim:
    """A statement that `first` is better, or not worse, than `second` by some metrics and with some teachers."""

    title: str
    source: str
    asks: Literal["better", "not-worse"]
    first: str
    second: str
    metrics: list[str]
    teachers: list[str] = field(default_factory=list)


@pydantic_dataclass(frozen=True, config=STRICT)
class Trend:
    """One difference under several conditions; `at` names the first and the second side of each."""

    title: str
    metric: str
    teacher: str
    at: dict[str, tuple[str, str]]


@pydantic_dataclass(frozen=True, config=STRICT)
class ByFit:
    """One difference against the fit of the teacher; `lines` names the teachers of each regression line."""

    title: str
    first: str
    second: str
    metrics: list[str]
    lines: dict[str, list[str]]


@pydantic_dataclass(frozen=True, config=STRICT)
class Claims:
    """What is asked of the results, and the words of their report.

    Attributes:
        page: Name of the report's files.
        title: Its title.
        setting_title: Title of its first section.
        setting: Paragraphs of that section, in which $samples, $seeds, $ablation_seeds, $epochs, $contrastive and
            $teacher stand for numbers of the plan and names of its styles.
        margin: The loss, in percent of the second score, that is still "not worse".
        metrics: By the names that claims know them by.
        claims: Statements with a verdict.
        trends: Differences under several conditions.
        by_fit: Differences against the fit of the teacher.
        plotted: Methods that are plotted beside the baseline, against the fit and against seconds.
    """

    page: str
    title: str
    setting_title: str
    setting: list[str]
    margin: Positive
    metrics: dict[str, Metric]
    claims: list[Claim]
    trends: list[Trend] = field(default_factory=list)
    by_fit: list[ByFit] = field(default_factory=list)
    plotted: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MeasuredDifference:
    """Means of a first and a second side over their `seeds` common seeds, and their difference."""

    means: tuple[float, float]
    difference: PairedDifference
    seeds: int


@dataclass(frozen=True)
class ClaimLine:
    """One difference of a claim, by one metric and with one teacher, and its verdict."""

    metric: str
    teacher: str | None
    measured: MeasuredDifference
    verdict: Verdict


@dataclass(frozen=True)
class ClaimResult:
    """A claim with its lines and its verdict; `missing` lists the lines that were not measured."""

    claim: Claim
    lines: list[ClaimLine]
    missing: list[str]
    verdict: Verdict


def load_claims(path: Path) -> Claims:
    """Read the claims of a YAML file.

    Raises:
        BadPlan: For a file that cannot be read or is not valid.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise BadPlan(f"{path}: cannot be read as YAML: {error}") from error
    return parse_claims(tree, str(path))


def parse_claims(tree: Mapping[str, Any], source: str = "claims") -> Claims:
    """Return the claims of a plain tree.

    Raises:
        BadPlan: For a tree that is not valid, or a metric that is not defined in it.
    """
    claims = parse_as(Claims, tree, BadPlan, f"{source} holds no valid claims")
    with_metrics: list[Claim | ByFit] = [*claims.claims, *claims.by_fit]
    for claim in with_metrics:
        if unknown := sorted(set(claim.metrics) - claims.metrics.keys()):
            raise BadPlan(
                f"{source}: {claim.title!r}: {unknown} are no metrics, expected some of {sorted(claims.metrics)}"
            )
    return claims


def measure_difference(
    scores: Scores, sides: tuple[str, str], teacher: str | None, metric: Metric
) -> MeasuredDifference | None:
    """Measure the difference of two sides over their common seeds; None where they have none.

    Seeds are drawn in pairs, as a seed gives both sides the same batches, and often the same initial weights.
    """
    first = scores.find(sides[0], teacher, metric)
    second = scores.find(sides[1], teacher, metric)
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    bootstrap = resample([[side[seed] for seed in seeds] for side in (first, second)], paired=True)
    means = (float(bootstrap.mean_M[0]), float(bootstrap.mean_M[1]))
    return MeasuredDifference(means, bootstrap.difference(0, 1), len(seeds))


def evaluate_claims(claims: Claims, scores: Scores) -> list[ClaimResult]:
    """Measure every claim on the scores that there are."""
    return [_evaluate_claim(claim, claims, scores) for claim in claims.claims]


def line_verdict(difference: PairedDifference, asks: str, margin: float) -> Verdict:
    """Return the verdict on one line; `margin` is the loss that is still "not worse", in the unit of the difference."""
    bound = -margin if asks == "not-worse" else 0.0
    if difference.low > bound:
        return HOLDS
    return FAILS if difference.high < bound else UNDECIDED


def claim_verdict(verdicts: Sequence[Verdict], complete: bool) -> Verdict:
    """Return the verdict on a claim from those on its lines; without all lines it cannot hold."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if complete and verdicts and set(verdicts) == {HOLDS} else UNDECIDED


def _evaluate_claim(claim: Claim, claims: Claims, scores: Scores) -> ClaimResult:
    lines: list[ClaimLine] = []
    missing: list[str] = []
    teachers: list[str | None] = [*claim.teachers] or [None]
    for name in claim.metrics:
        for teacher in teachers:
            measured = measure_difference(scores, (claim.first, claim.second), teacher, claims.metrics[name])
            if measured is None:
                missing.append(f"{name} with {teacher}" if teacher else name)
                continue
            margin = claims.margin / 100 * measured.means[1]
            verdict = line_verdict(measured.difference, claim.asks, margin)
            lines.append(ClaimLine(name, teacher, measured, verdict))
    return ClaimResult(claim, lines, missing, claim_verdict([line.verdict for line in lines], not missing))

"""The verdicts on lines and on claims, from made-up differences and records."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reproduce.claims import (
    FAILS,
    HOLDS,
    UNDECIDED,
    MeasuredDifference,
    Verdict,
    claim_verdict,
    evaluate_claims,
    line_verdict,
    load_claims,
    measure_difference,
    parse_claims,
)
from reproduce.fit_regression import fit_regression
from reproduce.folder import Folder
from reproduce.plan import BadPlan, Experiment, load_plan
from reproduce.scores import Metric, Scores, read_scores
from tests.reproduce.factories import finish
from threetowers.eval.metrics.bootstrap import PairedDifference

CONFIGS = Path(__file__).parents[2] / "configs/reproduce"
WORDS = {"page": "RESULTS", "title": "Title", "setting_title": "Setting", "setting": []}
METRICS: dict[str, Any] = {
    "retrieval": {
        "title": "R@1",
        "set": "heldout-retrieval",
        "task": "shift",
        "items": ["original/image_to_text/recall@1", "original/text_to_image/recall@1"],
    }
}


@pytest.mark.parametrize(
    ("low", "high", "asks", "verdict"),
    [
        (0.01, 0.05, "better", HOLDS),
        (-0.05, -0.01, "better", FAILS),
        (-0.01, 0.05, "better", UNDECIDED),
        (-0.01, 0.02, "not-worse", HOLDS),
        (-0.03, 0.02, "not-worse", UNDECIDED),
        (-0.05, -0.03, "not-worse", FAILS),
        (-0.05, -0.01, "not-worse", UNDECIDED),
    ],
)
def test_verdict_on_a_line_is_by_its_interval(low: float, high: float, asks: str, verdict: Verdict) -> None:
    assert line_verdict(PairedDifference((low + high) / 2, low, high, 0.5), asks, margin=0.02) == verdict


def test_a_claim_holds_where_all_of_its_lines_do() -> None:
    assert claim_verdict([HOLDS, HOLDS], complete=True) == HOLDS
    assert claim_verdict([HOLDS, UNDECIDED], complete=True) == UNDECIDED
    assert claim_verdict([HOLDS, UNDECIDED, FAILS], complete=True) == FAILS
    assert claim_verdict([HOLDS], complete=False) == UNDECIDED
    assert claim_verdict([FAILS], complete=False) == FAILS
    assert claim_verdict([], complete=True) == UNDECIDED


def test_verdicts_on_claims_from_records(tmp_path: Path) -> None:
    """LiT 0.3, CLIP 0.5, 3T 0.7; with half of the third tower mixed in 0.9, with it alone 0.6."""
    plan, folder = load_plan(CONFIGS / "experiments.yaml"), Folder(tmp_path)
    for seed in (0, 1, 2):
        finish(folder, Experiment("clip", None, None, seed), 0.5)
        finish(folder, Experiment("lit", "in-domain", None, seed), 0.3)
        mixed = [("0.25", 0.8), ("0.5", 0.9), ("1", 0.6)]
        finish(folder, Experiment("3t", "in-domain", None, seed), 0.7, mixed)
    scores = read_scores(plan, folder)
    assert scores.shares == {"in-domain": "0.5"}
    claims = {
        "over scratch": ("better", "3t", "clip"),
        "over LiT": ("better", "3t", "lit"),
        "LiT over scratch": ("better", "lit", "clip"),
        "equal": ("not-worse", "clip", "clip"),
        "undecided": ("better", "clip", "clip"),
        "mixed": ("better", "3t+mixed", "3t"),
        "third": ("better", "3t+third", "3t"),
        "not there": ("better", "3t/no-heads", "3t"),
    }
    tree = {
        **WORDS,
        "margin": 1.5,
        "metrics": METRICS,
        "claims": [
            {"title": title, "source": "a test", "asks": asks, "first": first, "second": second,
             "metrics": ["retrieval"], "teachers": ["in-domain"]}
            for title, (asks, first, second) in claims.items()
        ],
    }  # fmt: skip
    results = {one.claim.title: one for one in evaluate_claims(parse_claims(tree), scores)}
    assert {title: one.verdict for title, one in results.items()} == {
        "over scratch": HOLDS,
        "over LiT": HOLDS,
        "LiT over scratch": FAILS,
        "equal": HOLDS,
        "undecided": UNDECIDED,
        "mixed": HOLDS,
        "third": FAILS,
        "not there": UNDECIDED,
    }
    (line,) = results["over scratch"].lines
    assert line.measured.difference.mean == pytest.approx(0.2, abs=0.06)
    assert line.measured.difference.low < line.measured.difference.mean < line.measured.difference.high
    assert line.measured.seeds == 3
    assert results["not there"].missing == ["retrieval with in-domain"]


def test_sides_are_compared_over_their_common_seeds(tmp_path: Path) -> None:
    """Seeds differ by much more than the methods do, and one side has a seed that the other lacks."""
    plan, folder = load_plan(CONFIGS / "experiments.yaml"), Folder(tmp_path)
    for seed, start in enumerate((0.2, 0.5, 0.8)):
        finish(folder, Experiment("clip", None, None, seed), start)
        finish(folder, Experiment("3t", "in-domain", "no-heads", seed), start + 0.1)
    finish(folder, Experiment("3t", "in-domain", None, 1), 0.6)
    scores, metric = (
        read_scores(plan, folder),
        parse_claims(WORDS | {"margin": 1, "metrics": METRICS, "claims": []}).metrics,
    )
    paired = measured(scores, ("3t/no-heads", "clip"), metric["retrieval"])
    assert paired.seeds == 2  # of ablations, the plan has no third
    assert paired.difference.mean == pytest.approx(0.1, abs=0.04)
    assert paired.difference.low > 0.05
    single = measured(scores, ("3t/no-heads", "3t"), metric["retrieval"])
    assert (single.seeds, single.means[0]) == (1, single.means[1])
    assert measure_difference(scores, ("3t/live", "3t"), "in-domain", metric["retrieval"]) is None


def measured(scores: Scores, sides: tuple[str, str], metric: Metric, teacher: str = "in-domain") -> MeasuredDifference:
    found = measure_difference(scores, sides, teacher, metric)
    assert found is not None
    return found


def test_an_ablation_with_a_teacher_of_its_own_is_found_by_its_name(tmp_path: Path) -> None:
    plan, folder = load_plan(CONFIGS / "experiments.yaml"), Folder(tmp_path)
    finish(folder, Experiment("3t", "in-domain-64px", "64px-3t", 0), 0.9)
    finish(folder, Experiment("lit", "in-domain-64px", "64px-lit", 0), 0.6)
    metric = parse_claims(WORDS | {"margin": 1, "metrics": METRICS, "claims": []}).metrics["retrieval"]
    found = measured(read_scores(plan, folder), ("3t/64px-3t", "lit/64px-lit"), metric)
    assert (found.means, found.seeds) == (pytest.approx((0.9, 0.6), abs=0.05), 1)


def test_regression_on_the_fit_is_least_squares(tmp_path: Path) -> None:
    """LiT scores what its teacher fits, 3T half of that and 0.2; a teacher that one side lacks is left out."""
    plan, folder = load_plan(CONFIGS / "experiments.yaml"), Folder(tmp_path)
    fits = {"random": 0.1, "fashion": 0.3, "in-domain": 0.6, "lite0": 0.9, "lite2": 0.5}
    for seed in (0, 1):
        for teacher, fit in fits.items():
            finish(folder, Experiment("lit", teacher, None, seed), fit)
            if teacher != "lite2":
                finish(folder, Experiment("3t", teacher, None, seed), 0.5 * fit + 0.2)
    metric = parse_claims(WORDS | {"margin": 1, "metrics": METRICS, "claims": []}).metrics["retrieval"]
    scores, sides = read_scores(plan, folder), ("3t", "lit")
    line = fit_regression(scores, sides, fits, metric)
    assert line is not None
    names = [name for name in fits if name != "lite2"]
    difference = [measured(scores, sides, metric, name).difference.mean for name in names]
    by_numpy, height = np.polyfit([fits[name] for name in names], difference, 1)
    assert (line.difference.mean, line.at(0.0)) == pytest.approx((by_numpy, height))
    assert line.difference.mean == pytest.approx(line.first.mean - line.second.mean)
    assert (line.first.mean, line.second.mean) == pytest.approx((0.5, 1.0), abs=0.06)
    assert line.difference.low < by_numpy < line.difference.high < 0
    assert line.even is not None
    assert line.at(line.even.mean) == pytest.approx(0)
    assert (line.even.mean, line.seeds, line.ends) == (pytest.approx(0.4, abs=0.06), 2, (0.1, 0.9))
    same = fit_regression(scores, ("lit", "lit"), fits, metric)
    assert same is not None
    assert (same.difference.low, same.difference.high, same.even) == (pytest.approx(0), pytest.approx(0), None)
    assert fit_regression(scores, sides, {name: fits[name] for name in ("random", "lite0")}, metric) is None
    assert fit_regression(scores, sides, dict.fromkeys(fits, 0.4), metric) is None


def test_an_undefined_metric_is_refused() -> None:
    claim = {"title": "t", "source": "s", "asks": "better", "first": "a", "second": "b", "metrics": ["speed"]}
    with pytest.raises(BadPlan, match=r"'t': \['speed'\] are no metrics"):
        parse_claims(WORDS | {"margin": 1, "metrics": METRICS, "claims": [claim]})


def test_the_shipped_claims_are_readable() -> None:
    assert len(load_claims(CONFIGS / "claims.yaml").claims) > 10

"""Bootstrap intervals and paired differences against formulas, a slow reference, and their nominal coverage."""

import numpy as np
import pytest

from threetowers.eval.metrics.bootstrap import BootstrapDraws, Stratum, holm, resample


def single(values: np.ndarray, groups: np.ndarray | None = None) -> list[list[Stratum]]:
    return [[Stratum(values, np.arange(len(values)) if groups is None else groups)]]


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(0).random(401)
    found = resample([single(values)], draws=4000).interval(0)
    error = values.std() / np.sqrt(401)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)


def test_resampling_equals_a_slow_reference_with_groups_gaps_and_strata() -> None:
    rng = np.random.default_rng(1)
    strata = []
    for size in (31, 17):
        values = rng.random(size)
        values[rng.integers(size, size=3)] = np.nan
        strata.append(Stratum(values, rng.integers(9, size=size)))
    found = resample([[strata]], draws=3000)
    means = []
    for _ in range(3000):
        drawn = rng.integers(9, size=9)
        per_stratum = []
        for s in strata:
            kept = np.concatenate([s.value_N[s.group_N == group] for group in drawn])
            per_stratum.append(np.nanmean(kept))
        means.append(np.mean(per_stratum))
    assert found.mean_M[0] == pytest.approx(np.mean([np.nanmean(s.value_N) for s in strata]))
    expected = np.quantile(means, [0.025, 0.975])
    assert [found.interval(0).low, found.interval(0).high] == pytest.approx(expected, abs=0.02)


def test_items_of_one_group_are_drawn_together() -> None:
    groups = np.repeat(np.arange(20), 50)
    values = np.repeat(np.random.default_rng(2).random(20), 50)
    together, apart = resample([single(values, groups)]).interval(0), resample([single(values)]).interval(0)
    assert together.high - together.low > 4 * (apart.high - apart.low)


def test_pairing_finds_a_small_steady_difference() -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(300)
    one, other = hard + 0.02 + 0.01 * rng.standard_normal(300), hard
    found = resample([single(one), single(other)])
    assert found.difference(0, 1).p < 1e-6
    assert found.difference(0, 1).low > 0
    assert found.interval(0).low < found.interval(1).high  # the intervals overlap all the same
    assert found.difference(1, 0).mean == pytest.approx(-found.difference(0, 1).mean)


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(4)
    items = rng.random(2000)
    seeds = [[Stratum(items + shift, np.arange(2000))] for shift in (-0.1, 0.0, 0.1)]
    found = resample([seeds, single(items)])
    assert found.mean_M[0] == pytest.approx(items.mean())
    assert found.interval(0).high - found.interval(0).low > 0.1
    assert found.interval(1).high - found.interval(1).low < 0.05
    assert found.difference(0, 1).p > 0.5


def test_pairs_by_seed_take_the_seeds_out_of_a_difference() -> None:
    items = np.random.default_rng(6).random(2000)
    one, other = (
        [[Stratum(items + shift + more, np.arange(2000))] for shift in (-0.1, 0.0, 0.1)] for more in (0.01, 0.0)
    )
    apart, together = resample([one, other]), resample([one, other], paired=True)
    assert apart.difference(0, 1).low < 0 < apart.difference(0, 1).high
    found = together.difference(0, 1)
    assert [found.low, found.mean, found.high] == pytest.approx([0.01] * 3)
    assert together.interval(0) == apart.interval(0)
    with pytest.raises(ValueError, match=r"as many seeds of each model, found \[3, 2\]"):
        resample([one, other[:2]], paired=True)


def test_equal_models_are_rarely_called_different() -> None:
    rng = np.random.default_rng(5)
    alarms = 0
    for seed in range(200):
        one, other = (rng.random(80) < 0.4).astype(float), (rng.random(80) < 0.4).astype(float)
        alarms += resample([single(one), single(other)], draws=300, seed=seed).difference(0, 1).p < 0.05
    assert alarms <= 22  # 10 expected; more than 22 has a chance of 2e-4


@pytest.mark.parametrize(("seeds", "spread"), [(2, 0.0), (2, 0.05), (4, 0.0), (4, 0.05), (8, 0.05)])
def test_intervals_over_seeds_and_items_cover_the_truth(seeds: int, spread: float) -> None:
    """Differences of two models as trained runs have them: most of what varies is an item's luck in one seed."""
    rng, covered, runs, items = np.random.default_rng(7), 0, 150, 300
    group_N = np.arange(items)
    for run in range(runs):
        by_item_N, by_seed_S = rng.normal(0, 0.45, items), rng.normal(0, spread, seeds)
        scores = [[Stratum(by_item_N + shift + rng.normal(0, 0.9, items), group_N)] for shift in by_seed_S]
        found = resample([scores], draws=200, seed=run).interval(0)
        covered += found.low <= 0 <= found.high
    assert covered / runs >= 0.92  # seen: 0.93 to 0.97; 0.95 is asked for


def test_a_single_group_is_no_evidence() -> None:
    one = np.ones(1)
    found: BootstrapDraws = resample([single(one), single(0 * one)])
    assert found.difference(0, 1).p == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="only on the same items"):
        resample([single(np.ones(3)), single(np.ones(4))])
    with pytest.raises(ValueError, match="only on the same items"):
        resample([single(np.ones(3)), single(np.array([1, np.nan, 1]))])

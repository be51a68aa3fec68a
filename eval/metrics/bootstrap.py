"""Bootstrap intervals of means over items, and of paired differences between models on the same items.

The scores of a model form strata (for example the galleries of a set), each an array of items, whose means are
averaged. Groups are drawn with replacement, which vary independently: single items, or items that belong
together, in all strata and for all models alike. Where a model was trained from several seeds, seeds are drawn too:
for each model on its own, or in pairs for all models alike, as a seed that gives one model a good start may give the
other one a good start too.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 (grouped data) and 13 (percentile intervals).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats64 = NDArray[np.float64]
DRAWS = 2000
MAX_WEIGHTS = 1 << 22  # draw weights in memory at a time, to bound memory for many groups


@dataclass(frozen=True)
class Stratum:
    """Scores of items (N,), NaN for an item that does not count, and the group of each (N,) int64."""

    value_N: NDArray[np.floating]
    group_N: NDArray[np.int64]


@dataclass(frozen=True)
class ConfidenceInterval:
    """A mean with the percentile interval of its bootstrap draws."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference(ConfidenceInterval):
    """The mean difference of two models; `p` is two-sided, with the draws taken as normally distributed."""

    p: float


@dataclass(frozen=True)
class BootstrapDraws:
    """The means of M models on the same items, and their means in each of R draws.

    Attributes:
        mean_M: Means over the items themselves.
        draws_MR: Means of each draw.
        groups: How many groups there were to draw from.
    """

    mean_M: Floats64
    draws_MR: Floats64
    groups: int

    def interval(self, model: int, level: float = 0.95) -> ConfidenceInterval:
        """Return the mean of one model with its interval of confidence `level`."""
        return self.statistic(lambda mean_MR: mean_MR[model], level)

    def statistic(self, of: Callable[[Floats64], Floats64], level: float = 0.95) -> ConfidenceInterval:
        """Return a function of the means with its interval; `of` maps means (M, R) to values (R,)."""
        return ConfidenceInterval(float(of(self.mean_M[:, None])[0]), *_percentiles(of(self.draws_MR), level))

    def difference(self, first: int, second: int, level: float = 0.95) -> PairedDifference:
        """Return model `first` minus model `second`, paired: both saw the same draws."""
        mean = float(self.mean_M[first] - self.mean_M[second])
        draws_R = self.draws_MR[first] - self.draws_MR[second]
        spread = float(draws_R.std())
        # A single group, or a difference that is the same in every draw, is no evidence.
        p = math.erfc(abs(mean) / spread / math.sqrt(2)) if spread > 1e-12 else 1.0
        return PairedDifference(mean, *_percentiles(draws_R, level), p)


def resample(
    models: Sequence[Sequence[Sequence[Stratum]]], *, draws: int = DRAWS, seed: int = 0, paired: bool = False
) -> BootstrapDraws:
    """Draw groups, and training seeds, with replacement, and average again.

    Args:
        models: `models[m][s][g]` are the scores of model m, trained from seed s, in stratum g.
        draws: Number R of bootstrap draws.
        seed: Seed of the random draws.
        paired: The s-th training seed is the same for every model, and they are drawn together.

    Raises:
        ValueError: Where models or seeds were not scored on the same items, or pairs are incomplete.
    """
    if paired and len({len(seeds) for seeds in models}) > 1:
        raise ValueError(f"pairs by seed need as many seeds of each model, found {[len(seeds) for seeds in models]}")
    reference = models[0][0]
    for seeds in models:
        for strata in seeds:
            if not same_items(reference, strata):
                raise ValueError(
                    "models can be compared in pairs only on the same items: evaluate both on the same data"
                )

    # Sums and counts by group: (G, columns), a column for each model, seed and stratum.
    groups_G = np.unique(np.concatenate([stratum.group_N for stratum in reference]))
    sums = []
    counts = []
    for seeds in models:
        for strata in seeds:
            for stratum in strata:
                sum_G, count_G = _by_group(stratum, groups_G)
                sums.append(sum_G)
                counts.append(count_G)
    sums_GC = np.stack(sums, axis=1)
    counts_GC = np.stack(counts, axis=1)

    # The mean of each column: first of the items themselves, then of each draw of groups, some draws at a time.
    rng = np.random.default_rng(seed)
    means = [_weighted_means(np.ones((1, len(groups_G))), sums_GC, counts_GC)]
    step = max(1, MAX_WEIGHTS // len(groups_G))
    for start in range(0, draws, step):
        drawn_rG = rng.integers(len(groups_G), size=(min(step, draws - start), len(groups_G)))
        weights_rG = np.stack([np.bincount(row, minlength=len(groups_G)) for row in drawn_rG]).astype(np.float64)
        means.append(_weighted_means(weights_rG, sums_GC, counts_GC))
    means_RC = np.concatenate(means)

    # Strata are averaged within a seed, then the drawn seeds within a model.
    mean_M = []
    draws_MR = []
    column = 0
    for index, seeds in enumerate(models):
        columns = len(seeds) * len(reference)
        by_stratum_RSG = means_RC[:, column : column + columns].reshape(-1, len(seeds), len(reference))
        by_seed_RS = by_stratum_RSG.mean(axis=2)
        if not paired or index == 0:
            seeds_RS = rng.integers(len(seeds), size=(draws, len(seeds)))
        mean_M.append(by_seed_RS[0].mean())
        draws_MR.append(np.take_along_axis(by_seed_RS[1:], seeds_RS, axis=1).mean(axis=1))
        column += columns
    return BootstrapDraws(np.array(mean_M), np.stack(draws_MR), len(groups_G))


def same_items(first: Sequence[Stratum], second: Sequence[Stratum]) -> bool:
    """Return whether two models were scored on the same items: equal strata, groups and items that count."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if not np.array_equal(a.group_N, b.group_N):
            return False
        if not np.array_equal(np.isnan(a.value_N), np.isnan(b.value_N)):
            return False
    return True


def holm(p_K: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing K hypotheses at once (Holm, 1979).

    A hypothesis whose adjusted value is below α is rejected; the chance of any false rejection then stays below α.
    """
    adjusted = [0.0] * len(p_K)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_K).tolist()):
        largest = max(largest, min(1.0, (len(p_K) - rank) * p_K[index]))
        adjusted[index] = largest
    return adjusted


def _by_group(stratum: Stratum, groups_G: NDArray[np.int64]) -> tuple[Floats64, Floats64]:
    """Return the sum and the count of the items of each group."""
    counted_N = ~np.isnan(stratum.value_N)
    index_N = np.searchsorted(groups_G, stratum.group_N[counted_N])
    sums_G = np.bincount(index_N, weights=stratum.value_N[counted_N], minlength=len(groups_G)).astype(np.float64)
    return sums_G, np.bincount(index_N, minlength=len(groups_G)).astype(np.float64)


def _weighted_means(weights_RG: Floats64, sums_GC: Floats64, counts_GC: Floats64) -> Floats64:
    """Return the mean of each column under each row of weights.

    A draw without any item of a stratum carries no information on it, and gives its mean over all items.
    """
    counts_RC = weights_RG @ counts_GC
    with np.errstate(invalid="ignore"):
        means_RC = (weights_RG @ sums_GC) / counts_RC
    return np.where(counts_RC > 0, means_RC, sums_GC.sum(0) / np.maximum(counts_GC.sum(0), 1))


def _percentiles(draws_R: Floats64, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""How sure a mean over items is, and a difference of two models on the same items: resampling of what could vary.

A model's scores form strata (the galleries of a set, say), each an array of items, whose means are averaged. Drawn with
replacement are units, the things that vary independently: items, or groups of items that belong together, in all strata
and for all models alike. Where a model was trained from several seeds, seeds are drawn too: for each model on its own,
or in pairs, for all models alike, as a seed that starts one model well may start the other well.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats64 = NDArray[np.float64]
DRAWS = 2000
WEIGHTS = 1 << 22  # numbers in memory at a time


@dataclass(frozen=True)
class Stratum:
    """Scores of items (N,), NaN for what does not count, and the unit each belongs to (N,) int64."""

    value_N: NDArray[np.floating]
    unit_N: NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A mean with the percentile interval of its bootstrap draws."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference(Interval):
    """The mean difference of two models; `p` is two-sided, from the draws' spread taken as normal."""

    p: float


@dataclass(frozen=True)
class Resampled:
    """The means of some models on the same items, and what they were in each draw (models, draws)."""

    mean_M: Floats64
    draws_MR: Floats64
    units: int

    def interval(self, model: int, level: float = 0.95) -> Interval:
        return self.statistic(lambda mean_MR: mean_MR[model], level)

    def statistic(self, of: Callable[[Floats64], Floats64], level: float = 0.95) -> Interval:
        """What `of` makes of the models' means: from (models, R) to (R,), R times over."""
        return Interval(float(of(self.mean_M[:, None])[0]), *_bounds(of(self.draws_MR), level))

    def difference(self, first: int, second: int, level: float = 0.95) -> PairedDifference:
        """`first` minus `second`, paired: both saw the same draws."""
        mean = float(self.mean_M[first] - self.mean_M[second])
        draws_R = self.draws_MR[first] - self.draws_MR[second]
        spread = float(draws_R.std())
        # One unit, or a difference that no draw moves, is no evidence.
        p = math.erfc(abs(mean) / spread / math.sqrt(2)) if spread > 1e-12 else 1.0
        return PairedDifference(mean, *_bounds(draws_R, level), p)


def resample(
    models: Sequence[Sequence[Sequence[Stratum]]], *, draws: int = DRAWS, seed: int = 0, paired: bool = False
) -> Resampled:
    """Draw units, and seeds, and average again. `models[m][s][g]`: model m, trained from seed s, in stratum g.

    paired: The s-th seed is the same for every model, and they are drawn together.

    Raises ValueError where models or seeds were not scored on the same items, or pairs are incomplete.
    """
    if paired and len({len(seeds) for seeds in models}) > 1:
        raise ValueError(f"pairs by seed need as many seeds of each model, found {[len(seeds) for seeds in models]}")
    strata = len(models[0][0])
    units = np.unique(np.concatenate([stratum.unit_N for stratum in models[0][0]]))
    for seeds in models:
        for scores in seeds:
            _check_same(models[0][0], scores)
    # Sums and counts by unit: (U, columns), a column for each model, seed and stratum.
    columns = [(m, stratum) for m, seeds in enumerate(models) for scores in seeds for stratum in scores]
    sums_UC, counts_UC = (np.stack(x, axis=1) for x in zip(*(_by_unit(s, units) for _, s in columns), strict=True))
    rng = np.random.default_rng(seed)
    drawn = [_means(np.ones((1, len(units))), sums_UC, counts_UC)]
    step = max(1, WEIGHTS // len(units))
    for start in range(0, draws, step):
        picked = rng.integers(len(units), size=(min(step, draws - start), len(units)))
        weights = np.stack([np.bincount(row, minlength=len(units)) for row in picked]).astype(np.float64)
        drawn.append(_means(weights, sums_UC, counts_UC))
    means_RC = np.concatenate(drawn)
    mean_M, draws_MR, first = [], [], 0
    for storage, seeds in enumerate(models):
        part_RSG = means_RC[:, first : first + len(seeds) * strata].reshape(-1, len(seeds), strata)
        by_seed_RS = part_RSG.mean(axis=2)
        if not paired or storage == 0:
            picked = rng.integers(len(seeds), size=(draws, len(seeds)))
        mean_M.append(by_seed_RS[0].mean())
        draws_MR.append(np.take_along_axis(by_seed_RS[1:], picked, axis=1).mean(axis=1))
        first += len(seeds) * strata
    return Resampled(np.array(mean_M), np.stack(draws_MR), len(units))


def holm(p_K: Sequence[float]) -> list[float]:
    """p-values adjusted for asking K questions at once (Holm, 1979): the chance of any false alarm stays below p."""
    order = np.argsort(p_K)
    adjusted, largest = [0.0] * len(p_K), 0.0
    for storage, index in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_K) - storage) * p_K[index]))
        adjusted[index] = largest
    return adjusted


def _by_unit(stratum: Stratum, units: NDArray[np.int64]) -> tuple[Floats64, Floats64]:
    counted_N = ~np.isnan(stratum.value_N)
    at_N = np.searchsorted(units, stratum.unit_N[counted_N])
    sums = np.bincount(at_N, weights=stratum.value_N[counted_N], minlength=len(units)).astype(np.float64)
    return sums, np.bincount(at_N, minlength=len(units)).astype(np.float64)


def _means(weights_RU: Floats64, sums_UC: Floats64, counts_UC: Floats64) -> Floats64:
    """The mean of each column under each row of weights; a draw without an item of a stratum says nothing: its mean."""
    counts_RC = weights_RU @ counts_UC
    with np.errstate(invalid="ignore"):
        means_RC = (weights_RU @ sums_UC) / counts_RC
    return np.where(counts_RC > 0, means_RC, sums_UC.sum(0) / np.maximum(counts_UC.sum(0), 1))


def _check_same(one: Sequence[Stratum], other: Sequence[Stratum]) -> None:
    same = len(one) == len(other) and all(
        np.array_equal(a.unit_N, b.unit_N) and np.array_equal(np.isnan(a.value_N), np.isnan(b.value_N))
        for a, b in zip(one, other, strict=True)
    )
    if not same:
        raise ValueError("models can be compared in pairs only on the same items: evaluate both on the same data")


def _bounds(draws_R: Floats64, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

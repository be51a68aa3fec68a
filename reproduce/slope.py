"""How scores, and a difference of scores, go with how well the teacher fits the data: a line through all teachers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reproduce.scores import Metric, Scores
from threetowers.eval.metrics.bootstrap import ConfidenceInterval, resample

Floats64 = NDArray[np.float64]
TINY = 1e-12  # of rounding: a difference that no draw moves does not change with the fit
LEAST = 3  # different fits: through two of them, a line goes whatever they are


@dataclass(frozen=True)
class Slope:
    """What more of the teacher's fit does: change of a score for a change of the fit, both of them fractions.

    `mean`: the difference over all teachers, which its line has at the mean of the fits, `middle`. `even`: the fit at
    which that line crosses zero, None where the difference may not change at all. `ends`: the least and the most fit.
    """

    first: ConfidenceInterval
    second: ConfidenceInterval
    difference: ConfidenceInterval
    mean: ConfidenceInterval
    middle: float
    even: ConfidenceInterval | None
    ends: tuple[float, float]
    seeds: int

    def at(self, fit: float) -> float:
        """The difference on its line."""
        return self.mean.mean + self.difference.mean * (fit - self.middle)


def slope(scores: Scores, sides: tuple[str, str], fits: Mapping[str, float], metric: Metric) -> Slope | None:
    """Lines by least squares over the teachers of `fits`; None where too few, or too alike, were measured.

    Intervals are of concepts and seeds, drawn for all teachers and both sides alike; the teachers are taken as given.
    """
    found = [{name: scores.find(side, name, metric) for name in fits} for side in sides]
    names = [name for name in fits if all(side[name] for side in found)]
    seeds = sorted(set[int].intersection(*(set(side[name]) for side in found for name in names))) if names else []
    if len({fits[name] for name in names}) < LEAST or not seeds:
        return None
    resampled = resample([[side[name][seed] for seed in seeds] for side in found for name in names], paired=True)
    fit_T = np.array([fits[name] for name in names])
    middle = float(fit_T.mean())
    slope_T = (fit_T - middle) / ((fit_T - middle) ** 2).sum()
    # Of the means of all models, those of the first side before those of the second, each number is a weighted sum.
    first_M, second_M = (np.kron(side, slope_T) for side in ((1, 0), (0, 1)))
    mean_M = np.kron((1, -1), np.full(len(names), 1 / len(names)))
    difference_M = first_M - second_M

    def even(mean_MR: Floats64) -> Floats64:
        fit_R: Floats64 = middle - (mean_M @ mean_MR) / (difference_M @ mean_MR)
        return fit_R

    difference = resampled.statistic(lambda mean_MR: difference_M @ mean_MR)
    return Slope(
        first=resampled.statistic(lambda mean_MR: first_M @ mean_MR),
        second=resampled.statistic(lambda mean_MR: second_M @ mean_MR),
        difference=difference,
        mean=resampled.statistic(lambda mean_MR: mean_M @ mean_MR),
        middle=middle,
        even=resampled.statistic(even) if difference.low > TINY or difference.high < -TINY else None,
        ends=(float(fit_T.min()), float(fit_T.max())),
        seeds=len(seeds),
    )

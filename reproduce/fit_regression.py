"""Linear regression of scores, and of a difference of scores, on how well the teacher fits the data."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reproduce.scores import Metric, Scores
from threetowers.eval.metrics.bootstrap import ConfidenceInterval, Floats64, resample

ROUNDING = 1e-12  # below it, a difference does not depend on the fit
MIN_FITS = 3  # different ones: a line through two fits exactly, whatever they are


@dataclass(frozen=True)
class FitRegression:
    """Slopes of two scores and of their difference against the teacher's fit, all of them fractions.

    Attributes:
        first: Slope of the first score.
        second: Slope of the second score.
        difference: Slope of their difference.
        mean: The difference in the mean over teachers, which its line has at `middle`.
        middle: Mean of the fits.
        even: The fit at which the line of the difference crosses zero; None if its slope may be zero.
        ends: The smallest and the largest fit.
        seeds: Number of seeds that all teachers and both sides have.
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
        """Return the difference at some fit on its line."""
        return self.mean.mean + self.difference.mean * (fit - self.middle)


def fit_regression(
    scores: Scores, sides: tuple[str, str], fits: Mapping[str, float], metric: Metric
) -> FitRegression | None:
    """Fit lines by least squares through the teachers of `fits` that both sides were measured with.

    Intervals are over concepts and seeds, drawn for all teachers and both sides alike; the teachers are taken as given.

    Returns:
        None for fewer than three different fits, or without a common seed.
    """
    # The scores of each teacher that both sides have, over the seeds that all of them have.
    teachers = []
    first = []
    second = []
    for teacher in fits:
        first_scores = scores.find(sides[0], teacher, metric)
        second_scores = scores.find(sides[1], teacher, metric)
        if first_scores and second_scores:
            teachers.append(teacher)
            first.append(first_scores)
            second.append(second_scores)
    if len({fits[teacher] for teacher in teachers}) < MIN_FITS:
        return None
    models = [*first, *second]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in models)))
    if not seeds:
        return None
    bootstrap = resample([[by_seed[seed] for seed in seeds] for by_seed in models], paired=True)

    # A slope is a weighted sum of the means of all models, those of the first side before those of the second.
    fit_T = np.array([fits[teacher] for teacher in teachers])
    middle = float(fit_T.mean())
    slope_T = (fit_T - middle) / ((fit_T - middle) ** 2).sum()
    first_M = np.kron((1, 0), slope_T)
    second_M = np.kron((0, 1), slope_T)
    mean_M = np.kron((1, -1), np.full(len(teachers), 1 / len(teachers)))
    difference_M = first_M - second_M

    def even(mean_MR: Floats64) -> Floats64:
        fit_R: Floats64 = middle - (mean_M @ mean_MR) / (difference_M @ mean_MR)
        return fit_R

    difference = bootstrap.statistic(lambda mean_MR: difference_M @ mean_MR)
    return FitRegression(
        first=bootstrap.statistic(lambda mean_MR: first_M @ mean_MR),
        second=bootstrap.statistic(lambda mean_MR: second_M @ mean_MR),
        difference=difference,
        mean=bootstrap.statistic(lambda mean_MR: mean_M @ mean_MR),
        middle=middle,
        even=bootstrap.statistic(even) if difference.low > ROUNDING or difference.high < -ROUNDING else None,
        ends=(float(fit_T.min()), float(fit_T.max())),
        seeds=len(seeds),
    )

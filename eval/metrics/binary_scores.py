"""ROC and precision-recall metrics of a binary score, exact under ties."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class ThresholdCurve:
    """Positives and negatives accepted at each of T distinct thresholds, strictest first, from (0, 0) on.

    Items of equal score share one threshold, so that the order in which they are given does not matter.
    """

    positives_T: NDArray[np.int64]
    negatives_T: NDArray[np.int64]

    @classmethod
    def from_scores(cls, score_N: ArrayLike, positive_N: ArrayLike) -> "ThresholdCurve":
        """Return the curve of scores that are larger for positives.

        Args:
            score_N: A finite score an item.
            positive_N: Whether each item is a positive.

        Raises:
            ValueError: For scores that are not finite, for lengths that differ, and for items of one kind alone.
        """
        score_N = np.asarray(score_N)
        positive_N = np.asarray(positive_N, bool)
        if score_N.ndim != 1 or score_N.shape != positive_N.shape:
            raise ValueError(
                f"expected one score and one label an item, got shapes {score_N.shape}, {positive_N.shape}"
            )
        if not positive_N.any() or positive_N.all():
            raise ValueError(f"{int(positive_N.sum())} of {len(positive_N)} items are positive, expected both kinds")
        bad_N = ~np.isfinite(score_N)
        if bad_N.any():
            raise ValueError(
                f"{int(bad_N.sum())} of {len(score_N)} scores are NaN or infinite, the first is item "
                f"{int(bad_N.argmax())}: find what produced them"
            )
        order_N = np.argsort(-score_N, kind="stable")
        # The last item of each run of equal scores.
        ends_T = np.append(np.flatnonzero(np.diff(score_N[order_N])), len(score_N) - 1)
        positives_T = np.append(0, np.cumsum(positive_N[order_N])[ends_T])
        accepted_T = np.append(0, ends_T + 1)
        return cls(positives_T, accepted_T - positives_T)

    @property
    def auroc(self) -> float:
        """Area under the ROC curve, in 0..1: P(positive scores above negative) + ½ P(they score the same)."""
        area = np.diff(self.negatives_T).astype(float) @ (self.positives_T[1:] + self.positives_T[:-1]) / 2
        return float(area / (self.positives_T[-1] * self.negatives_T[-1]))

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall steps, Σ (R_t - R_{t-1}) P_t, in 0..1, without interpolation."""
        precision_T = self.positives_T[1:] / (self.positives_T[1:] + self.negatives_T[1:])
        return float(np.diff(self.positives_T) @ precision_T / self.positives_T[-1])

    def false_positive_rate(self, recall: float) -> float:
        """Return the share of negatives accepted at the strictest threshold that accepts `recall` of the positives."""
        first = np.searchsorted(self.positives_T / self.positives_T[-1], recall)
        return float(self.negatives_T[first] / self.negatives_T[-1])

"""How well a score separates two kinds of items: exact under ties, from the distinct thresholds alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Curve:
    """Positives and negatives accepted at each distinct threshold, strictest first; starts at (0, 0)."""

    positives_T: NDArray[np.int64]
    negatives_T: NDArray[np.int64]

    @classmethod
    def of(cls, score_N: ArrayLike, positive_N: ArrayLike) -> "Curve":
        """The curve of scores that are larger for positives.

        Raises ValueError for scores that are not finite, for lengths that differ, and where one of the kinds is absent.
        """
        scores, positive = np.asarray(score_N), np.asarray(positive_N, bool)
        if scores.ndim != 1 or scores.shape != positive.shape:
            raise ValueError(f"expected one score and one truth an item, got shapes {scores.shape}, {positive.shape}")
        if not positive.any() or positive.all():
            raise ValueError(
                f"{int(positive.sum())} of {len(positive)} items are positive: separation needs items of both kinds"
            )
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are NaN or infinite, the first is item "
                f"{int((~np.isfinite(scores)).argmax())}: find what produced them"
            )
        order = np.argsort(-scores, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
        positives = np.append(0, np.cumsum(positive[order])[ends])
        return cls(positives, np.append(0, ends + 1) - positives)

    @property
    def auroc(self) -> float:
        """P(a positive scores higher than a negative) + ½ P(they score the same)."""
        area = np.diff(self.negatives_T).astype(float) @ (self.positives_T[1:] + self.positives_T[:-1]) / 2
        return float(area / (self.positives_T[-1] * self.negatives_T[-1]))

    @property
    def average_precision(self) -> float:
        """The area under the precision-recall steps, Σ (R_t - R_{t-1}) P_t; no interpolation."""
        precision = self.positives_T[1:] / (self.positives_T[1:] + self.negatives_T[1:])
        return float(np.diff(self.positives_T) @ precision / self.positives_T[-1])

    def false_positive_rate(self, recall: float) -> float:
        """The share of negatives accepted at the strictest threshold that accepts `recall` of the positives."""
        first = np.searchsorted(self.positives_T / self.positives_T[-1], recall)
        return float(self.negatives_T[first] / self.negatives_T[-1])

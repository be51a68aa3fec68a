"""Out-of-distribution detection: scores that are larger for in-distribution items, and how well they separate.

The literature uses FPR@95 for two values. `fpr_at_95_id_recall` is the share of outliers accepted at the threshold that
accepts 95 % of the in-distribution items (ODIN, MCM); `fpr_at_95_ood_recall` is the share of in-distribution items
rejected at the threshold that rejects 95 % of the outliers (OpenOOD v1.5). Both are reported.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.binary_scores import ThresholdCurve
from threetowers.eval.metrics.classification import Floats, Ints
from threetowers.eval.metrics.neighbour_votes import check_neighbours
from threetowers.eval.search.index import Device, build_index

RECALL = 0.95


def detection_metrics(inside_N: NDArray[np.floating], outside_M: NDArray[np.floating]) -> dict[str, float]:
    """Return how well scores separate in-distribution items from outliers, each metric in 0..1.

    `auroc`, both FPR@95 (see the module), and the average precision of finding either side, `aupr_in` and `aupr_out`,
    which is a sum of steps where OpenOOD's is one of trapezoids.

    Args:
        inside_N: Scores of in-distribution items, the larger ones.
        outside_M: Scores of outliers.

    Raises:
        ValueError: If a side is empty or a score is not finite.
    """
    scores = np.concatenate([inside_N, outside_M])
    inside = np.arange(len(scores)) < len(inside_N)
    accepting = ThresholdCurve.from_scores(scores, inside)
    rejecting = ThresholdCurve.from_scores(-scores, ~inside)
    return {
        "auroc": accepting.auroc,
        "fpr_at_95_id_recall": accepting.false_positive_rate(RECALL),
        "fpr_at_95_ood_recall": rejecting.false_positive_rate(RECALL),
        "aupr_in": accepting.average_precision,
        "aupr_out": rejecting.average_precision,
    }


def class_scores(cosine_NC: Floats, scale: float) -> dict[str, NDArray[np.float64]]:
    """Return in-distribution scores (N,) by name, from the cosines to the class embeddings.

    `max_softmax`: log of the largest probability at the model's own scale (Hendrycks and Gimpel, 2017). `mcm`: the same
    at scale 1 (Ming et al., 2022). `max_logit`: the largest cosine. `energy`: log of the summed exponentials at the
    model's scale (Liu et al., 2020, at temperature 1).
    """
    cosines = cosine_NC.astype(np.float64)
    best_N = cosines.max(axis=1)
    # Minus the log of the largest probability orders items as the probability does, and where the model is sure it does
    # not round to nothing: the largest term, 1, is left to log1p.
    gaps_NC = cosines - best_N[:, None]
    np.put_along_axis(gaps_NC, cosines.argmax(axis=1)[:, None], -np.inf, axis=1)
    doubt_N = np.log1p(np.exp(scale * gaps_NC).sum(axis=1))
    doubt_at_1_N = np.log1p(np.exp(1.0 * gaps_NC).sum(axis=1))
    return {
        "max_softmax": -doubt_N,
        "mcm": -doubt_at_1_N,
        "max_logit": best_N,
        "energy": scale * best_N + doubt_N,
    }


def neighbour_score(train_MD: Floats, x_ND: Floats, k: int, *, device: Device = "auto") -> NDArray[np.float64]:
    """Return the cosine (N,) to the k-th nearest training item (Sun et al., 2022); embeddings are unit-norm.

    Raises:
        ValueError: For a k outside of 1..M.
    """
    check_neighbours([k], len(train_MD))
    index = build_index(train_MD, device=device)
    return index.search(x_ND, k).scores_NK[:, -1].astype(np.float64)


@dataclass(frozen=True)
class Mahalanobis:
    """Mahalanobis distance to the nearest class mean, one covariance shared by all classes (Lee et al., 2018).

    Directions in which the training items do not vary carry no information on what is usual, and are left out.

    Attributes:
        mean_CR: Whitened class means.
        whitening_DR: Map of features to the R directions that are kept, scaled to unit variance.
    """

    mean_CR: NDArray[np.float64]
    whitening_DR: NDArray[np.float64]

    @property
    def rank(self) -> int:
        """Number of directions that are kept."""
        return int(self.whitening_DR.shape[1])

    @classmethod
    def fit(cls, train_MD: Floats, label_M: Ints) -> "Mahalanobis":
        """Estimate class means and the shared covariance from training items.

        Raises:
            ValueError: If no class varies.
        """
        x_MD = train_MD.astype(np.float64)
        present, number_M = np.unique(label_M, return_inverse=True)
        sums_CD = np.zeros((len(present), x_MD.shape[1]))
        np.add.at(sums_CD, number_M, x_MD)
        mean_CD = sums_CD / np.bincount(number_M)[:, None]
        within_MD = x_MD - mean_CD[number_M]
        variance_D, axes_DD = np.linalg.eigh(within_MD.T @ within_MD / len(x_MD))
        # Rounding of float32 embeddings leaves noise of this size in directions that are in truth constant.
        kept = variance_D > np.finfo(np.float32).eps * variance_D.max()
        if not variance_D.max() > 0 or not kept.any():
            raise ValueError(
                f"{len(x_MD)} training items in {len(present)} classes do not vary within any class: the Mahalanobis "
                "score needs classes of several different items"
            )
        whitening_DR = axes_DD[:, kept] / np.sqrt(variance_D[kept])
        return cls(mean_CD @ whitening_DR, whitening_DR)

    def score(self, x_ND: Floats, chunk: int = 4096) -> NDArray[np.float64]:
        """Return minus the smallest squared distance of each item, (N,)."""
        means_C = (self.mean_CR**2).sum(axis=1)
        parts = []
        for start in range(0, len(x_ND), chunk):
            z_bR = x_ND[start : start + chunk].astype(np.float64) @ self.whitening_DR
            squared_bC = (z_bR**2).sum(axis=1)[:, None] - 2 * z_bR @ self.mean_CR.T + means_C
            parts.append(-squared_bC.min(axis=1))
        return np.concatenate(parts)

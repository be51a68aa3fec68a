"""Classification metrics: accuracies from ranks that are safe under ties, average precision, and calibration."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.binary_scores import ThresholdCurve
from threetowers.eval.metrics.retrieval_ranks import NO_POSITIVE, TIE

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

NO_LABEL = -1  # pads the labels of items that have fewer than others
TOP_KS = (1, 5)


def telling_ks(classes: int, ks: Sequence[int] = TOP_KS) -> list[int]:
    """Return 1 and those k for which not every prediction among the classes is right."""
    return [k for k in ks if k == 1 or k < classes]


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of C classes, x W + b: class embeddings, a ridge probe and a logistic probe are all of this form."""

    weight_DC: Floats
    bias_C: Floats | None = None

    def scores(self, x_ND: Floats, chunk: int = 4096) -> Iterator[Floats]:
        """Yield the scores in chunks (≤ chunk, C) float32, in the order of the items: N x C may exceed memory."""
        for start in range(0, len(x_ND), chunk):
            scores_bC = np.asarray(x_ND[start : start + chunk], np.float32) @ self.weight_DC
            yield scores_bC if self.bias_C is None else scores_bC + self.bias_C


@dataclass(frozen=True)
class ScoredPredictions:
    """The predictions of a classifier for N items, ranked against their labels.

    Attributes:
        predicted_N: The class with the largest score.
        confidence_N: Its softmax probability.
        optimistic_N: How many wrong classes score higher than the item's best label; `NO_POSITIVE` for an item without
            a label, which no accuracy counts.
        pessimistic_N: How many wrong classes score higher than that label or the same; `NO_POSITIVE` likewise.
        classes: Number of classes C.
    """

    predicted_N: Ints
    confidence_N: Floats
    optimistic_N: Ints
    pessimistic_N: Ints
    classes: int

    @property
    def labelled_N(self) -> NDArray[np.bool_]:
        """Whether each item has a label."""
        return np.not_equal(self.pessimistic_N, NO_POSITIVE)

    def correct_N(self, k: int = 1) -> NDArray[np.bool_]:
        """Return whether a label of each item is among the k best classes; ties count against the model."""
        return self.labelled_N & (self.pessimistic_N < k)


def label_matrix(labels: Sequence[Sequence[int]], classes: int) -> Ints:
    """Return the labels of N items as a matrix (N, L), L the most labels of an item, padded with `NO_LABEL`.

    Raises:
        ValueError: For a label outside of 0..classes - 1.
    """
    width = max((len(item) for item in labels), default=0)
    labels_NL = np.full((len(labels), max(width, 1)), NO_LABEL, np.int64)
    for row, item in enumerate(labels):
        labels_NL[row, : len(item)] = item
    bad_N = ((labels_NL < NO_LABEL) | (labels_NL >= classes)).any(axis=1)
    if bad_N.any():
        row = int(bad_N.argmax())
        raise ValueError(
            f"item {row} has labels {list(labels[row])}: expected 0 to {classes - 1} for {classes} classes"
        )
    return labels_NL


def score_predictions(scores: Iterable[Floats], labels_NL: Ints, *, scale: float = 1.0) -> ScoredPredictions:
    """Rank the labels of all items in the scores of a classifier.

    Scores less than `TIE` apart count as equal: a product in float32 is no more exact than that.

    Args:
        scores: The scores in chunks (b, C), in the order of the items.
        labels_NL: The labels of all items (see `label_matrix`).
        scale: Factor of the scores in the softmax that gives the confidence.

    Raises:
        ValueError: For scores that are not finite, or for another number of items than there are labels.
    """
    chunks = []
    start = 0
    classes = 0
    for scores_bC in scores:
        labels_bL = labels_NL[start : start + len(scores_bC)]
        if len(labels_bL) != len(scores_bC):
            break  # more scores than labels
        if not np.isfinite(scores_bC).all():
            row = int((~np.isfinite(scores_bC)).any(axis=1).argmax())
            raise ValueError(f"the scores of item {start + row} hold NaN or infinity: find what produced its embedding")
        chunks.append(_score_chunk(scores_bC, labels_bL, scale))
        classes = scores_bC.shape[1]
        start += len(scores_bC)
    else:
        if start == len(labels_NL) and chunks:
            predicted_N, confidence_N, optimistic_N, pessimistic_N = map(np.concatenate, zip(*chunks, strict=True))
            return ScoredPredictions(predicted_N, confidence_N, optimistic_N, pessimistic_N, classes)
    raise ValueError(f"got scores of another number of items than the {len(labels_NL)} that have labels")


def _score_chunk(scores_bC: Floats, labels_bL: Ints, scale: float) -> tuple[Ints, Floats, Ints, Ints]:
    """Return the fields of `ScoredPredictions` for some items."""
    # The prediction, and its softmax probability: scores relative to the largest, which itself becomes exp(0) = 1.
    rows_b = np.arange(len(scores_bC))
    predicted_b = scores_bC.argmax(axis=1)
    relative_bC = scale * (scores_bC - scores_bC[rows_b, predicted_b][:, None])
    confidence_b = 1 / np.exp(relative_bC).sum(axis=1)

    # The best score of an item's own labels against those of all other classes.
    known_bL = labels_bL != NO_LABEL
    own_b = np.where(known_bL, scores_bC[rows_b[:, None], labels_bL], -np.inf).max(axis=1)
    others_bC = scores_bC.copy()
    row, column = np.nonzero(known_bL)
    others_bC[row, labels_bL[row, column]] = -np.inf
    optimistic_b = (others_bC > own_b[:, None] + TIE).sum(axis=1)
    pessimistic_b = (others_bC >= own_b[:, None] - TIE).sum(axis=1)
    unlabelled_b = ~known_bL.any(axis=1)
    optimistic_b[unlabelled_b] = NO_POSITIVE
    pessimistic_b[unlabelled_b] = NO_POSITIVE
    return predicted_b, confidence_b.astype(np.float32), optimistic_b, pessimistic_b


def accuracies(predictions: ScoredPredictions, labels_NL: Ints, top: Sequence[int] = TOP_KS) -> dict[str, float]:
    """Return accuracies in 0..1 by name; those over items count the labelled ones.

    `top<k>`: a label is among the k best classes, for each k of `top` that is below the number of classes. Of
    several labels any one will do, as in ImageNet-ReaL (Beyer et al., 2020). `top1_optimistic`: the same for k = 1 with
    every tie won. `mean_per_class`: the mean of the accuracies of the classes that have items, where an item with
    several labels counts in each of its classes.

    Raises:
        ValueError: If no item has a label.
    """
    labelled_N = predictions.labelled_N
    if not labelled_N.any():
        raise ValueError(f"none of {len(labelled_N)} items has a label: check the label field and the class subset")
    values = {}
    for k in telling_ks(predictions.classes, top):
        values[f"top{k}"] = float(predictions.correct_N(k)[labelled_N].mean())
    values["top1_optimistic"] = float((predictions.optimistic_N[labelled_N] < 1).mean())
    item, column = np.nonzero(labels_NL != NO_LABEL)
    label = labels_NL[item, column]
    items_C = np.bincount(label, minlength=predictions.classes)
    correct_C = np.bincount(label, weights=predictions.correct_N()[item], minlength=predictions.classes)
    present_C = items_C > 0
    values["mean_per_class"] = float((correct_C[present_C] / items_C[present_C]).mean())
    return values


def mean_average_precision(scores_NC: Floats, labels_NL: Ints) -> float:
    """Return the mean, over the classes that have items, of the average precision of finding their items, in 0..1.

    Raises:
        ValueError: If no item has a label, or a score is not finite.
    """
    values = []
    for label in range(scores_NC.shape[1]):
        positive_N = (labels_NL == label).any(axis=1)
        if positive_N.all():
            values.append(1.0)
        elif positive_N.any():
            values.append(ThresholdCurve.from_scores(scores_NC[:, label], positive_N).average_precision)
    if not values:
        raise ValueError(f"none of {len(labels_NL)} items has a label: check the label field and the class subset")
    return float(np.mean(values))


@dataclass(frozen=True)
class Reliability:
    """Calibration in K bins of equal confidence width: predictions, mean confidence and accuracy of each.

    The means of an empty bin are NaN.
    """

    count_K: Ints
    confidence_K: NDArray[np.float64]
    accuracy_K: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error, Σ_k n_k/N |accuracy_k - confidence_k| (Guo et al., 2017, eq. 3)."""
        gap_K = np.where(self.count_K > 0, np.abs(self.accuracy_K - self.confidence_K), 0)
        return float(self.count_K @ gap_K / self.count_K.sum())


def reliability(confidence_N: Floats, correct_N: NDArray[np.bool_], bins: int = 15) -> Reliability:
    """Return the calibration of predictions with confidences in (0, 1], in bins that include their upper edge.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

    Raises:
        ValueError: For no predictions, or for lengths that differ.
    """
    if len(confidence_N) == 0 or len(confidence_N) != len(correct_N):
        raise ValueError(
            f"got {len(confidence_N)} confidences and {len(correct_N)} outcomes: expected one of each an item"
        )
    bin_N = np.clip(np.ceil(np.asarray(confidence_N, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    count_K = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence_K = np.bincount(bin_N, weights=confidence_N, minlength=bins) / count_K
        accuracy_K = np.bincount(bin_N, weights=correct_N, minlength=bins) / count_K
    return Reliability(count_K, confidence_K, accuracy_K)

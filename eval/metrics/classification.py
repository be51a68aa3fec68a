"""What classification scores are worth: ranks of the true labels that are safe under ties, accuracies, calibration."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.metrics.binary_scores import Curve
from threetowers.eval.metrics.retrieval_ranks import NO_POSITIVE, TIE

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

NO_LABEL = -1  # pads the labels of items that have fewer than others
TOP = (1, 5)


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of C classes, x W + b: class embeddings, a ridge probe and a logistic probe are all of this form."""

    weight_DC: Floats
    bias_C: Floats | None = None

    def scores(self, x_ND: Floats, block: int = 4096) -> Iterator[Floats]:
        """Blocks of scores (≤ block, C) float32, in the order of the items: N x C need not fit into memory."""
        for start in range(0, len(x_ND), block):
            scores_bC = np.asarray(x_ND[start : start + block], np.float32) @ self.weight_DC
            yield scores_bC if self.bias_C is None else scores_bC + self.bias_C


@dataclass(frozen=True)
class Judgement:
    """What a classifier said of each item, against its labels.

    `predicted_N`: the class with the largest score. `confidence_N`: its softmax probability. `optimistic_N` counts the
    wrong classes that score higher than the item's best label, `pessimistic_N` also those that score the same; both are
    `NO_POSITIVE` for an item without a label, which no accuracy counts.
    """

    predicted_N: Ints
    confidence_N: Floats
    optimistic_N: Ints
    pessimistic_N: Ints
    classes: int

    @property
    def labelled_N(self) -> NDArray[np.bool_]:
        """Items with at least one label."""
        return np.not_equal(self.pessimistic_N, NO_POSITIVE)

    def correct_N(self, k: int = 1) -> NDArray[np.bool_]:
        """Whether a label is among the k best classes; ties count against the model."""
        return self.labelled_N & (self.pessimistic_N < k)


def label_matrix(labels: Sequence[Sequence[int]], classes: int) -> Ints:
    """The labels (N, most labels of an item), padded with `NO_LABEL`. Raises ValueError for one beyond the classes."""
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


def judge(scores: Iterable[Floats], labels_NL: Ints, *, scale: float = 1.0) -> Judgement:
    """Compare blocks of scores (b, C), in order, with the labels of all items (see `label_matrix`).

    `scale` multiplies the scores before the softmax that gives the confidence. Scores less than 1e-6 apart count as
    equal: a product in float32 is no more exact than that. Raises ValueError for scores that are not finite or for
    other items than there are labels.
    """
    parts = []
    start = classes = 0
    for scores_bC in scores:
        labels_bL = labels_NL[start : start + len(scores_bC)]
        if len(labels_bL) != len(scores_bC):
            break
        if not np.isfinite(scores_bC).all():
            row = int((~np.isfinite(scores_bC)).any(axis=1).argmax())
            raise ValueError(f"the scores of item {start + row} hold NaN or infinity: find what produced its embedding")
        parts.append(_judge_block(scores_bC, labels_bL, scale))
        classes = scores_bC.shape[1]
        start += len(scores_bC)
    else:
        if start == len(labels_NL) and parts:
            predicted_N, confidence_N, optimistic_N, pessimistic_N = map(np.concatenate, zip(*parts, strict=True))
            return Judgement(predicted_N, confidence_N, optimistic_N, pessimistic_N, classes)
    raise ValueError(f"got scores of another number of items than the {len(labels_NL)} that have labels")


def _judge_block(scores_bC: Floats, labels_bL: Ints, scale: float) -> tuple[Ints, Floats, Ints, Ints]:
    rows = np.arange(len(scores_bC))
    predicted_b = scores_bC.argmax(axis=1)
    shifted = scale * (scores_bC - scores_bC[rows, predicted_b][:, None])
    confidence_b = 1 / np.exp(shifted).sum(axis=1)
    known_bL = labels_bL != NO_LABEL
    own_b = np.where(known_bL, scores_bC[rows[:, None], labels_bL], -np.inf).max(axis=1)
    others_bC = scores_bC.copy()
    item, column = np.nonzero(known_bL)
    others_bC[item, labels_bL[item, column]] = -np.inf
    missing_b = ~known_bL.any(axis=1)
    better = [(others_bC > own_b[:, None] + TIE), (others_bC >= own_b[:, None] - TIE)]
    optimistic_b, pessimistic_b = (np.where(missing_b, NO_POSITIVE, b.sum(axis=1)) for b in better)
    return predicted_b, confidence_b.astype(np.float32), optimistic_b, pessimistic_b


def accuracies(judged: Judgement, labels_NL: Ints, top: Sequence[int] = TOP) -> dict[str, float]:
    """`top1`, `top5` (where there are as many classes), `top1_optimistic` with every tie won, and `mean_per_class`.

    With several labels an item counts as correct if any of them is found, as in ImageNet-ReaL (Beyer et al., 2020).
    `mean_per_class` is the mean of each class's accuracy over the classes that have items; with several labels an item
    counts in each of its classes. Raises ValueError if no item has a label.
    """
    labelled = judged.labelled_N
    if not labelled.any():
        raise ValueError(f"none of {len(labelled)} items has a label: check the label field and the class subset")
    values = {f"top{k}": float(judged.correct_N(k)[labelled].mean()) for k in top if k <= judged.classes}
    values["top1_optimistic"] = float((judged.optimistic_N[labelled] < 1).mean())
    item, column = np.nonzero(labels_NL != NO_LABEL)
    label = labels_NL[item, column]
    size_C = np.bincount(label, minlength=judged.classes)
    right_C = np.bincount(label, weights=judged.correct_N()[item], minlength=judged.classes)
    values["mean_per_class"] = float((right_C[size_C > 0] / size_C[size_C > 0]).mean())
    return values


def mean_average_precision(scores_NC: Floats, labels_NL: Ints) -> float:
    """The mean over classes of the average precision of finding a class's items; classes without items do not count."""
    values = []
    for number in range(scores_NC.shape[1]):
        positive_N = (labels_NL == number).any(axis=1)
        if positive_N.all():
            values.append(1.0)
        elif positive_N.any():
            values.append(Curve.of(scores_NC[:, number], positive_N).average_precision)
    if not values:
        raise ValueError(f"none of {len(labels_NL)} items has a label: check the label field and the class subset")
    return float(np.mean(values))


@dataclass(frozen=True)
class Reliability:
    """How often predictions of a given confidence are right, in bins of equal width; NaN where a bin is empty."""

    count_K: Ints
    confidence_K: NDArray[np.float64]
    accuracy_K: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error, Σ_k n_k/N |accuracy_k - confidence_k| (Guo et al., 2017, eq. 3)."""
        gap_K = np.where(self.count_K > 0, np.abs(self.accuracy_K - self.confidence_K), 0)
        return float(self.count_K @ gap_K / self.count_K.sum())


def reliability(confidence_N: Floats, correct_N: NDArray[np.bool_], bins: int = 15) -> Reliability:
    """Bin predictions by confidence in (0, 1]; a bin holds its upper edge, as in the paper."""
    if len(confidence_N) == 0 or len(confidence_N) != len(correct_N):
        raise ValueError(f"got {len(confidence_N)} confidences and {len(correct_N)} outcomes: pass one of each an item")
    bin_N = np.clip(np.ceil(np.asarray(confidence_N, np.float64) * bins).astype(int) - 1, 0, bins - 1)
    count_K = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bin_N, weights=w, minlength=bins) / count_K for w in (confidence_N, correct_N)]
    return Reliability(count_K, *means)

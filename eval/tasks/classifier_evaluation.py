"""The evaluation of a linear classifier on a part of a data set: shared by zero-shot, shift and the logistic probe."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import DatasetPart
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import (
    TOP_KS,
    Ints,
    LinearClassifier,
    ScoredPredictions,
    accuracies,
    mean_average_precision,
    reliability,
    score_predictions,
    telling_ks,
)
from threetowers.eval.record import EvalResult, ItemArrays


def embed_part(encoder: Encoder, part: DatasetPart) -> Embeddings:
    """Return the unit-norm embeddings (n, dim) of a part's images; all images of its tars are embedded together."""
    return np.asarray(encoder.images(part.data, part.data.images)[part.rows])


def part_features(encoder: Encoder, part: DatasetPart) -> Embeddings:
    """Return the image tower's output (n, width) for a part's images, before heads and normalisation."""
    return np.asarray(encoder.features(part.data, part.data.images)[part.rows])


def evaluate_classifier(
    classifier: LinearClassifier, x_ND: Embeddings, part: DatasetPart, scale: float = 1.0
) -> EvalResult:
    """Return the accuracies and the calibration of a classifier among the candidate classes of a part.

    Args:
        classifier: Scores all classes of the data set.
        x_ND: Its inputs, for each image of the part.
        part: The images with their labels.
        scale: Inverse temperature of the softmax that gives the confidence.

    Returns:
        `top1`, `top5`, `top1_optimistic`, `mean_per_class`, `calibration_error`, and with several labels per image
        `mean_average_precision`; for each image whether it is right (NaN for one without a label, which accuracies
        leave out), its confidence, prediction and labels.
    """
    labels_NL = _candidate_labels(part)
    judged = score_part(classifier, x_ND, part, scale)
    metrics = accuracies(judged, labels_NL, TOP_KS)
    labelled_N = judged.labelled_N
    metrics["calibration_error"] = reliability(judged.confidence_N[labelled_N], judged.correct_N()[labelled_N]).error
    if part.multi_label:
        scores_NC = np.concatenate(list(_candidates_only(classifier, part).scores(x_ND)))
        metrics["mean_average_precision"] = mean_average_precision(scores_NC, labels_NL)

    items: dict[str, NDArray[Any]] = {}
    for k in telling_ks(judged.classes):
        items[f"top{k}"] = np.where(labelled_N, judged.correct_N(k), np.nan).astype(np.float32)
    items["confidence"] = judged.confidence_N
    items["predicted"] = part.candidate_classes[judged.predicted_N]
    items["label"] = part.labels_NL
    items |= group_items(part)

    tied = int((judged.optimistic_N != judged.pessimistic_N).sum())
    return EvalResult(metrics, part_counts(part) | {"tied": tied}, items)


def score_part(
    classifier: LinearClassifier, x_ND: Embeddings, part: DatasetPart, scale: float = 1.0
) -> ScoredPredictions:
    """Return the predictions among the candidate classes of a part, as numbers within these."""
    return score_predictions(_candidates_only(classifier, part).scores(x_ND), _candidate_labels(part), scale=scale)


def restrict_classes(part: DatasetPart, classes: Ints) -> DatasetPart:
    """Return the part's images of some classes, with only these as candidates. Raises ValueError where none is left."""
    labels_NL = np.where(np.isin(part.labels_NL, classes), part.labels_NL, -1)
    kept_N = (labels_NL >= 0).any(axis=1)
    if not kept_N.any():
        raise ValueError(f"none of {len(part.rows)} original images is of the shifted part's {len(classes)} classes")
    return replace(part, labels_NL=labels_NL, candidate_classes=classes).select(kept_N)


def group_items(part: DatasetPart) -> ItemArrays:
    """Return the array that tells which images are drawn together in a bootstrap, if there is one."""
    return {} if part.group_N is None else {"group": part.group_N}


def part_counts(part: DatasetPart) -> dict[str, int]:
    """Return the numbers of images and candidate classes, and notes on the images."""
    return {"images": len(part.rows), "classes": len(part.candidate_classes), **part.notes}


def with_prefix(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values under the names `<prefix>/<name>`."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _candidates_only(classifier: LinearClassifier, part: DatasetPart) -> LinearClassifier:
    bias_C = None if classifier.bias_C is None else classifier.bias_C[part.candidate_classes]
    return LinearClassifier(classifier.weight_DC[:, part.candidate_classes], bias_C)


def _candidate_labels(part: DatasetPart) -> Ints:
    """Return the labels (n, L) as positions within the candidate classes."""
    return np.where(part.labels_NL < 0, part.labels_NL, np.searchsorted(part.candidate_classes, part.labels_NL))

"""Robustness: accuracy or retrieval on shifted versions of a data set, compared with the original."""

from typing import Any

from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import accuracies
from threetowers.eval.metrics.recall import evaluate_retrieval
from threetowers.eval.record import EvalResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.classifier_evaluation import (
    embed_part,
    evaluate_classifier,
    restrict_classes,
    score_part,
    with_prefix,
)
from threetowers.eval.tasks.retrieval import DIRECTION_NAMES, Gallery
from threetowers.eval.tasks.settings import RetrievalSettings, ShiftSettings
from threetowers.eval.tasks.zeroshot import zero_shot_classifier

ORIGINAL = "original"
COMPARED = ("top1", "top5", "mean_per_class")


def shift(encoder: Encoder, dataset: EvalDataset, settings: ShiftSettings, thumbnails: ThumbnailStore) -> EvalResult:
    """Return the metrics of the original and of each shifted version, and the drop from one to the other.

    `<version>/top1_drop` is the original's accuracy less the version's. Where a version has fewer classes, the original
    is classified among these alone (`<version>/top1_original`), and the drop is from there. With `of: retrieval` it is
    the drop in recall@1.
    """
    if settings.of == "retrieval":
        return _retrieval_shift(encoder, dataset, settings.retrieval)
    classifier = zero_shot_classifier(encoder, dataset)
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    items: dict[str, NDArray[Any]] = {}
    for name, part in {ORIGINAL: dataset.test, **dataset.shifted}.items():
        result = evaluate_classifier(classifier, embed_part(encoder, part), part, scale=encoder.logit_scale)
        metrics |= with_prefix(name, result.metrics)
        counts |= with_prefix(name, result.counts)
        items |= with_prefix(name, result.items)
        if name == ORIGINAL:
            continue
        same = restrict_classes(dataset.test, part.candidate_classes)
        judged = score_part(classifier, embed_part(encoder, same), same)
        original = accuracies(judged, same.labels_NL)
        for key in COMPARED:
            if key in original:
                metrics[f"{name}/{key}_original"] = original[key]
                metrics[f"{name}/{key}_drop"] = original[key] - result.metrics[key]
    return EvalResult(metrics, counts, items)


def _retrieval_shift(encoder: Encoder, dataset: EvalDataset, settings: RetrievalSettings) -> EvalResult:
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    items: dict[str, NDArray[Any]] = {}
    for name, part in {ORIGINAL: dataset.test, **dataset.shifted}.items():
        gallery = Gallery.of(part, settings)
        found = evaluate_retrieval(
            encoder.images(part.data, gallery.images),
            encoder.texts(gallery.captions),
            gallery.image_group_N,
            gallery.text_group_M,
        )
        metrics |= with_prefix(name, found.metrics())
        counts |= with_prefix(name, found.counts())
        items |= with_prefix(name, found.items())
        if name == ORIGINAL:
            continue
        for direction in DIRECTION_NAMES:
            key = f"{direction}/recall@1"
            metrics[f"{name}/{key}_drop"] = metrics[f"{ORIGINAL}/{key}"] - metrics[f"{name}/{key}"]
    return EvalResult(metrics, counts, items)


def fit_shift(dataset: EvalDataset, settings: ShiftSettings) -> tuple[ShiftSettings, list[str]]:
    """Return the settings as they are. Raises ValueError for a version without an original of its classes."""
    if settings.of == "zeroshot":
        for part in dataset.shifted.values():
            restrict_classes(dataset.test, part.candidate_classes)
    return settings, []

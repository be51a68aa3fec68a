"""Few-shot classification: ridge probes on the image tower's features of a few images per class."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import accuracies, score_predictions
from threetowers.eval.metrics.ridge_probe import SHOTS, check_supports, few_shot_probes
from threetowers.eval.record import EvalResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.classifier_evaluation import group_items, part_counts, part_features, with_prefix
from threetowers.eval.tasks.settings import FewShotSettings


def fewshot(
    encoder: Encoder, dataset: EvalDataset, settings: FewShotSettings, thumbnails: ThumbnailStore
) -> EvalResult:
    """Return for k shots `<k>-shot/top1`, the mean over seeds, its deviation, and that of each seed."""
    train = dataset.train_part
    test = dataset.test
    all_shots = settings.shots or list(SHOTS)
    probes = few_shot_probes(
        part_features(encoder, train),
        train.label_N,
        len(dataset.class_names),
        all_shots,
        settings.seeds,
        settings.l2,
    )

    # Score each probe on all test images.
    test_ND = part_features(encoder, test)
    unlabelled_N = ~(test.labels_NL >= 0).any(axis=1)
    correct: dict[int, list[NDArray[np.float64]]] = {shots: [] for shots in all_shots}
    per_class: dict[int, list[float]] = {shots: [] for shots in all_shots}
    for probe in probes:
        judged = score_predictions(probe.classifier.scores(test_ND), test.labels_NL)
        correct[probe.shots].append(np.where(unlabelled_N, np.nan, judged.correct_N()))
        per_class[probe.shots].append(accuracies(judged, test.labels_NL)["mean_per_class"])

    # Average over seeds.
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[Any]] = {}
    for shots, correct_by_seed in correct.items():
        accuracy_by_seed = [float(np.nanmean(correct_N)) for correct_N in correct_by_seed]
        metrics[f"{shots}-shot/top1"] = float(np.mean(accuracy_by_seed))
        metrics[f"{shots}-shot/top1_deviation"] = float(np.std(accuracy_by_seed))
        metrics[f"{shots}-shot/mean_per_class"] = float(np.mean(per_class[shots]))
        for seed, accuracy in zip(settings.seeds, accuracy_by_seed, strict=True):
            metrics[f"{shots}-shot/top1_seed{seed}"] = accuracy
        items |= with_prefix(f"{shots}-shot", {"top1": np.mean(correct_by_seed, axis=0), **group_items(test)})
    return EvalResult(metrics, part_counts(test) | {"train_images": len(train.rows)}, items)


def fit_fewshot(dataset: EvalDataset, settings: FewShotSettings) -> tuple[FewShotSettings, list[str]]:
    """Return settings for as many shots as every class has training images, and what was left out for that.

    Raises:
        ValueError: Where a class has fewer training images than the settings' shots, or none.
    """
    label_N = dataset.train_part.label_N
    classes = len(dataset.class_names)
    smallest = int(np.bincount(label_N, minlength=classes).min())
    shots = settings.shots or [shots for shots in SHOTS if shots <= max(smallest, min(SHOTS))]
    check_supports(label_N, classes, shots)
    left = [k for k in SHOTS if k > smallest] if settings.shots is None else []
    notes = [f"no {k} shots, as the smallest class has {smallest} training images" for k in left]
    return replace(settings, shots=shots), notes

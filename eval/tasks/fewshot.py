"""Few-shot classification: ridge probes on the image tower's features of a few images per class."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import accuracies, score_predictions
from threetowers.eval.metrics.ridge_probe import check_supports, few_shot_probes
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
    probes = few_shot_probes(
        part_features(encoder, train),
        train.label_N,
        len(dataset.class_names),
        settings.shots,
        settings.seeds,
        settings.l2,
    )

    # Score each probe on all test images.
    test_ND = part_features(encoder, test)
    correct: dict[int, list[NDArray[np.bool_]]] = {shots: [] for shots in settings.shots}
    per_class: dict[int, list[float]] = {shots: [] for shots in settings.shots}
    for probe in probes:
        judged = score_predictions(probe.classifier.scores(test_ND), test.labels_NL)
        correct[probe.shots].append(judged.correct_N())
        per_class[probe.shots].append(accuracies(judged, test.labels_NL)["mean_per_class"])

    # Average over seeds.
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[Any]] = {}
    for shots, correct_by_seed in correct.items():
        accuracy_by_seed = [float(correct_N.mean()) for correct_N in correct_by_seed]
        metrics[f"{shots}-shot/top1"] = float(np.mean(accuracy_by_seed))
        metrics[f"{shots}-shot/top1_deviation"] = float(np.std(accuracy_by_seed))
        metrics[f"{shots}-shot/mean_per_class"] = float(np.mean(per_class[shots]))
        for seed, accuracy in zip(settings.seeds, accuracy_by_seed, strict=True):
            metrics[f"{shots}-shot/top1_seed{seed}"] = accuracy
        items |= with_prefix(f"{shots}-shot", {"top1": np.mean(correct_by_seed, axis=0), **group_items(test)})
    return EvalResult(metrics, part_counts(test) | {"train_images": len(train.rows)}, items)


def check_fewshot(dataset: EvalDataset, settings: FewShotSettings) -> None:
    """Raise ValueError where a class has fewer training images than shots."""
    check_supports(dataset.train_part.label_N, len(dataset.class_names), settings.shots)

"""Logistic regression on the image tower's features of all training images."""

from dataclasses import replace

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.linear_probe import check_classes, linear_probe
from threetowers.eval.record import EvalResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.classifier_evaluation import evaluate_classifier, part_features
from threetowers.eval.tasks.settings import ProbeSettings


def probe(encoder: Encoder, dataset: EvalDataset, settings: ProbeSettings, thumbnails: ThumbnailStore) -> EvalResult:
    """Return the metrics of `evaluate_classifier`, and the penalty that is best on held-out training images."""
    train = dataset.train_part
    fitted = linear_probe(
        part_features(encoder, train), train.label_N, len(dataset.class_names), settings.penalties, seed=settings.seed
    )
    result = evaluate_classifier(fitted.classifier, part_features(encoder, dataset.test), dataset.test)
    metrics = {**result.metrics, "penalty": fitted.penalty, "gradient": fitted.gradient}
    for penalty, accuracy in fitted.held_out_accuracy.items():
        metrics[f"held_out_top1@{penalty:g}"] = accuracy
    return replace(result, metrics=metrics, counts={**result.counts, "train_images": len(train.rows)})


def fit_probe(dataset: EvalDataset, settings: ProbeSettings) -> tuple[ProbeSettings, list[str]]:
    """Return the settings as they are. Raises ValueError where a class has no training image."""
    check_classes(dataset.train_part.label_N, len(dataset.class_names))
    return settings, []

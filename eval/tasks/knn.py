"""Classification by the nearest training images, by cosine of unit-norm embeddings."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import accuracies, score_predictions
from threetowers.eval.metrics.neighbour_votes import check_neighbours, neighbour_votes
from threetowers.eval.record import EvalResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.classifier_evaluation import embed_part, group_items, part_counts, with_prefix
from threetowers.eval.tasks.settings import KnnSettings


def knn(encoder: Encoder, dataset: EvalDataset, settings: KnnSettings, thumbnails: ThumbnailStore) -> EvalResult:
    """Return `<rule>@<k>/top1` and `<rule>@<k>/mean_per_class`, for majority and for weighted votes."""
    train = dataset.train_part
    test = dataset.test
    votes = neighbour_votes(
        embed_part(encoder, train),
        train.label_N,
        embed_part(encoder, test),
        len(dataset.class_names),
        settings.ks,
        temperature=settings.temperature,
    )
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[Any]] = {}
    for rule, votes_NC in votes.items():
        judged = score_predictions([votes_NC], test.labels_NL)
        accuracy = accuracies(judged, test.labels_NL)
        metrics[f"{rule}/top1"] = accuracy["top1"]
        metrics[f"{rule}/mean_per_class"] = accuracy["mean_per_class"]
        items |= with_prefix(rule, {"top1": judged.correct_N().astype(np.float32), **group_items(test)})
    return EvalResult(metrics, part_counts(test) | {"train_images": len(train.rows)}, items)


def check_knn(dataset: EvalDataset, settings: KnnSettings) -> None:
    """Raise ValueError for more neighbours than training images."""
    check_neighbours(settings.ks, len(dataset.train_part.label_N))

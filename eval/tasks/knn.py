"""Classification by the nearest training images, by cosine of unit-norm embeddings."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import accuracies, score_predictions
from threetowers.eval.metrics.neighbour_votes import NEIGHBOUR_KS, check_neighbours, neighbour_votes
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
        settings.ks or NEIGHBOUR_KS,
        temperature=settings.temperature,
        device=encoder.search_device,
    )
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[Any]] = {}
    for rule, votes_NC in votes.items():
        judged = score_predictions([votes_NC], test.labels_NL)
        accuracy = accuracies(judged, test.labels_NL)
        metrics[f"{rule}/top1"] = accuracy["top1"]
        metrics[f"{rule}/mean_per_class"] = accuracy["mean_per_class"]
        right_N = np.where(judged.labelled_N, judged.correct_N(), np.nan).astype(np.float32)
        items |= with_prefix(rule, {"top1": right_N, **group_items(test)})
    return EvalResult(metrics, part_counts(test) | {"train_images": len(train.rows)}, items)


def fit_knn(dataset: EvalDataset, settings: KnnSettings) -> tuple[KnnSettings, list[str]]:
    """Return settings for as many neighbours as there are training images, and what was left out for that.

    Raises:
        ValueError: For a k of the settings beyond the training images.
    """
    images = len(dataset.train_part.label_N)
    if settings.ks is not None:
        check_neighbours(settings.ks, images)
        return settings, []
    ks = [k for k in NEIGHBOUR_KS if k <= images]
    notes = [f"no k of {k}, as there are {images} training images" for k in NEIGHBOUR_KS if k > images]
    return replace(settings, ks=ks), notes

"""Out-of-distribution detection: the images of a data set are told from outliers by a score."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.dataset import DatasetPart, EvalDataset
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.neighbour_votes import check_neighbours
from threetowers.eval.metrics.outlier_scores import Mahalanobis, class_scores, detection_metrics, neighbour_score
from threetowers.eval.record import EvalResult
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.classifier_evaluation import embed_part, part_counts, with_prefix
from threetowers.eval.tasks.settings import OodSettings
from threetowers.eval.tasks.zeroshot import zero_shot_classifier

NEIGHBOUR = 50


def ood(encoder: Encoder, dataset: EvalDataset, settings: OodSettings, thumbnails: ThumbnailStore) -> EvalResult:
    """Return `<outliers>/<score>/auroc` and so on for each part of outliers, see `detection_metrics`.

    Without a text tower, or without prompts, there are the k-NN and Mahalanobis scores only.
    """
    train = dataset.train_part
    train_MD = embed_part(encoder, train)
    k = settings.k or min(NEIGHBOUR, len(train_MD))
    mahalanobis = Mahalanobis.fit(train_MD, train.label_N)
    classifier = zero_shot_classifier(encoder, dataset) if encoder.sees_text and dataset.templates else None

    def scores(part: DatasetPart) -> dict[str, NDArray[np.float64]]:
        x_ND = embed_part(encoder, part)
        nearness_N = neighbour_score(train_MD, x_ND, k, device=encoder.search_device)
        found = {"knn": nearness_N, "mahalanobis": mahalanobis.score(x_ND)}
        if classifier is not None:
            blocks = [class_scores(cosine_bC, encoder.logit_scale) for cosine_bC in classifier.scores(x_ND)]
            for name in blocks[0]:
                found[name] = np.concatenate([block[name] for block in blocks])
        return found

    inside = scores(dataset.test)
    metrics: dict[str, float] = {}
    counts = part_counts(dataset.test) | {"train_images": len(train.rows), "mahalanobis_rank": mahalanobis.rank}
    items: dict[str, NDArray[Any]] = {f"inside/{name}": score_N for name, score_N in inside.items()}
    for outliers, part in dataset.outliers.items():
        counts[f"{outliers}/images"] = len(part.rows)
        for name, score_M in scores(part).items():
            metrics |= with_prefix(f"{outliers}/{name}", detection_metrics(inside[name], score_M))
            items[f"{outliers}/{name}"] = score_M
    return EvalResult(metrics, counts, items)


def fit_ood(dataset: EvalDataset, settings: OodSettings) -> tuple[OodSettings, list[str]]:
    """Return settings with a neighbour that there is, and how it differs from the usual one.

    Raises:
        ValueError: For a neighbour of the settings beyond the training images.
    """
    images = len(dataset.train_part.label_N)
    if settings.k is not None:
        check_neighbours([settings.k], images)
        return settings, []
    k = min(NEIGHBOUR, images)
    notes = [f"k of {k} instead of {NEIGHBOUR}, as there are {images} training images"] if k < NEIGHBOUR else []
    return replace(settings, k=k), notes

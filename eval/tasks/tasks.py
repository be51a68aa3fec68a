"""The tasks of a described set: each turns an encoder and an open set into an answer.

Zero-shot, neighbours and outlier scores use the unit-norm embeddings; the probes use the image tower's own features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.datasets.config import FewShot, Neighbours, Outliers, Probe, Retrieval, Settings, Shift, ZeroShot
from threetowers.eval.datasets.dataset import OpenSet, Part, as_gallery
from threetowers.eval.datasets.gallery import Gallery, encoded, galleries_of
from threetowers.eval.datasets.prompts import ensemble, fill
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import (
    Floats,
    Ints,
    LinearClassifier,
    ScoredPredictions,
    accuracies,
    mean_average_precision,
    reliability,
    score_predictions,
)
from threetowers.eval.metrics.linear_probe import check_classes, linear_probe
from threetowers.eval.metrics.neighbour_votes import check_neighbours, neighbour_votes
from threetowers.eval.metrics.outlier_scores import Mahalanobis, class_scores, detection_metrics, neighbour_score
from threetowers.eval.metrics.recall import evaluate_retrieval
from threetowers.eval.metrics.ridge_probe import check_supports, few_shot_probes
from threetowers.eval.record import EvalResult, Example, Items, Shown
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.gallery_search import GallerySearch

ORIGINAL = "original"
TOP = (1, 5)
SHOWN = 5  # classes in an example


@dataclass(frozen=True)
class Showing:
    """Which examples a reader is shown: so many of each kind, their pictures kept in the album."""

    thumbnails: ThumbnailStore
    examples: int = 6
    seed: int = 0


def zeroshot(encoder: Encoder, opened: OpenSet, settings: ZeroShot, show: Showing) -> EvalResult:
    """Classify by the nearest class embedding: `top1`, `top5`, `mean_per_class`, and `calibration_error` at the scale.

    With several labels a picture, a hit on any counts, and `mean_average_precision` is given too.
    """
    classifier, x_ND = zero_shot_classifier(encoder, opened), images(encoder, opened.test)
    answer = _classified(classifier, x_ND, opened.test, scale=encoder.logit_scale)
    return replace(answer, examples=_class_examples(classifier, x_ND, opened, answer.items, show))


def zero_shot_classifier(encoder: Encoder, opened: OpenSet) -> LinearClassifier:
    """The mean of each class's prompts as a classifier of unit-norm image embeddings."""
    prompts = encoder.texts(fill(opened.templates, opened.names))
    return LinearClassifier(np.ascontiguousarray(ensemble(prompts, len(opened.names)).T))


def fewshot(encoder: Encoder, opened: OpenSet, settings: FewShot, show: Showing) -> EvalResult:
    """Ridge probes on a few pictures a class: `<k>-shot/top1`, the mean over seeds; its deviation, and each seed's."""
    learn = _learn(opened)
    train_MD, test_ND = features(encoder, learn), features(encoder, opened.test)
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[Any]] = {}
    right: dict[int, list[NDArray[np.bool_]]] = {shots: [] for shots in settings.shots}
    per_class: dict[int, list[float]] = {shots: [] for shots in settings.shots}
    for found in few_shot_probes(
        train_MD, learn.label_N, len(opened.names), settings.shots, settings.seeds, settings.l2
    ):
        judged = score_predictions(found.classifier.scores(test_ND), opened.test.labels_NL)
        right[found.shots].append(judged.correct_N())
        per_class[found.shots].append(accuracies(judged, opened.test.labels_NL)["mean_per_class"])
    for shots, correct in right.items():
        by_seed = [float(one.mean()) for one in correct]
        metrics[f"{shots}-shot/top1"] = float(np.mean(by_seed))
        metrics[f"{shots}-shot/top1_deviation"] = float(np.std(by_seed))
        metrics[f"{shots}-shot/mean_per_class"] = float(np.mean(per_class[shots]))
        metrics |= {f"{shots}-shot/top1_seed{seed}": value for seed, value in zip(settings.seeds, by_seed, strict=True)}
        items |= _prefixed(f"{shots}-shot", {"top1": np.mean(correct, axis=0), **_units(opened.test)})
    return EvalResult(metrics, _counts(opened.test) | {"learned_from": len(learn.rows)}, items)


def probe(encoder: Encoder, opened: OpenSet, settings: Probe, show: Showing) -> EvalResult:
    """A logistic probe on all training pictures, its penalty chosen on some of them; metrics as of `zeroshot`."""
    learn = _learn(opened)
    found = linear_probe(
        features(encoder, learn), learn.label_N, len(opened.names), settings.penalties, seed=settings.seed
    )
    answer = _classified(found.classifier, features(encoder, opened.test), opened.test)
    tried = {f"held_out_top1@{penalty:g}": value for penalty, value in found.held_out_accuracy.items()}
    chosen = {"penalty": found.penalty, "gradient": found.gradient}
    return EvalResult(
        {**answer.metrics, **chosen, **tried}, {**answer.counts, "learned_from": len(learn.rows)}, answer.items
    )


def knn(encoder: Encoder, opened: OpenSet, settings: Neighbours, show: Showing) -> EvalResult:
    """Votes of the nearest training pictures: `<rule>@<k>/top1` and `/mean_per_class`."""
    learn = _learn(opened)
    votes = neighbour_votes(
        images(encoder, learn),
        learn.label_N,
        images(encoder, opened.test),
        len(opened.names),
        settings.ks,
        temperature=settings.temperature,
    )
    metrics: dict[str, float] = {}
    items: dict[str, NDArray[Any]] = {}
    for rule, votes_NC in votes.items():
        judged = score_predictions([votes_NC], opened.test.labels_NL)
        found = accuracies(judged, opened.test.labels_NL)
        metrics |= {f"{rule}/{key}": found[key] for key in ("top1", "mean_per_class")}
        items |= _prefixed(rule, {"top1": judged.correct_N().astype(np.float32), **_units(opened.test)})
    return EvalResult(metrics, _counts(opened.test) | {"learned_from": len(learn.rows)}, items)


def shift(encoder: Encoder, opened: OpenSet, settings: Shift, show: Showing) -> EvalResult:
    """Each shifted version beside the original: `<version>/top1`, and `<version>/top1_drop` from the original's.

    Where a version has fewer classes, the original is classified into these alone (`<version>/top1_original`), and the
    drop is from there.
    """
    if settings.of == "retrieval":
        return _retrieval_shift(encoder, opened, settings.retrieval)
    classifier = zero_shot_classifier(encoder, opened)
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    items: dict[str, NDArray[Any]] = {}
    for name, part in {ORIGINAL: opened.test, **opened.shifted}.items():
        answer = _classified(classifier, images(encoder, part), part, scale=encoder.logit_scale)
        metrics |= _prefixed(name, answer.metrics)
        counts |= _prefixed(name, answer.counts)
        items |= _prefixed(name, answer.items)
        if name == ORIGINAL:
            continue
        same = _restricted(opened.test, part.told_apart)
        before = accuracies(_judged(classifier, images(encoder, same), same), same.labels_NL)
        for key in before.keys() & {"top1", "top5", "mean_per_class"}:
            metrics[f"{name}/{key}_original"] = before[key]
            metrics[f"{name}/{key}_drop"] = before[key] - answer.metrics[key]
    return EvalResult(metrics, counts, items)


def retrieval(encoder: Encoder, opened: OpenSet, settings: Retrieval, show: Showing) -> EvalResult:
    """Recalls from exact ranks, both ways, between the set's pictures and their captions."""
    gallery, image_ND, text_MD = _gallery(encoder, opened.test, settings)
    answer = GallerySearch(gallery, image_ND, text_MD, "Flat").answer(
        opened.test.data, show.thumbnails, show.examples, show.seed
    )
    without = {"without_caption": len(opened.test.rows) - len(gallery.pictures)}
    return replace(answer, counts={**answer.counts, **opened.test.left_out, **without})


def _gallery(encoder: Encoder, part: Part, settings: Retrieval) -> tuple[Gallery, Floats, Floats]:
    (gallery,) = galleries_of(as_gallery(part, settings.group_field, settings.max_captions))
    return gallery, encoder.images(part.data, gallery.pictures), encoder.texts(gallery.captions)


def _retrieval_shift(encoder: Encoder, opened: OpenSet, settings: Retrieval) -> EvalResult:
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    items: dict[str, NDArray[Any]] = {}
    for name, part in {ORIGINAL: opened.test, **opened.shifted}.items():
        gallery, image_ND, text_MD = _gallery(encoder, part, settings)
        found = evaluate_retrieval(image_ND, text_MD, gallery.image_group_N, gallery.text_group_M)
        metrics |= _prefixed(name, found.metrics())
        counts |= _prefixed(name, found.counts())
        items |= _prefixed(name, found.items())
        for direction in ("image_to_text", "text_to_image"):
            key = f"{direction}/recall@1"
            if name != ORIGINAL:
                metrics[f"{name}/{key}_drop"] = metrics[f"{ORIGINAL}/{key}"] - metrics[f"{name}/{key}"]
    return EvalResult(metrics, counts, items)


def ood(encoder: Encoder, opened: OpenSet, settings: Outliers, show: Showing) -> EvalResult:
    """Tell the set's pictures from each outlier set: `<outliers>/<score>/auroc` and so on (see `detection_metrics`).

    Without a text tower, or without prompts, there are the k-NN and Mahalanobis scores only.
    """
    learn = _learn(opened)
    train_MD = images(encoder, learn)
    distance = Mahalanobis.fit(train_MD, learn.label_N)
    classifier = zero_shot_classifier(encoder, opened) if encoder.sees_text and opened.templates else None

    def scores(part: Part) -> dict[str, NDArray[np.float64]]:
        x_ND = images(encoder, part)
        found = {"knn": neighbour_score(train_MD, x_ND, settings.k), "mahalanobis": distance.score(x_ND)}
        if classifier is not None:
            blocks = [class_scores(block, encoder.logit_scale) for block in classifier.scores(x_ND)]
            found |= {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        return found

    inside = scores(opened.test)
    metrics: dict[str, float] = {}
    counts = _counts(opened.test) | {"learned_from": len(learn.rows), "mahalanobis_rank": distance.rank}
    items: dict[str, NDArray[Any]] = {f"inside/{name}": score for name, score in inside.items()}
    for outliers, part in opened.outliers.items():
        counts[f"{outliers}/pictures"] = len(part.rows)
        for name, score in scores(part).items():
            metrics |= _prefixed(f"{outliers}/{name}", detection_metrics(inside[name], score))
            items[f"{outliers}/{name}"] = score
    return EvalResult(metrics, counts, items)


TASKS: dict[str, Callable[[Encoder, OpenSet, Any, Showing], EvalResult]] = {
    "retrieval": retrieval,
    "zeroshot": zeroshot,
    "fewshot": fewshot,
    "probe": probe,
    "knn": knn,
    "shift": shift,
    "ood": ood,
}


def needs_text(task: str) -> bool:
    """Whether a task asks for embeddings of texts."""
    return task in ("zeroshot", "shift", "retrieval")


def check(opened: OpenSet, settings: Settings) -> None:
    """Raise ValueError for what a task would refuse after the embeddings are computed."""
    match settings:
        case Retrieval():
            as_gallery(opened.test, settings.group_field, settings.max_captions)
        case Shift(of="retrieval"):
            for part in (opened.test, *opened.shifted.values()):
                as_gallery(part, settings.retrieval.group_field, settings.retrieval.max_captions)
        case Shift():
            for part in opened.shifted.values():
                _restricted(opened.test, part.told_apart)
        case FewShot():
            check_supports(_learn(opened).label_N, len(opened.names), settings.shots)
        case Neighbours():
            check_neighbours(settings.ks, len(_learn(opened).label_N))
        case Outliers():
            check_neighbours([settings.k], len(_learn(opened).label_N))
        case Probe():
            check_classes(_learn(opened).label_N, len(opened.names))
        case ZeroShot():
            pass


def images(encoder: Encoder, part: Part) -> Floats:
    """Unit-norm embeddings of a part's pictures (n, dim); those of its tars are computed together, once."""
    return np.asarray(encoder.images(part.data, part.data.pictures)[part.rows])


def features(encoder: Encoder, part: Part) -> Floats:
    """The image tower's output for a part's pictures (n, width), before heads and normalisation."""
    return np.asarray(encoder.features(part.data, part.data.pictures)[part.rows])


def _learn(opened: OpenSet) -> Part:
    if opened.learn is None:
        raise ValueError(f"{opened.source.path}: says under learn which pictures to learn from: found none")
    return opened.learn


def _judged(classifier: LinearClassifier, x_ND: Floats, part: Part, scale: float = 1.0) -> ScoredPredictions:
    """Judge among the classes that the part tells apart; predictions are numbers within these."""
    return score_predictions(_narrow(classifier, part).scores(x_ND), _relabelled(part), scale=scale)


def _narrow(classifier: LinearClassifier, part: Part) -> LinearClassifier:
    bias_C = classifier.bias_C
    return LinearClassifier(
        classifier.weight_DC[:, part.told_apart], None if bias_C is None else bias_C[part.told_apart]
    )


def _relabelled(part: Part) -> Ints:
    return np.where(part.labels_NL < 0, part.labels_NL, np.searchsorted(part.told_apart, part.labels_NL))


def _classified(classifier: LinearClassifier, x_ND: Floats, part: Part, scale: float = 1.0) -> EvalResult:
    labels_NL = _relabelled(part)
    judged = _judged(classifier, x_ND, part, scale)
    correct_N = judged.correct_N()
    metrics = accuracies(judged, labels_NL, TOP)
    metrics["calibration_error"] = reliability(judged.confidence_N, correct_N).error
    if labels_NL.shape[1] > 1:
        scores_NC = np.concatenate(list(_narrow(classifier, part).scores(x_ND)))
        metrics["mean_average_precision"] = mean_average_precision(scores_NC, labels_NL)
    tied = int((judged.optimistic_N != judged.pessimistic_N).sum())
    items: dict[str, NDArray[Any]] = {
        f"top{k}": judged.correct_N(k).astype(np.float32) for k in TOP if k <= judged.classes
    }
    items |= {
        "confidence": judged.confidence_N,
        "predicted": part.told_apart[judged.predicted_N],
        "label": part.labels_NL,
        **_units(part),
    }
    return EvalResult(metrics, _counts(part) | {"tied": tied}, items)


def _class_examples(
    classifier: LinearClassifier, x_ND: Floats, opened: OpenSet, items: Items, show: Showing
) -> list[Example]:
    """Some pictures, the same for every model, with their best classes; and the model's most confident misses."""
    part, right_N = opened.test, items["top1"] > 0
    some = np.random.default_rng(show.seed).permutation(len(part.rows))[: show.examples]
    missed = [row for row in np.argsort(-items["confidence"], kind="stable") if not right_N[row]][: show.examples]
    examples = []
    for heading, rows in (("Picture → classes", some), ("Missed most confidently: picture → classes", missed)):
        for row in rows:
            (scores_C,) = next(classifier.scores(x_ND[row : row + 1]))
            labels = set(part.labels_NL[row].tolist())
            best = np.argsort(-scores_C, kind="stable")
            rank = 1 + int(np.isin(best, list(labels)).argmax())
            picture = part.data.pictures[part.rows[row]]
            query = Shown(
                ", ".join(opened.names[label] for label in sorted(labels) if label >= 0),
                show.thumbnails.add(encoded(part.data, picture)),
            )
            answers = tuple(
                Shown(opened.names[c], score=float(scores_C[c]), hit=int(c) in labels) for c in best[:SHOWN]
            )
            examples.append(Example(heading, query, answers, rank))
    return examples


def _restricted(part: Part, classes: Ints) -> Part:
    """The part's pictures of some classes, told apart from each other only."""
    labels_NL = np.where(np.isin(part.labels_NL, classes), part.labels_NL, -1)
    kept_N = (labels_NL >= 0).any(axis=1)
    if not kept_N.any():
        raise ValueError(f"none of {len(part.rows)} original pictures is of the shifted set's {len(classes)} classes")
    units_N = None if part.unit_N is None else part.unit_N[kept_N]
    return Part(part.data, part.rows[kept_N], labels_NL[kept_N], classes, part.left_out, units_N)


def _units(part: Part) -> Items:
    return {} if part.unit_N is None else {"group": part.unit_N}


def _counts(part: Part) -> dict[str, int]:
    return {"pictures": len(part.rows), "classes": len(part.told_apart), **part.left_out}


def _prefixed(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{key}": value for key, value in values.items()}

"""Zero-shot classification: each image is of the class whose name is nearest, each name a mean of prompts."""

from dataclasses import replace

import numpy as np

from threetowers.eval.datasets.dataset import EvalDataset
from threetowers.eval.datasets.prompts import class_embeddings, fill_templates
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder
from threetowers.eval.metrics.classification import LinearClassifier
from threetowers.eval.record import EvalResult, Example, ExampleItem, ItemArrays
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.classifier_evaluation import embed_part, evaluate_classifier
from threetowers.eval.tasks.settings import ZeroShotSettings

TO_CLASSES = "Image → classes"
MOST_CONFIDENT_MISSES = "Missed most confidently: image → classes"
EXAMPLE_CLASSES = 5  # in the answer of an example


def zeroshot(
    encoder: Encoder, dataset: EvalDataset, settings: ZeroShotSettings, thumbnails: ThumbnailStore
) -> EvalResult:
    """Return the metrics of `evaluate_classifier`, with confidences at the model's own scale.

    With several labels per image a hit on any counts, and `mean_average_precision` is given too.
    """
    classifier = zero_shot_classifier(encoder, dataset)
    x_ND = embed_part(encoder, dataset.test)
    result = evaluate_classifier(classifier, x_ND, dataset.test, scale=encoder.logit_scale)
    return replace(result, examples=_examples(classifier, x_ND, dataset, result.items, settings, thumbnails))


def zero_shot_classifier(encoder: Encoder, dataset: EvalDataset) -> LinearClassifier:
    """Return the class embeddings as a classifier of unit-norm image embeddings."""
    prompt_PD = encoder.texts(fill_templates(dataset.templates, dataset.class_names))
    return LinearClassifier(np.ascontiguousarray(class_embeddings(prompt_PD, len(dataset.class_names)).T))


def _examples(
    classifier: LinearClassifier,
    x_ND: Embeddings,
    dataset: EvalDataset,
    items: ItemArrays,
    settings: ZeroShotSettings,
    thumbnails: ThumbnailStore,
) -> list[Example]:
    """Return some images, the same for every model, with their best classes; and the most confident misses."""
    part = dataset.test
    right_N = items["top1"] > 0
    drawn = np.random.default_rng(settings.seed).permutation(len(part.rows))[: settings.examples].tolist()
    by_confidence = np.argsort(-items["confidence"], kind="stable").tolist()
    labelled_N = np.isfinite(items["top1"])
    missed = [row for row in by_confidence if labelled_N[row] and not right_N[row]][: settings.examples]

    examples = []
    for heading, rows in ((TO_CLASSES, drawn), (MOST_CONFIDENT_MISSES, missed)):
        for row in rows:
            (scores_C,) = next(classifier.scores(x_ND[row : row + 1]))
            best_C = np.argsort(-scores_C, kind="stable")
            labels = {label for label in part.labels_NL[row].tolist() if label >= 0}
            names = ", ".join(dataset.class_names[label] for label in sorted(labels))
            thumbnail = thumbnails.add(part.data.encoded(part.data.images[part.rows[row]]))
            answers = tuple(
                ExampleItem(dataset.class_names[number], score=float(scores_C[number]), hit=number in labels)
                for number in best_C[:EXAMPLE_CLASSES].tolist()
            )
            rank = 1 + int(np.isin(best_C, list(labels)).argmax()) if labels else None
            examples.append(Example(heading, ExampleItem(names, thumbnail), answers, rank))
    return examples

"""Accuracies, ranks of labels and calibration: against loops, scikit-learn and clip-benchmark."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from threetowers.eval.metrics.classification import (
    NO_LABEL,
    LinearClassifier,
    ScoredPredictions,
    accuracies,
    label_matrix,
    mean_average_precision,
    reliability,
    score_predictions,
)
from threetowers.eval.metrics.retrieval_ranks import TIE

CLASSES = 11


def example(seed: int, count: int = 53) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, CLASSES)).astype(np.float32), rng.integers(0, CLASSES - 1, count)  # one class empty


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracies_equal_scikit_learn_and_clip_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = example(0)
    labels_NL = label_matrix(labels[:, None].tolist(), CLASSES)
    predictions = score_predictions([scores[:20], scores[20:]], labels_NL)
    found = accuracies(predictions, labels_NL)
    assert found["top1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=range(CLASSES)))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=range(CLASSES)))
    assert found["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(axis=1)))
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # It makes a number of an array of one element by float(), which NumPy refuses since 2.4.
    monkeypatch.setattr(peer, "float", lambda array: array.item(), raising=False)
    assert [found["top1"], found["top5"]] == pytest.approx(
        peer.accuracy(torch.from_numpy(scores), torch.from_numpy(labels), topk=(1, 5))
    )


def test_ranks_of_several_labels_equal_a_loop_under_ties() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (64, CLASSES)).astype(np.float32)
    labels = [sorted(rng.choice(CLASSES, rng.integers(0, 4), replace=False).tolist()) for _ in range(64)]
    labels_NL = label_matrix(labels, CLASSES)
    predictions = score_predictions([scores], labels_NL)
    for row, own in enumerate(labels):
        if not own:
            assert predictions.pessimistic_N[row] == predictions.optimistic_N[row] == -1
            continue
        best = max(scores[row, label] for label in own)
        others = [scores[row, c] for c in range(CLASSES) if c not in own]
        assert predictions.optimistic_N[row] == sum(s > best for s in others)
        assert predictions.pessimistic_N[row] == sum(s >= best for s in others)
    counted = [bool(own) for own in labels]
    right = [rank < 1 for rank, has in zip(predictions.pessimistic_N, counted, strict=True) if has]
    assert accuracies(predictions, labels_NL)["top1"] == pytest.approx(np.mean(right))


def test_with_several_labels_any_one_is_correct() -> None:
    rng = np.random.default_rng(2)
    scores, _ = example(2)
    labels = [rng.choice(CLASSES, rng.integers(1, 4), replace=False).tolist() for _ in scores]
    labels_NL = label_matrix(labels, CLASSES)
    expected = np.mean([int(row.argmax()) in own for row, own in zip(scores, labels, strict=True)])
    assert accuracies(score_predictions([scores], labels_NL), labels_NL)["top1"] == pytest.approx(expected)


def test_a_constant_classifier_has_no_accuracy() -> None:
    labels_NL = label_matrix([[i % 3] for i in range(9)], 3)
    found = accuracies(score_predictions([np.ones((9, 3), np.float32)], labels_NL), labels_NL)
    assert (found["top1"], found["top1_optimistic"], found["mean_per_class"]) == (0.0, 1.0, 0.0)
    assert "top5" not in found  # there are not five classes


def test_scores_closer_than_the_tolerance_are_tied() -> None:
    scores = np.array([[0.5, 0.5 - TIE / 2, 0], [0.5, 0.5 - 4 * TIE, 0]], np.float32)
    predictions = score_predictions([scores], label_matrix([[0], [0]], 3))
    assert predictions.pessimistic_N.tolist() == [1, 0]
    assert predictions.optimistic_N.tolist() == [0, 0]


def test_mean_average_precision_equals_clip_benchmark() -> None:
    peer = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    rng = np.random.default_rng(3)
    truth = rng.random((40, 5)) < 0.3
    scores = rng.normal(size=(40, 5)).astype(np.float32)
    labels_NL = label_matrix([np.flatnonzero(row).tolist() for row in truth], 5)
    expected = peer.average_precision_per_class(torch.from_numpy(scores), torch.from_numpy(truth)).mean()
    assert mean_average_precision(scores, labels_NL) == pytest.approx(float(expected))


def test_calibration_equals_a_loop_over_bins() -> None:
    rng = np.random.default_rng(4)
    confidence, correct = rng.random(200).astype(np.float32), rng.random(200) < 0.6
    found = reliability(confidence, correct, bins=7)
    error = 0.0
    for k in range(7):
        inside = (confidence > k / 7) & (confidence <= (k + 1) / 7)
        assert found.count_K[k] == inside.sum()
        if inside.any():
            assert found.accuracy_K[k] == pytest.approx(correct[inside].mean())
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert found.error == pytest.approx(error, abs=1e-6)


def test_confidence_is_the_softmax_at_the_scale() -> None:
    scores, labels = example(5)
    predictions = score_predictions([scores], label_matrix(labels[:, None].tolist(), CLASSES), scale=7.5)
    expected = torch.softmax(7.5 * torch.from_numpy(scores).double(), dim=1).max(dim=1)
    np.testing.assert_allclose(predictions.confidence_N, expected.values, rtol=1e-5)
    np.testing.assert_array_equal(predictions.predicted_N, expected.indices)


def test_chunks_do_not_change_scores() -> None:
    rng = np.random.default_rng(6)
    x, w, b = rng.normal(size=(30, 8)), rng.normal(size=(8, 3)), rng.normal(size=3)
    classifier = LinearClassifier(w.astype(np.float32), b.astype(np.float32))
    chunks = list(classifier.scores(x.astype(np.float32), chunk=7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 2]
    np.testing.assert_allclose(np.concatenate(chunks), x @ w + b, atol=1e-5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"item 1 has labels \[3\]: expected 0 to 2 for 3 classes"):
        label_matrix([[0], [3]], 3)
    labels_NL = label_matrix([[0], [1]], 3)
    with pytest.raises(ValueError, match="the scores of item 1 hold NaN"):
        score_predictions([np.array([[0, 1, 2], [0, np.nan, 1]], np.float32)], labels_NL)
    for count in (1, 3):
        with pytest.raises(ValueError, match="another number of items than the 2"):
            score_predictions([np.zeros((count, 3), np.float32)], labels_NL)
    nothing = np.full((2, 1), NO_LABEL)
    with pytest.raises(ValueError, match="none of 2 items has a label"):
        accuracies(score_predictions([np.zeros((2, 3), np.float32)], nothing), nothing)
    with pytest.raises(ValueError, match="none of 2 items has a label"):
        mean_average_precision(np.zeros((2, 3), np.float32), nothing)
    with pytest.raises(ValueError, match="expected one of each an item"):
        reliability(np.ones(2, np.float32), np.ones(3, bool))


def test_mean_per_class_counts_an_item_in_each_of_its_classes() -> None:
    labels_NL = label_matrix([[0, 1], [1], [1]], 3)
    predictions = ScoredPredictions(
        np.array([0, 0, 1]), np.ones(3, np.float32), np.array([0, 1, 0]), np.array([0, 1, 0]), 3
    )
    assert accuracies(predictions, labels_NL)["mean_per_class"] == pytest.approx((1 + 2 / 3) / 2)

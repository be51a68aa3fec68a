"""Outlier scores and detection metrics against scikit-learn, and by hand for the two values called FPR@95."""

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from tests.eval.random_data import unit_vectors
from threetowers.eval.metrics.outlier_scores import Mahalanobis, class_scores, detection_metrics, neighbour_score


def test_detection_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0.7, size=80).round(1), rng.normal(size=45).round(1)
    found = detection_metrics(inside, outside)
    scores, truth = np.r_[inside, outside], np.r_[np.ones(80), np.zeros(45)]
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    assert found["aupr_in"] == pytest.approx(average_precision_score(truth, scores))
    assert found["aupr_out"] == pytest.approx(average_precision_score(1 - truth, -scores))


def test_both_fpr_at_95_by_hand() -> None:
    """20 of each: 95 % is 19 of them."""
    inside, outside = np.arange(20) + 10.0, np.arange(20) - 5.0  # 10 .. 29 and -5 .. 14
    found = detection_metrics(inside, outside)
    assert found["fpr_at_95_id_recall"] == 4 / 20  # accepted from 11 on: 11, 12, 13, 14 outside
    assert found["fpr_at_95_ood_recall"] == 4 / 20  # rejected up to 13: 10, 11, 12, 13 inside
    found = detection_metrics(np.r_[inside, np.full(20, 50.0)], outside)
    assert found["fpr_at_95_id_recall"] == 3 / 20  # 38 of 40 are accepted from 12 on
    assert found["fpr_at_95_ood_recall"] == 4 / 40


def test_class_scores_equal_torch() -> None:
    cosine = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (30, 7)).astype(np.float32))
    found = class_scores(cosine.numpy(), 20.0)
    logits = 20 * cosine.double()
    np.testing.assert_allclose(np.exp(found["max_softmax"]), logits.softmax(1).max(1).values, rtol=1e-9)
    np.testing.assert_allclose(np.exp(found["mcm"]), cosine.double().softmax(1).max(1).values, rtol=1e-9)
    np.testing.assert_allclose(found["energy"], logits.logsumexp(1), rtol=1e-9)
    np.testing.assert_array_equal(found["max_logit"], cosine.double().max(1).values)


def test_saturated_probabilities_still_order_items() -> None:
    cosine = np.array([[1, -1, -1], [1, -0.9, -1]], np.float32)
    found = class_scores(cosine, 100.0)["max_softmax"]
    assert found[0] > found[1]  # both probabilities are 1.0 in float64


def test_neighbour_score_equals_scikit_learn() -> None:
    train, x = unit_vectors(50, 8, 0), unit_vectors(20, 8, 1)
    far = NearestNeighbors(n_neighbors=5, metric="cosine").fit(train).kneighbors(x)[0][:, -1]
    np.testing.assert_allclose(neighbour_score(train, x, 5), 1 - far, atol=1e-5)
    with pytest.raises(ValueError, match=r"k of \(51,\) over 50 training items"):
        neighbour_score(train, x, 51)


@pytest.mark.parametrize("width", [6, 40])  # with fewer items than features the covariance has no inverse
def test_mahalanobis_equals_scikit_learn(width: int) -> None:
    rng = np.random.default_rng(2)
    train, x = rng.normal(size=(30, width)).astype(np.float32), rng.normal(size=(9, width)).astype(np.float32)
    label = rng.permutation(np.repeat([0, 2, 5], 10))
    found = Mahalanobis.fit(train, label)
    means = {c: train[label == c].mean(axis=0, dtype=np.float64) for c in (0, 2, 5)}
    within = np.stack([row - means[c] for row, c in zip(train, label, strict=True)])
    covariance = EmpiricalCovariance(assume_centered=True).fit(within)
    expected = np.min([covariance.mahalanobis(x - mean) for mean in means.values()], axis=0)
    assert found.rank == min(width, 27)
    np.testing.assert_allclose(found.score(x, chunk=4), -expected, rtol=1e-6)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="do not vary within any class"):
        Mahalanobis.fit(np.eye(3, dtype=np.float32), np.arange(3))
    with pytest.raises(ValueError, match="items are positive, expected both kinds"):
        detection_metrics(np.ones(3), np.empty(0))
    with pytest.raises(ValueError, match="NaN or infinite"):
        detection_metrics(np.array([1, np.nan]), np.ones(2))

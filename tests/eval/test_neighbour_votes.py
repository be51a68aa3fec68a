"""Votes of neighbours: against scikit-learn, and against a loop where votes are tied."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from tests.eval.random_data import unit_vectors
from threetowers.eval.metrics.neighbour_votes import neighbour_votes


def test_majority_equals_scikit_learn_where_nothing_is_tied() -> None:
    train, test = unit_vectors(200, 12, 0), unit_vectors(61, 12, 1)
    label = np.random.default_rng(2).integers(0, 5, 200)
    votes = neighbour_votes(train, label, test, 5, ks=(1, 7))
    for k in (1, 7):
        peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, label)
        counts = peer.predict_proba(test) * k
        np.testing.assert_array_equal(np.floor(votes[f"majority@{k}"] + 0.5), counts.round())
        alone = np.sort(counts, axis=1)[:, -1] > np.sort(counts, axis=1)[:, -2]
        assert alone.any()
        np.testing.assert_array_equal(votes[f"majority@{k}"].argmax(axis=1)[alone], peer.predict(test)[alone])


def test_weights_and_tied_majorities_equal_a_loop() -> None:
    train, test = unit_vectors(90, 6, 3), unit_vectors(40, 6, 4)
    label = np.random.default_rng(5).integers(0, 4, 90)
    votes = neighbour_votes(train, label, test, 4, ks=(6,), temperature=0.1)
    cosine = test.astype(np.float64) @ train.T.astype(np.float64)
    for row, cosines in enumerate(cosine):
        nearest = np.argsort(-cosines)[:6]
        weighted = [
            sum(np.exp((cosines[n] - cosines[nearest[0]]) / 0.1) for n in nearest if label[n] == c) for c in range(4)
        ]
        np.testing.assert_allclose(votes["weighted@6"][row], weighted, rtol=1e-4, atol=1e-6)
        count = [sum(label[n] == c for n in nearest) for c in range(4)]
        nearness = [sum(cosines[n] for n in nearest if label[n] == c) for c in range(4)]
        best = max(range(4), key=lambda c: (count[c], nearness[c]))
        assert votes["majority@6"][row].argmax() == best


def test_bad_input_is_refused() -> None:
    train, label = unit_vectors(5, 3, 0), np.zeros(5, int)
    for ks in ((6,), (0, 2)):
        with pytest.raises(ValueError, match="over 5 training items: expected each from 1 to 5"):
            neighbour_votes(train, label, unit_vectors(2, 3, 1), 1, ks=ks)
    with pytest.raises(ValueError, match="NaN"):
        neighbour_votes(train, label, np.full((1, 3), np.nan, np.float32), 1, ks=(1,))

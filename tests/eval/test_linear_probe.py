"""The linear probe against the optimum of scikit-learn, and the choice of its penalty on held-out items."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.eval.random_data import gaussian_classes
from threetowers.eval.metrics.features import DEVIATION_EPSILON
from threetowers.eval.metrics.linear_probe import held_out, linear_probe


def objective(weight: np.ndarray, bias: np.ndarray, z: np.ndarray, label: np.ndarray, penalty: float) -> float:
    scores = z @ weight + bias
    entropy = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(label)), label]
    return float(entropy.mean() + penalty / 2 * (weight**2).sum())


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_equals_scikit_learn(penalty: float) -> None:
    x, label = gaussian_classes(6, 17, each=23)
    found = linear_probe(x, label, 6, [penalty], tolerance=1e-7)
    deviation = x.astype(np.float64).std(axis=0) + DEVIATION_EPSILON
    z = (x - x.astype(np.float64).mean(axis=0)) / deviation
    peer = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-9, max_iter=10_000).fit(z, label)
    weight = found.classifier.weight_DC * deviation[:, None]
    bias = found.classifier.bias_C + x.astype(np.float64).mean(axis=0) @ found.classifier.weight_DC
    lowest = objective(peer.coef_.T, peer.intercept_, z, label, penalty)
    assert lowest - 1e-9 <= objective(weight, bias, z, label, penalty) <= lowest * (1 + 1e-5)
    np.testing.assert_allclose(weight, peer.coef_.T, atol=5e-3 * np.abs(peer.coef_).max())
    test, _ = gaussian_classes(6, 17, each=50, seed=1)
    scores = np.concatenate(list(found.classifier.scores(test)))
    expected = peer.predict((test - x.astype(np.float64).mean(axis=0)) / deviation)
    assert (scores.argmax(axis=1) == expected).mean() > 0.99  # what is nearly tied may fall either way
    # Float32 cannot tell a smaller gradient from none: scores are rounded, and their errors meet the features.
    largest_score = np.abs(z @ peer.coef_.T + peer.intercept_).max()
    assert found.gradient < np.finfo(np.float32).eps * largest_score * np.abs(z).max()
    assert found.held_out_accuracy == {}  # one penalty is no choice


def test_the_penalty_is_chosen_on_held_out_items() -> None:
    x, label = gaussian_classes(4, 40, each=15, spread=0.25)
    penalties = (1e-6, 1e-1, 1e2)
    found = linear_probe(x, label, 4, penalties, seed=5)
    held = held_out(label, 5)
    by_hand = {}
    for penalty in penalties:
        classifier = linear_probe(x[~held], label[~held], 4, [penalty]).classifier
        by_hand[penalty] = float(
            (np.concatenate(list(classifier.scores(x[held]))).argmax(axis=1) == label[held]).mean()
        )
    assert found.held_out_accuracy == pytest.approx(by_hand, abs=0.09)  # one item of twelve
    best = max(found.held_out_accuracy.values())
    assert found.penalty == max(p for p, value in found.held_out_accuracy.items() if value == best)
    alone = linear_probe(x, label, 4, [found.penalty])
    np.testing.assert_allclose(
        np.concatenate(list(found.classifier.scores(x))), np.concatenate(list(alone.classifier.scores(x))), atol=2e-2
    )


def test_held_out_items_are_a_fifth_of_each_class() -> None:
    label = np.repeat(np.arange(4), [10, 5, 2, 1])
    held = held_out(label, 0)
    assert [int(held[label == c].sum()) for c in range(4)] == [2, 1, 0, 0]
    assert (held_out(label, 1) != held).any()


def test_bad_input_is_refused() -> None:
    x, label = gaussian_classes(3, 4, each=5)
    with pytest.raises(ValueError, match="1 of 4 classes have no training item, the first is class 3"):
        linear_probe(x, label, 4)
    for penalties in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="expected at least one, each above 0"):
            linear_probe(x, label, 3, penalties)
    x[3, 1] = np.inf
    with pytest.raises(ValueError, match="training item 3 hold NaN or infinity"):
        linear_probe(x, label, 3)

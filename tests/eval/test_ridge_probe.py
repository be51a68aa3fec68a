"""The few-shot probe: against the protocol written out in float64, and against scikit-learn's Ridge."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tests.eval.random_data import gaussian_classes
from threetowers.eval.metrics.features import DEVIATION_EPSILON
from threetowers.eval.metrics.ridge_probe import BIAS, L2, draw_support, few_shot_probes


def protocol_scores(x: np.ndarray, label: np.ndarray, classes: int, test: np.ndarray) -> np.ndarray:
    """Return the scores of the protocol step by step: standardise, append the constant, solve the normal equations."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0) + DEVIATION_EPSILON
    z, t = ((np.c_[(a - mean) / deviation, np.full(len(a), BIAS)]) for a in (x, test))
    y = np.where(label[:, None] == np.arange(classes), 1.0, -1.0)
    return t @ np.linalg.solve(z.T @ z + L2 * np.eye(z.shape[1]), z.T @ y)


# Wider than the rows are many (dual), narrower, and both within one run.
@pytest.mark.parametrize(("classes", "width"), [(7, 200), (13, 24), (5, 60), (2, 3), (40, 300)])
def test_equals_the_protocol_and_scikit_learn(classes: int, width: int) -> None:
    x, label = gaussian_classes(classes, width, each=12)
    test, _ = gaussian_classes(classes, width, each=20, seed=1)
    for probe in few_shot_probes(x, label, classes, shots=(10, 1, 4), seeds=(0, 3)):
        rows = draw_support(label, classes, 10, probe.seed)[:, : probe.shots].ravel()
        scores = np.concatenate(list(probe.classifier.scores(test)))
        expected = protocol_scores(x[rows], label[rows], classes, test)
        np.testing.assert_allclose(scores, expected, atol=2e-5)
        mean, deviation = (
            x[rows].astype(np.float64).mean(axis=0),
            x[rows].astype(np.float64).std(axis=0) + DEVIATION_EPSILON,
        )
        y = np.where(label[rows][:, None] == np.arange(classes), 1.0, -1.0)
        peer = Ridge(alpha=L2).fit((x[rows] - mean) / deviation, y).predict((test - mean) / deviation)
        np.testing.assert_array_equal(scores.argmax(axis=1), peer.argmax(axis=1))


def test_support_sets_are_nested_balanced_and_differ_by_seed() -> None:
    _, label = gaussian_classes(4, 3, each=9)
    drawn = draw_support(label, 4, 9, seed=1)
    for number, rows in enumerate(drawn):
        assert (label[rows] == number).all()
        assert len(set(rows.tolist())) == 9
    np.testing.assert_array_equal(draw_support(label, 4, 5, seed=1), drawn[:, :5])
    assert (draw_support(label, 4, 5, seed=2) != drawn[:, :5]).any()


def test_a_constant_feature_changes_nothing() -> None:
    x, label = gaussian_classes(5, 20, each=6)
    with_constant = np.c_[x, np.full(len(x), 1234.5, np.float32)]
    for plain, padded in zip(
        few_shot_probes(x, label, 5, (1, 5), (0,)), few_shot_probes(with_constant, label, 5, (1, 5), (0,)), strict=True
    ):
        a = np.concatenate(list(plain.classifier.scores(x)))
        b = np.concatenate(list(padded.classifier.scores(with_constant)))
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_bad_input_is_refused() -> None:
    x, label = gaussian_classes(3, 4, each=5)
    with pytest.raises(ValueError, match=r"6 shots need as many .* 3 have fewer, the first is class 0 with 5"):
        list(few_shot_probes(x, label, 3, shots=(1, 6)))
    with pytest.raises(ValueError, match="1 have fewer, the first is class 3 with 0"):
        list(few_shot_probes(x, label, 4, shots=(1,)))
    with pytest.raises(ValueError, match="each 1 or more"):
        list(few_shot_probes(x, label, 3, shots=(0,)))
    x[7, 2] = np.nan
    with pytest.raises(ValueError, match="training item 7 hold NaN"):
        list(few_shot_probes(x, label, 3, shots=(1,)))

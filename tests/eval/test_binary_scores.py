"""Binary scores against pairs counted one by one, and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from threetowers.eval.metrics.binary_scores import ThresholdCurve

ITEMS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=60)


def pairwise_auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    wins = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    return float(np.mean(wins))


def stepped_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    total, area, before = positive.sum(), 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        accepted = scores >= threshold
        recall = (accepted & positive).sum() / total
        area += (recall - before) * (accepted & positive).sum() / accepted.sum()
        before = recall
    return area


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_curve_equals_pair_counts_and_scikit_learn(items: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([s for s, _ in items], float), np.array([p for _, p in items])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="items are positive, expected both kinds"):
            ThresholdCurve.from_scores(scores, positive)
        return
    curve = ThresholdCurve.from_scores(scores, positive)
    assert curve.auroc == pytest.approx(pairwise_auroc(scores, positive), abs=1e-12)
    assert curve.auroc == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    assert curve.average_precision == pytest.approx(stepped_precision(scores, positive), abs=1e-12)
    assert curve.average_precision == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(positive, scores, drop_intermediate=False)
    for recall in (0.3, 0.5, 0.95, 1.0):
        assert curve.false_positive_rate(recall) == fpr[np.argmax(tpr >= recall)]


def test_equal_scores_give_an_auroc_of_one_half() -> None:
    curve = ThresholdCurve.from_scores(np.zeros(7), np.arange(7) < 3)
    assert curve.auroc == 0.5
    assert curve.false_positive_rate(0.95) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_scores_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 3 scores are NaN or infinite, the first is item 1"):
        ThresholdCurve.from_scores(np.array([0, bad, 1]), np.array([True, False, True]))

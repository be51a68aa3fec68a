"""The full linear probe: multinomial logistic regression on all training features, its penalty chosen on held-out ones.

The objective is the mean cross-entropy plus penalty/2 · |W|², on standardised features, the bias not penalised: that of
scikit-learn's LogisticRegression with C = 1 / (penalty · N). It is convex, so the answer is one, whatever finds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from threetowers.eval.metrics.classification import Floats, Ints, LinearClassifier

PENALTIES = tuple(float(10.0**e) for e in range(1, -7, -1))
HELD_OUT = 0.2
EPSILON = 1e-5  # added to a deviation
STEPS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """The classifier, and how its penalty was chosen: accuracy on held-out training items by penalty."""

    classifier: LinearClassifier
    penalty: float
    held_out_accuracy: dict[float, float]
    gradient: float  # largest entry of the gradient at the answer: how near the optimum it is


def linear_probe(
    train_ND: Floats,
    label_N: Ints,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    *,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Fit with the best penalty: a fifth of each class is held out for the choice, then all items are used.

    Penalties are tried from the strongest, each started from the last one's answer; of equally good ones the strongest
    is taken. Raises ValueError for features that are not finite, a class without items, and penalties that are not
    positive.
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties {tuple(penalties)}: expected at least one, each above 0")
    check_classes(label_N, classes)
    if not np.isfinite(train_ND).all():
        row = int((~np.isfinite(train_ND)).any(axis=1).argmax())
        raise ValueError(f"the features of training item {row} hold NaN or infinity: find what produced them")
    accuracy: dict[float, float] = {}
    if len(penalties) > 1:
        held_N = held_out(label_N, seed)
        fit = _Fit(train_ND[~held_N], label_N[~held_N], classes, tolerance)
        for penalty in sorted(penalties, reverse=True):
            classifier = fit.at(penalty)
            scores = np.concatenate(list(classifier.scores(train_ND[held_N])))
            accuracy[penalty] = float((scores.argmax(axis=1) == label_N[held_N]).mean())
    best = max(accuracy, key=lambda penalty: (accuracy[penalty], penalty), default=penalties[0])
    fit = _Fit(train_ND, label_N, classes, tolerance)
    return LinearProbe(fit.at(best), best, accuracy, fit.gradient)


def check_classes(label_N: Ints, classes: int) -> None:
    """Raises ValueError where a class has no training item."""
    if missing := sorted(set(range(classes)) - set(label_N.tolist())):
        raise ValueError(
            f"{len(missing)} of {classes} classes have no training item, the first is class {missing[0]}: restrict the "
            "classes (subset) or learn from another split"
        )


def held_out(label_N: Ints, seed: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Mark a random fifth of each class, rounded; a class of one or two items keeps them for training."""
    rng = np.random.default_rng(seed)
    held_N = np.zeros(len(label_N), bool)
    for label in np.unique(label_N):
        rows = np.flatnonzero(label_N == label)
        held_N[rng.permutation(rows)[: round(HELD_OUT * len(rows))]] = True
    if not held_N.any():  # no class has three items
        held_N[rng.integers(len(label_N))] = True
    return held_N


class _Fit:
    """L-BFGS from penalty to penalty, over weights and bias of standardised features."""

    def __init__(self, x_ND: Floats, label_N: Ints, classes: int, tolerance: float) -> None:
        x = torch.as_tensor(np.asarray(x_ND, np.float32))
        self.mean_D, self.deviation_D = x.mean(dim=0), x.std(dim=0, correction=0) + EPSILON
        self.x_ND = (x - self.mean_D) / self.deviation_D
        self.label_N = torch.as_tensor(label_N)
        self.weight_DC = torch.zeros(x.shape[1], classes, requires_grad=True)
        self.bias_C = torch.zeros(classes, requires_grad=True)
        self.tolerance = tolerance
        self.gradient = float("nan")

    def at(self, penalty: float) -> LinearClassifier:
        parameters = [self.weight_DC, self.bias_C]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=STEPS,
            tolerance_grad=self.tolerance,
            tolerance_change=0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            # Products in float32, their sum in float64: near the optimum the line search compares tiny differences.
            scores_NC = (self.x_ND @ self.weight_DC + self.bias_C).double()
            loss = torch.nn.functional.cross_entropy(scores_NC, self.label_N)
            loss = loss + penalty / 2 * self.weight_DC.double().square().sum()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        objective()
        self.gradient = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
        weight_DC = self.weight_DC.detach() / self.deviation_D[:, None]
        bias_C = self.bias_C.detach() - self.mean_D @ weight_DC
        return LinearClassifier(weight_DC.numpy(), bias_C.numpy())

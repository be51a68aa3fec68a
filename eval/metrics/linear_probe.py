"""The linear probe: multinomial logistic regression on all training features, its penalty chosen on held-out items.

The objective is the mean cross-entropy plus penalty/2 · |W|², on standardised features, with a bias that is not
penalised: that of scikit-learn's LogisticRegression with C = 1 / (penalty · N). It is convex, so the solution does not
depend on the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from threetowers.eval.metrics.classification import Floats, Ints, LinearClassifier
from threetowers.eval.metrics.features import DEVIATION_EPSILON, check_finite

PENALTIES = tuple(float(10.0**e) for e in range(1, -7, -1))
HELD_OUT_SHARE = 0.2
MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe.

    Attributes:
        classifier: Of the features as given, not standardised.
        penalty: The penalty that was chosen.
        held_out_accuracy: Accuracy on the held-out training items by penalty; empty for a single penalty.
        gradient: Largest absolute entry of the gradient at the solution, which tells how near the optimum it is.
    """

    classifier: LinearClassifier
    penalty: float
    held_out_accuracy: dict[float, float]
    gradient: float


def linear_probe(
    train_ND: Floats,
    label_N: Ints,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    *,
    seed: int = 0,
    tolerance: float = 1e-6,
) -> LinearProbe:
    """Fit a probe with the best of some penalties, chosen with a fifth of each class held out, to all items.

    Penalties are tried from the strongest, each from the solution of the one before; of equally good ones the strongest
    is taken.

    Args:
        train_ND: Features of the training items.
        label_N: Their classes, each in 0..classes - 1.
        classes: Number of classes; each needs an item.
        penalties: L2 penalties to choose from, each above 0.
        seed: Of the choice of held-out items.
        tolerance: Largest absolute entry of the gradient at which a fit ends.

    Raises:
        ValueError: For features that are not finite, a class without items, and penalties that are not positive.
    """
    if not penalties or min(penalties) <= 0:
        raise ValueError(f"penalties {tuple(penalties)}: expected at least one, each above 0")
    check_classes(label_N, classes)
    check_finite(train_ND)

    # Choose the penalty by the accuracy on held-out items; a single one needs no choice.
    accuracy: dict[float, float] = {}
    if len(penalties) > 1:
        held_N = held_out(label_N, seed)
        fit = _LogisticRegression(train_ND[~held_N], label_N[~held_N], classes, tolerance)
        for penalty in sorted(penalties, reverse=True):
            classifier = fit.solve(penalty)
            scores = np.concatenate(list(classifier.scores(train_ND[held_N])))
            accuracy[penalty] = float((scores.argmax(axis=1) == label_N[held_N]).mean())
    best = max(accuracy, key=lambda penalty: (accuracy[penalty], penalty), default=penalties[0])

    fit = _LogisticRegression(train_ND, label_N, classes, tolerance)
    classifier = fit.solve(best)
    return LinearProbe(classifier, best, accuracy, fit.gradient)


def check_classes(label_N: Ints, classes: int) -> None:
    """Check that every class has a training item.

    Raises:
        ValueError: If one has none.
    """
    if missing := sorted(set(range(classes)) - set(label_N.tolist())):
        raise ValueError(
            f"{len(missing)} of {classes} classes have no training item, the first is class {missing[0]}: restrict the "
            "classes (subset) or train on another split"
        )


def held_out(label_N: Ints, seed: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return a mask of a random fifth of each class, rounded: a class of one or two items keeps them for training."""
    rng = np.random.default_rng(seed)
    held_N = np.zeros(len(label_N), bool)
    for label in np.unique(label_N):
        rows = np.flatnonzero(label_N == label)
        held_N[rng.permutation(rows)[: round(HELD_OUT_SHARE * len(rows))]] = True
    if not held_N.any():  # no class has three items
        held_N[rng.integers(len(label_N))] = True
    return held_N


class _LogisticRegression:
    """L-BFGS over weights and bias of standardised features, each solution the start of the next."""

    def __init__(self, x_ND: Floats, label_N: Ints, classes: int, tolerance: float) -> None:
        x = torch.as_tensor(np.asarray(x_ND, np.float32))
        self.mean_D = x.mean(dim=0)
        self.deviation_D = x.std(dim=0, correction=0) + DEVIATION_EPSILON
        self.x_ND = (x - self.mean_D) / self.deviation_D
        self.label_N = torch.as_tensor(label_N)
        self.weight_DC = torch.zeros(x.shape[1], classes, requires_grad=True)
        self.bias_C = torch.zeros(classes, requires_grad=True)
        self.tolerance = tolerance
        self.gradient = float("nan")

    def solve(self, penalty: float) -> LinearClassifier:
        """Minimise the objective and return the classifier of the features as given."""
        parameters = [self.weight_DC, self.bias_C]
        optimizer = torch.optim.LBFGS(
            parameters,
            max_iter=MAX_ITERATIONS,
            tolerance_grad=self.tolerance,
            tolerance_change=0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def compute_objective() -> Tensor:
            optimizer.zero_grad()
            # Products in float32, their sum in float64: near the optimum the line search compares tiny differences.
            scores_NC = (self.x_ND @ self.weight_DC + self.bias_C).double()
            loss = torch.nn.functional.cross_entropy(scores_NC, self.label_N)
            loss = loss + penalty / 2 * self.weight_DC.double().square().sum()
            torch.autograd.backward(loss)
            return loss

        optimizer.step(compute_objective)  # type: ignore[no-untyped-call]
        compute_objective()  # leaves the gradient of the solution itself
        self.gradient = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
        # Standardise by the weights instead of the features.
        weight_DC = self.weight_DC.detach() / self.deviation_D[:, None]
        bias_C = self.bias_C.detach() - self.mean_D @ weight_DC
        return LinearClassifier(weight_DC.numpy(), bias_C.numpy())

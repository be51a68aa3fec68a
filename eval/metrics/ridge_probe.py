"""The few-shot probe: ridge regression on a few labelled images a class, in closed form.

The protocol is big_vision's (`evaluators/fewshot_lsr.py`), which LiT and 3T report: features standardised by the mean
and deviation of the support set, a constant feature of 100 as the bias, targets of -1 and 1, and an L2 penalty of 1024
on all weights. The support sets of one seed are nested.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.linalg

from threetowers.eval.metrics.classification import Floats, Ints, LinearClassifier
from threetowers.eval.metrics.features import DEVIATION_EPSILON, check_finite

SHOTS = (1, 5, 10, 25)
SEEDS = (0, 1, 2)
L2 = 1024.0
BIAS = 100.0


@dataclass(frozen=True)
class FewShotProbe:
    """A classifier fitted to `shots` images a class, drawn with `seed`."""

    shots: int
    seed: int
    classifier: LinearClassifier


def few_shot_probes(
    train_ND: Floats,
    label_N: Ints,
    classes: int,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    l2: float = L2,
) -> Iterator[FewShotProbe]:
    """Yield a probe for each seed and number of shots, with growing shots within a seed.

    Args:
        train_ND: Features of the training items.
        label_N: Their classes, each in 0..classes - 1.
        classes: Number of classes.
        shots: Numbers of items a class.
        seeds: Of the draws of support sets.
        l2: Penalty on the squared weights.

    Raises:
        ValueError: For features that are not finite and for a class with fewer items than shots.
    """
    check_supports(label_N, classes, shots)
    check_finite(train_ND)
    for seed in seeds:
        support_CK = draw_support(label_N, classes, max(shots), seed)
        supports = _NestedSupports(train_ND, support_CK)
        for count in sorted(shots):
            yield FewShotProbe(count, seed, supports.fit_ridge(count, l2))


def check_supports(label_N: Ints, classes: int, shots: Sequence[int]) -> None:
    """Check that every class has as many items as shots.

    Raises:
        ValueError: If one has fewer, and for shots below 1 or none at all.
    """
    if not shots or min(shots) < 1:
        raise ValueError(f"shots {tuple(shots)}: expected at least one number, each 1 or more")
    size_C = np.bincount(label_N, minlength=classes)
    short = np.flatnonzero(size_C < max(shots))
    if len(short):
        raise ValueError(
            f"{max(shots)} shots need as many training items in each of {classes} classes; {len(short)} have fewer, "
            f"the first is class {short[0]} with {size_C[short[0]]}: ask for fewer shots or leave classes out (subset)"
        )


def draw_support(label_N: Ints, classes: int, shots: int, seed: int) -> Ints:
    """Return rows (classes, shots) drawn without replacement; the first k columns are the support set of k shots."""
    rng = np.random.default_rng(seed)
    order = np.argsort(label_N, kind="stable")
    ends = np.searchsorted(label_N[order], np.arange(classes + 1))
    return np.stack([rng.permutation(order[start:end])[:shots] for start, end in pairwise(ends)])


class _NestedSupports:
    """The nested support sets of one seed, and the Gram matrix that their ridge solutions share.

    With mean m and deviation s, ridge regression on standardised rows is one with the penalty l2 s² on centred rows:
    W = (Σ (x-m)(x-m)ᵀ + l2 diag(s²))⁻¹ Σ (x-m) yᵀ. So one Gram matrix serves all supports, extended as they grow. The
    constant feature is orthogonal to the centred ones, so its weight is independent of theirs.
    """

    def __init__(self, train_ND: Floats, support_CK: Ints) -> None:
        rows = np.asarray(train_ND[support_CK.T.ravel()], np.float32)
        # Around a common point, so that the supports' own means are small and subtracting them loses no digits.
        self.origin_D = rows.mean(axis=0)
        rows -= self.origin_D
        self.x_KCD = rows.reshape(*support_CK.T.shape, -1)
        self.in_gram = 0
        self.gram_DD = np.zeros((rows.shape[1], rows.shape[1]), np.float32)

    def fit_ridge(self, shots: int, l2: float) -> LinearClassifier:
        """Return the classifier of the first `shots` rows of each class; call with growing numbers."""
        x_KCD = self.x_KCD[:shots]
        classes, width = x_KCD.shape[1:]
        size = shots * classes

        # Mean and deviation of the support set.
        sum_CD = x_KCD.sum(axis=0)
        mean_D = sum_CD.mean(axis=0) / shots
        variance_D = np.einsum("kcd,kcd->d", x_KCD, x_KCD) / size - mean_D**2
        deviation_D = np.sqrt(np.maximum(variance_D, 0)) + DEVIATION_EPSILON

        # The dual system is smaller where the rows are few.
        if 2 * size < width:
            weight_DC = (
                _solve_dual((x_KCD.reshape(size, width) - mean_D) / deviation_D, classes, l2) / deviation_D[:, None]
            )
        else:
            new_ND = self.x_KCD[self.in_gram : shots].reshape(-1, width)
            self.gram_DD += new_ND.T @ new_ND
            self.in_gram = shots
            normal_DD = self.gram_DD - np.outer(size * mean_D, mean_D)
            normal_DD[np.diag_indices(width)] += l2 * deviation_D**2
            # Targets 2 and 0 for 1 and -1: the difference is constant, and the centred rows sum to zero.
            weight_DC = _solve(normal_DD, 2 * (sum_CD - shots * mean_D).T)

        # Targets of -1 and 1 in classes of equal size have the mean 2/C - 1, which the penalty shrinks a little.
        bias = (2 / classes - 1) * size * BIAS**2 / (size * BIAS**2 + l2)
        return LinearClassifier(weight_DC, (bias - (self.origin_D + mean_D) @ weight_DC).astype(np.float32))


def _solve_dual(z_ND: Floats, classes: int, l2: float) -> Floats:
    """Return Zᵀ (Z Zᵀ + l2)⁻¹ Y for standardised rows Z of the classes 0 .. C-1 in turn."""
    kernel_NN = z_ND @ z_ND.T
    kernel_NN[np.diag_indices(len(z_ND))] += l2
    target_NC = np.tile(2 * np.eye(classes, dtype=np.float32), (len(z_ND) // classes, 1))
    return np.asarray(z_ND.T @ _solve(kernel_NN, target_NC), np.float32)


def _solve(positive_NN: Floats, right_NC: Floats) -> Floats:
    """Return the solution of a positive definite system; the matrix is overwritten."""
    # LAPACK itself: SciPy's and NumPy's solvers copy the matrix and take four times as long.
    _, solution_NC, info = scipy.linalg.lapack.sposv(positive_NN.T, right_NC, lower=1, overwrite_a=1)
    if info:
        raise FloatingPointError(
            f"the ridge system of size {len(positive_NN)} is not positive definite (sposv: {info})"
        )
    return np.ascontiguousarray(solution_NC)

"""What a contrastive loss is computed of, and its result."""

from typing import Literal, NamedTuple

from torch import Tensor

LossKind = Literal["softmax", "sigmoid"]


class Pair(NamedTuple):
    """One pair of sides: local features x and y (b, D), log_scale [1], and for the sigmoid loss a bias [1]."""

    x: Tensor
    y: Tensor
    log_scale: Tensor
    bias: Tensor | None = None


class PairResult(NamedTuple):
    """Loss and accuracies of one pair over the global batch: scalars, the same on all ranks.

    Accuracies (detached) are the share of rows (x→y) and of columns (y→x) whose positive is above every admissible
    negative by more than rounding.

    fault (int32, detached) is 0, or the bits of a `ValueFault` where the call was told not to check values: loss and
    gradients then mean nothing.
    """

    loss: Tensor
    accuracy_xy: Tensor
    accuracy_yx: Tensor
    fault: Tensor

"""What the losses are computed of, and their result."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

LossKind = Literal["softmax", "sigmoid"]


class Pair(NamedTuple):
    """One pair of sides: local features x and y (b, D), log_scale [1], and for the sigmoid loss a bias [1].

    Row i of y is the positive of row i of x. Where that is not so, y has any number of rows, (m, D), and an owner for
    each, int64 (m,): the local row of x that it is a positive of, or -1 for a negative of all rows (a hard negative, a
    memory bank). A row may own any number.

    column_group_ids: with owners and with the group_ids of a call, the groups of those columns that have no owner,
    int64 (m,); what it says of others, which are of their owner's group, is not read. None: they are of no group.
    """

    x: Tensor
    y: Tensor
    log_scale: Tensor
    bias: Tensor | None = None
    owner: Tensor | None = None
    column_group_ids: Tensor | None = None


class Teacher(NamedTuple):
    """A frozen pair of sides whose similarities a student learns.

    u and v: local features (b, E) of the same samples as the student's x and y, of any width; log_scale [1], and for
    the sigmoid loss a bias [1]. weight: its share among the teachers of a pair, relative to the other weights; a
    teacher of weight 0 is left out. None of them gets a gradient.
    """

    u: Tensor
    v: Tensor
    log_scale: Tensor
    bias: Tensor | None = None
    weight: float = 1.0


class DistillationPair(NamedTuple):
    """A student's pair of sides, as in `Pair`, and its teachers.

    hard_weight: λ, the share of the samples' own pairs in the target, from 0 to 1; the rest is the teachers'.
    """

    x: Tensor
    y: Tensor
    log_scale: Tensor
    teachers: Sequence[Teacher]
    bias: Tensor | None = None
    hard_weight: float = 0.0


class PairResult(NamedTuple):
    """Loss and accuracies of one pair over the global batch: scalars, the same on all ranks.

    Accuracies (detached) are the share of rows (x→y) and of columns (y→x) whose positive is above every admissible
    negative by more than rounding; of several positives of a row the best one counts, and what has none is left out.

    fault (int32, detached) is 0, or the bits of a `ValueFault` where the call was told not to check values: loss and
    gradients then mean nothing.

    sample_losses (detached) are those of the local samples, (b,): over all ranks their mean is the loss. Where columns
    have owners, a sample has its row's part and those of the columns it owns. In the softmax loss, one without a column
    has 0, and the mean is over the others.
    """

    loss: Tensor
    accuracy_xy: Tensor
    accuracy_yx: Tensor
    fault: Tensor
    sample_losses: Tensor

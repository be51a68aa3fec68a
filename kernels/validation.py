"""What a call must fulfil: arguments, judged on the host before any work, and values, judged where they lie.

On several ranks all are told of a fault, and all raise: none waits for a rank that has left.
"""

import enum
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from threetowers.kernels.distributed.agreement import MAX_PAIRS
from threetowers.kernels.operator.owners import Owners
from threetowers.kernels.pair import DistillationPair, Pair

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_LOG_SCALE = 80.0  # of either sign


class ValueFault(enum.IntFlag):
    """What is wrong with the values of one pair, over all ranks: the bits of `PairResult.fault`.

    Where something is not finite, the other bits say nothing.
    """

    LOG_SCALE_NOT_FINITE = 1
    BIAS_NOT_FINITE = 2
    X_NOT_FINITE = 4
    Y_NOT_FINITE = 8
    LOG_SCALE_DIFFERS = 16  # between ranks
    BIAS_DIFFERS = 32
    LOG_SCALE_OUT_OF_RANGE = 64  # beyond ±80
    LOGITS_OVERFLOW = 128  # logits may reach beyond floating point
    TEACHER = 256  # any of these of a teacher's values
    OWNER_OUT_OF_RANGE = 512
    NO_OWNER = 1024  # no column of any rank has one


OF_SIDES = [bit for bit in ValueFault if bit < ValueFault.TEACHER]

NOT_FINITE = (
    ValueFault.LOG_SCALE_NOT_FINITE | ValueFault.BIAS_NOT_FINITE | ValueFault.X_NOT_FINITE | ValueFault.Y_NOT_FINITE
)


def argument_fault(
    pairs: Sequence[Pair | DistillationPair],
    group_ids: Tensor | None,
    kind: str,
    logit_cache_bytes: int,
    margin: float | None = None,
) -> str | None:
    """Return what is wrong with the arguments, judged without reading values; None if nothing is."""
    if kind not in ("softmax", "sigmoid"):
        return f"kind is {kind!r}; expected 'softmax' or 'sigmoid'"
    if not isinstance(logit_cache_bytes, int) or logit_cache_bytes < 0:
        return f"logit_cache_bytes is {logit_cache_bytes!r}; expected an integer number of bytes, 0 or more"
    if margin is not None and not 0 <= margin < math.inf:
        return f"margin is {margin!r}; expected a finite number, 0 or more, or None"
    if not 1 <= len(pairs) <= MAX_PAIRS:
        return f"got {len(pairs)} pairs; expected 1 to {MAX_PAIRS}"
    for k, pair in enumerate(pairs):
        fault = _pair_fault(pair, group_ids, kind)
        if fault:
            return fault if len(pairs) == 1 else f"pair {k}: {fault}"
    devices = {str(pair.x.device) for pair in pairs}
    if len(devices) > 1:
        return f"pairs are on several devices, {sorted(devices)}; expected one"
    return None


def _pair_fault(pair: Pair | DistillationPair, group_ids: Tensor | None, kind: str) -> str | None:
    named = {"x": pair.x, "y": pair.y, "log_scale": pair.log_scale, "bias": pair.bias}
    owner = pair.owner if isinstance(pair, Pair) else None
    fault = _side_fault(named, kind, matched=owner is None) or _ids_fault("group_ids", group_ids, "x", pair.x)
    if fault is None and isinstance(pair, Pair):
        fault = _owner_fault(pair, group_ids)
    if fault or isinstance(pair, Pair):
        return fault

    if not 0 <= pair.hard_weight <= 1:
        return f"hard_weight is {pair.hard_weight!r}; expected a number from 0 to 1"
    for k, teacher in enumerate(pair.teachers):
        if not 0 <= teacher.weight < math.inf:
            return f"the weight of teacher {k} is {teacher.weight!r}; expected a finite number, 0 or more"
        named = {"u": teacher.u, "v": teacher.v, "log_scale": teacher.log_scale, "bias": teacher.bias}
        fault = _side_fault(named, kind)
        if fault is None and len(teacher.u) != len(pair.x):
            fault = f"u has {len(teacher.u)} rows and x {len(pair.x)}; expected one of each sample for both"
        if fault is None and teacher.u.device != pair.x.device:
            fault = f"u is on {teacher.u.device} and x on {pair.x.device}; expected one device"
        if fault:
            return f"teacher {k}: {fault}"
    if pair.hard_weight < 1 and not any(teacher.weight for teacher in pair.teachers):
        return (
            f"{len(pair.teachers)} teachers are given, none with a weight above 0; expected one at least, or "
            "hard_weight=1, or contrastive_losses, which needs none"
        )
    return None


def _owner_fault(pair: Pair, group_ids: Tensor | None) -> str | None:
    if pair.column_group_ids is not None and (pair.owner is None or group_ids is None):
        missing = "an owner for each column" if pair.owner is None else "group_ids of the rows"
        return f"column_group_ids are given without {missing}; give both, or neither"
    return _ids_fault("owner", pair.owner, "y", pair.y) or _ids_fault(
        "column_group_ids", pair.column_group_ids, "y", pair.y
    )


def _side_fault(named: Mapping[str, Tensor | None], kind: str, *, matched: bool = True) -> str | None:
    """Return what is wrong with two sides, their log_scale and their bias, given in this order by name.

    matched: whether the two have equally many rows.
    """
    for name, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and name == "bias"):
            return f"{name} is a {type(value).__name__}; expected a tensor"
    (first, x), (second, y), (_, log_scale), (_, bias) = named.items()
    assert x is not None
    assert y is not None
    shapes = f"{first} has shape {tuple(x.shape)} and {second} {tuple(y.shape)}"
    if matched and (x.dim() != 2 or x.shape != y.shape or x.shape[1] < 1):
        return f"{shapes}; expected the same (batch, width) for both"
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or x.shape[1] < 1:
        return f"{shapes}; expected (batch, width) and (columns, width), of one width"
    if x.dtype not in FEATURE_DTYPES or x.dtype != y.dtype:
        dtypes = f"{first} is {x.dtype} and {second} {y.dtype}"
        return f"{dtypes}; expected one of float32, bfloat16, float16, float64 for both"
    if bias is not None and kind == "softmax":
        return "bias is given, but a constant on all logits leaves the softmax loss as it is; use kind='sigmoid'"
    for name, value in (("log_scale", log_scale), ("bias", bias)):
        if value is not None and (value.shape not in ((1,), ()) or not value.is_floating_point()):
            shape = tuple(value.shape)
            return f"{name} has shape {shape} and dtype {value.dtype}; expected floating point of shape [1]"
    elsewhere = [
        f"{name} on {value.device}" for name, value in named.items() if value is not None and value.device != x.device
    ]
    if elsewhere:
        return f"{first} is on {x.device}, but {', '.join(elsewhere)}; expected one device"
    return None


def _ids_fault(name: str, ids: Tensor | None, side: str, features: Tensor) -> str | None:
    """Return what is wrong with one number for each row of a side."""
    if ids is None:
        return None
    if not isinstance(ids, Tensor):
        return f"{name} is a {type(ids).__name__}; expected a tensor"
    if ids.dtype != torch.int64 or ids.shape != features.shape[:1]:
        found = f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}"
        return f"{found}; expected int64 of shape ({features.shape[0]},)"
    if ids.device != features.device:
        return f"{side} is on {features.device}, but {name} on {ids.device}; expected one device"
    return None


def value_facts(
    x: Sequence[Tensor], y: Sequence[Tensor], log_scale: Sequence[Tensor], bias: Sequence[Tensor]
) -> Tensor:
    """Return what the values of every pair are judged by, float64 (K, 4, 2), on their device, without waiting for it.

    They are the lowest and the highest value of log_scale, of the bias, of x and of y; NaN where any is NaN.
    """
    facts = []
    for k in range(len(x)):
        scale = log_scale[k].reshape(())
        offset = bias[k].reshape(()) if bias else torch.zeros_like(scale)
        facts += [scale, scale, offset, offset, *_bounds(x[k]), *_bounds(y[k])]
    dtype = functools.reduce(torch.promote_types, {fact.dtype for fact in facts})
    return torch.stack([fact.to(dtype) for fact in facts]).double().view(len(x), 4, 2)


def _bounds(side_bD: Tensor) -> tuple[Tensor, Tensor]:
    if side_bD.numel() == 0:
        return side_bD.new_zeros(()), side_bD.new_zeros(())
    low, high = side_bD.aminmax()
    return low, high


def value_faults(facts_WK42: Tensor, widths: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """Return every pair's `ValueFault` bits, int32 (K,), from the `value_facts` of all ranks, without waiting for them.

    widths, dtypes: of the features of each pair.
    """
    width_K, largest_K, bit_8 = _limits(tuple(widths), tuple(dtypes), facts_WK42.device)
    scalars_WK2 = facts_WK42[:, :, :2, 0]
    differs_K2 = (scalars_WK2 != scalars_WK2[0]).any(0)
    sizes_K4 = facts_WK42.abs().amax((0, 3))
    log_scale_K, bias_K, x_K, y_K = sizes_K4.unbind(1)

    # A logit is at most scale |x| |y| + |bias|, and twice that leaves room for its base.
    dot_K = x_K * y_K * width_K
    logit_K = (dot_K * scalars_WK2[0, :, 0].exp() + bias_K) * 2
    numbers_K2 = torch.stack([log_scale_K > MAX_LOG_SCALE, torch.maximum(dot_K, logit_K) > largest_K], 1)

    faults_K8 = torch.cat([~sizes_K4.isfinite(), differs_K2, numbers_K2], 1)  # in the order of the bits
    return (faults_K8 * bit_8).sum(1, dtype=torch.int32)


@functools.lru_cache(32)
def _limits(
    widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs' widths, the largest numbers that their logits can be, and the 8 bits, on the device."""
    largest = [torch.finfo(torch.promote_types(dtype, torch.float32)).max for dtype in dtypes]
    of_pairs_2K = torch.tensor([widths, largest], dtype=torch.float64).to(device, non_blocking=True)
    bit_8 = torch.tensor([int(bit) for bit in OF_SIDES], dtype=torch.int32).to(device, non_blocking=True)
    return of_pairs_2K[0], of_pairs_2K[1], bit_8


def pair_faults(faults_N: Tensor, teacher_counts: Sequence[int]) -> Tensor:
    """Return the faults of the pairs alone, int32 (K,), in which `ValueFault.TEACHER` stands for all of its teachers'.

    Args:
        faults_N: the `value_faults` of all pairs, then of each pair's teachers in a row.
        teacher_counts: how many teachers each pair has.
    """
    num_pairs = len(teacher_counts)
    if len(faults_N) == num_pairs:
        return faults_N
    of_teachers = torch.split(faults_N[num_pairs:], list(teacher_counts))
    wrong_K = torch.stack([(part != 0).any() for part in of_teachers])
    return faults_N[:num_pairs] + wrong_K.to(torch.int32) * int(ValueFault.TEACHER)


def owner_facts(
    owner: Sequence[Tensor | None], owners: Sequence[Owners], x: Sequence[Tensor], y: Sequence[Tensor]
) -> Tensor:
    """Return how many own rows, and columns, of each pair have a positive, and how many owners are out of range.

    float64 (K, 3), on the device of the owners, without waiting for it.

    Args:
        owner: of the columns of each pair, as given.
        owners: the same, in range.
        x: features of the rows.
        y: features of the columns.
    """
    facts = []
    for given_m, of_pair, x_bD, y_mD in zip(owner, owners, x, y, strict=True):
        counts_b = of_pair.counts()
        if given_m is None or counts_b is None:
            facts += [x_bD.new_full((), n, dtype=torch.float64) for n in (len(x_bD), len(y_mD), 0)]
        else:
            wrong_m = (given_m < -1) | (given_m >= len(x_bD))
            facts += [part.sum(dtype=torch.float64) for part in (counts_b > 0, given_m >= 0, wrong_m)]
    return torch.stack(facts).view(len(x), 3)


def owner_faults(facts_WK3: Tensor) -> Tensor:
    """Return the `ValueFault` bits of owners, int32 (K,), from the `owner_facts` of all ranks, without waiting."""
    _, owned_K, wrong_K = facts_WK3.sum(0).unbind(1)
    bits_K = (wrong_K > 0) * int(ValueFault.OWNER_OUT_OF_RANGE) + (owned_K == 0) * int(ValueFault.NO_OWNER)
    return bits_K.to(torch.int32)


def check_owners(facts_WK3: Tensor) -> None:
    """Raise ValueError, on all ranks alike, if any pair has a fault of its owners. Waits for the device.

    facts_WK3: the `owner_facts` of all ranks.
    """
    for rank, of_rank in enumerate(facts_WK3.tolist()):
        for k, (_, _, wrong) in enumerate(of_rank):
            if wrong:
                where = f"rank {rank}: " if len(facts_WK3) > 1 else ""
                raise ValueError(
                    f"{where}pair {k}: {int(wrong)} owners are out of range; expected the numbers of local rows of x, "
                    "from 0, or -1 for a column without owner"
                )
    for k, (_, owned, _) in enumerate(facts_WK3.sum(0).tolist()):
        if not owned:
            raise ValueError(f"pair {k}: no column has an owner; expected one positive at least on some rank")


def describe_fault(fault: int) -> str:
    """Return what a `PairResult.fault` says, for a message; empty for 0.

    Examples:
        >>> describe_fault(ValueFault.X_NOT_FINITE | ValueFault.Y_NOT_FINITE)
        'NaN or infinite values in x; NaN or infinite values in y'
        >>> describe_fault(0)
        ''
    """
    told = fault & NOT_FINITE or fault
    return "; ".join(_WORDS[bit] for bit in ValueFault if bit & told)


_WORDS = {
    ValueFault.OWNER_OUT_OF_RANGE: "an owner that is no local row of x",
    ValueFault.NO_OWNER: "no column with an owner",
    ValueFault.TEACHER: "NaN, infinite or too large values of a teacher",
    ValueFault.X_NOT_FINITE: "NaN or infinite values in x",
    ValueFault.Y_NOT_FINITE: "NaN or infinite values in y",
    ValueFault.LOG_SCALE_NOT_FINITE: "NaN or infinite values in log_scale",
    ValueFault.BIAS_NOT_FINITE: "NaN or infinite values in bias",
    ValueFault.LOG_SCALE_DIFFERS: "log_scale differs between ranks",
    ValueFault.BIAS_DIFFERS: "bias differs between ranks",
    ValueFault.LOG_SCALE_OUT_OF_RANGE: f"log_scale is not between {-MAX_LOG_SCALE:g} and {MAX_LOG_SCALE:g}",
    ValueFault.LOGITS_OVERFLOW: "logits may reach beyond floating point; normalise x and y",
}


def check_values(faults_N: Tensor, facts_WN42: Tensor, teacher_counts: Sequence[int]) -> None:
    """Raise ValueError, on all ranks alike, if any pair or teacher has a fault. Waits for the device.

    Args:
        faults_N: the `value_faults` of all pairs, then of each pair's teachers in a row.
        facts_WN42: the facts that they were found in.
        teacher_counts: how many teachers each pair has.
    """
    faults = [ValueFault(fault) for fault in faults_N.tolist()]
    if not any(faults):
        return
    facts = facts_WN42.tolist()
    owners = [(f"pair {k}", "x", "y") for k in range(len(teacher_counts))]
    for k, count in enumerate(teacher_counts):
        owners += [(f"teacher {number} of pair {k}", "u", "v") for number in range(count)]

    # Nonfinite values: where they are, rank by rank.
    nonfinite = []
    for rank, of_rank in enumerate(facts):
        found = [
            f"{name} of {owner}"
            for (owner, first, second), of_owner in zip(owners, of_rank, strict=True)
            for name, bounds in zip(("log_scale", "bias", first, second), of_owner, strict=True)
            if not all(map(math.isfinite, bounds))
        ]
        if found:
            where = f"rank {rank}: " if len(facts) > 1 else ""
            nonfinite.append(f"{where}NaN or infinite values in {', '.join(found)}")
    if nonfinite:
        raise ValueError("; ".join(nonfinite) + "; lower the learning rate or skip this batch")

    # Numbers that do not fit: of the first pair or teacher at fault.
    n = next(n for n, fault in enumerate(faults) if fault)
    owner, first, second = owners[n]
    log_scales, biases, x, y = zip(*(of_rank[n] for of_rank in facts), strict=True)
    for bit, name, bounds in (
        (ValueFault.LOG_SCALE_DIFFERS, "log_scale", log_scales),
        (ValueFault.BIAS_DIFFERS, "bias", biases),
    ):
        if faults[n] & bit:
            values = [value for value, _ in bounds]
            raise ValueError(f"{owner}: {name} differs between ranks, {values}; expected the same on all")
    log_scale = log_scales[0][0]
    if faults[n] & ValueFault.LOG_SCALE_OUT_OF_RANGE:
        raise ValueError(
            f"{owner}: log_scale is {log_scale:g}; expected between {-MAX_LOG_SCALE:g} and {MAX_LOG_SCALE:g}"
        )
    x_largest, y_largest = (max(abs(bound) for bounds in side for bound in bounds) for side in (x, y))
    raise ValueError(
        f"{owner}: values of {first} reach {x_largest:.1e} and of {second} {y_largest:.1e}, so that at log_scale "
        f"{log_scale:g} logits may reach beyond floating point; normalise {first} and {second}"
    )

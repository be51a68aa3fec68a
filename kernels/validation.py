"""What a call must fulfil: arguments, judged on the host before any work, and values, judged where they lie.

On several ranks all are told of a fault, and all raise: none waits for a rank that has left.
"""

import enum
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from threetowers.kernels.distributed.agreement import MAX_PAIRS
from threetowers.kernels.pair import Pair

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


NOT_FINITE = (
    ValueFault.LOG_SCALE_NOT_FINITE | ValueFault.BIAS_NOT_FINITE | ValueFault.X_NOT_FINITE | ValueFault.Y_NOT_FINITE
)


def argument_fault(pairs: Sequence[Pair], group_ids: Tensor | None, kind: str, logit_cache_bytes: int) -> str | None:
    """Return what is wrong with the arguments, judged without reading values; None if nothing is."""
    if kind not in ("softmax", "sigmoid"):
        return f"kind is {kind!r}; expected 'softmax' or 'sigmoid'"
    if not isinstance(logit_cache_bytes, int) or logit_cache_bytes < 0:
        return f"logit_cache_bytes is {logit_cache_bytes!r}; expected an integer number of bytes, 0 or more"
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


def _pair_fault(pair: Pair, group_ids: Tensor | None, kind: str) -> str | None:
    named = {**pair._asdict(), "group_ids": group_ids}
    for name, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("bias", "group_ids")):
            return f"{name} is a {type(value).__name__}; expected a tensor"
    x, y, log_scale, bias = pair
    if x.dim() != 2 or x.shape != y.shape or x.shape[1] < 1:
        return f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; expected the same (batch, width) for both"
    if x.dtype not in FEATURE_DTYPES or x.dtype != y.dtype:
        return f"x is {x.dtype} and y {y.dtype}; expected one of float32, bfloat16, float16, float64 for both"
    if bias is not None and kind == "softmax":
        return "bias is given, but a constant on all logits leaves the softmax loss as it is; use kind='sigmoid'"
    for name, value in (("log_scale", log_scale), ("bias", bias)):
        if value is not None and (value.shape not in ((1,), ()) or not value.is_floating_point()):
            shape = tuple(value.shape)
            return f"{name} has shape {shape} and dtype {value.dtype}; expected floating point of shape [1]"
    if group_ids is not None and (group_ids.dtype != torch.int64 or group_ids.shape != x.shape[:1]):
        found = f"group_ids has shape {tuple(group_ids.shape)} and dtype {group_ids.dtype}"
        return f"{found}; expected int64 of shape ({x.shape[0]},)"
    elsewhere = [
        f"{name} on {value.device}" for name, value in named.items() if value is not None and value.device != x.device
    ]
    if elsewhere:
        return f"x is on {x.device}, but {', '.join(elsewhere)}; expected one device"
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
    bit_8 = torch.tensor([int(bit) for bit in ValueFault], dtype=torch.int32).to(device, non_blocking=True)
    return of_pairs_2K[0], of_pairs_2K[1], bit_8


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
    ValueFault.X_NOT_FINITE: "NaN or infinite values in x",
    ValueFault.Y_NOT_FINITE: "NaN or infinite values in y",
    ValueFault.LOG_SCALE_NOT_FINITE: "NaN or infinite values in log_scale",
    ValueFault.BIAS_NOT_FINITE: "NaN or infinite values in bias",
    ValueFault.LOG_SCALE_DIFFERS: "log_scale differs between ranks",
    ValueFault.BIAS_DIFFERS: "bias differs between ranks",
    ValueFault.LOG_SCALE_OUT_OF_RANGE: f"log_scale is not between {-MAX_LOG_SCALE:g} and {MAX_LOG_SCALE:g}",
    ValueFault.LOGITS_OVERFLOW: "logits may reach beyond floating point; normalise x and y",
}


def check_values(faults_K: Tensor, facts_WK42: Tensor) -> None:
    """Raise ValueError, on all ranks alike, if any pair has a fault. Waits for the device.

    Args:
        faults_K: the `value_faults` of all pairs.
        facts_WK42: the facts that they were found in.
    """
    faults = [ValueFault(fault) for fault in faults_K.tolist()]
    if not any(faults):
        return
    facts = facts_WK42.tolist()

    # Nonfinite values: where they are, rank by rank.
    nonfinite = []
    for rank, of_rank in enumerate(facts):
        found = [
            f"{name} of pair {k}"
            for k, of_pair in enumerate(of_rank)
            for name, bounds in zip(("log_scale", "bias", "x", "y"), of_pair, strict=True)
            if not all(map(math.isfinite, bounds))
        ]
        if found:
            where = f"rank {rank}: " if len(facts) > 1 else ""
            nonfinite.append(f"{where}NaN or infinite values in {', '.join(found)}")
    if nonfinite:
        raise ValueError("; ".join(nonfinite) + "; lower the learning rate or skip this batch")

    # Numbers that do not fit: of the first pair at fault.
    k = next(k for k, fault in enumerate(faults) if fault)
    log_scales, biases, x, y = zip(*(of_rank[k] for of_rank in facts), strict=True)
    for bit, name, bounds in (
        (ValueFault.LOG_SCALE_DIFFERS, "log_scale", log_scales),
        (ValueFault.BIAS_DIFFERS, "bias", biases),
    ):
        if faults[k] & bit:
            values = [value for value, _ in bounds]
            raise ValueError(f"pair {k}: {name} differs between ranks, {values}; expected the same on all")
    log_scale = log_scales[0][0]
    if faults[k] & ValueFault.LOG_SCALE_OUT_OF_RANGE:
        raise ValueError(
            f"pair {k}: log_scale is {log_scale:g}; expected between {-MAX_LOG_SCALE:g} and {MAX_LOG_SCALE:g}"
        )
    x_largest, y_largest = (max(abs(bound) for bounds in side for bound in bounds) for side in (x, y))
    raise ValueError(
        f"pair {k}: values of x reach {x_largest:.1e} and of y {y_largest:.1e}, so that at log_scale {log_scale:g} "
        "logits may reach beyond floating point; normalise x and y"
    )

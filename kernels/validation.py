"""What a call must fulfil before any work starts.

On several ranks all are told of a fault, and all raise: none waits for a rank that has left.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.pair import Pair

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_PAIRS = 32  # bounds what ranks exchange


class RankHeader(NamedTuple):
    """What one rank tells the others about one pair."""

    batch: float
    log_scale: float
    bias: float
    x_largest: float
    y_largest: float


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


def read_headers(
    x: Sequence[Tensor], y: Sequence[Tensor], log_scale: Sequence[Tensor], bias: Sequence[Tensor]
) -> tuple[list[RankHeader], str | None]:
    """Return every pair's header, and what is wrong with its values. One transfer from the device for all pairs."""
    columns = []
    for k in range(len(x)):
        scalars = [log_scale[k], bias[k] if bias else log_scale[k].new_zeros(1), *_bounds(x[k]), *_bounds(y[k])]
        columns.append(torch.stack([part.reshape(()).to(torch.float64) for part in scalars]))

    names = ("log_scale", "bias", "x", "x", "y", "y")
    headers: list[RankHeader] = []
    nonfinite: list[str] = []
    for k, values in enumerate(torch.stack(columns).tolist()):
        found = {name for name, value in zip(names, values, strict=True) if not math.isfinite(value)}
        nonfinite += [f"{name} of pair {k}" for name in sorted(found)]
        scale, bias_value, x_low, x_high, y_low, y_high = values
        x_largest = max(abs(x_low), abs(x_high))
        y_largest = max(abs(y_low), abs(y_high))
        headers.append(RankHeader(len(x[k]), scale, bias_value, x_largest, y_largest))
    if not nonfinite:
        return headers, None
    return headers, f"NaN or infinite values in {', '.join(nonfinite)}; lower the learning rate or skip this batch"


def _bounds(side_bD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value; NaN where any is NaN."""
    if side_bD.numel() == 0:
        return side_bD.new_zeros(()), side_bD.new_zeros(())
    low, high = side_bD.detach().aminmax()
    return low, high


def exchange_headers(
    ranks: RankGroup, fault: str | None, layout: str, headers: Sequence[RankHeader]
) -> list[list[RankHeader]]:
    """Return every rank's headers, by rank and pair.

    Args:
        ranks: the ranks that share the batch.
        fault: what is wrong on this rank.
        layout: whatever must be the same on all ranks, as text.
        headers: this rank's, one a pair.

    Raises:
        ValueError: a rank has a fault or another layout; on all ranks.
    """
    if ranks.size == 1:
        if fault:
            raise ValueError(fault)
        return [list(headers)]

    # One row of fixed length a rank: whether it has a fault, a digest of its layout, its headers.
    digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:6], "big")  # 48 bits: exact in float64
    length = len(RankHeader._fields)
    row = torch.zeros(2 + length * MAX_PAIRS, dtype=torch.float64)
    row[0] = fault is not None
    row[1] = digest
    if fault is None:
        row[2 : 2 + length * len(headers)] = torch.tensor(headers, dtype=torch.float64).flatten()
    rows = ranks.gather(row.to(ranks.device())).tolist()

    # All ranks see the same rows, and raise together.
    if any(found[0] for found in rows):
        faults = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.objects(fault)) if text]
        raise ValueError("; ".join(faults))
    if len({found[1] for found in rows}) > 1:
        layouts = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.objects(layout))]
        raise ValueError("ranks call the loss with different arguments; " + "; ".join(layouts))
    starts = range(2, 2 + length * len(headers), length)
    return [[RankHeader(*found[start : start + length]) for start in starts] for found in rows]


def joint_fault(
    headers_Wk: Sequence[Sequence[RankHeader]], widths: Sequence[int], dtypes: Sequence[torch.dtype]
) -> str | None:
    """Return what is wrong with the ranks' values taken together; the same on every rank."""
    for k, headers in enumerate(zip(*headers_Wk, strict=True)):
        if sum(header.batch for header in headers) == 0:
            return f"pair {k}: the global batch is empty; expected at least one sample on some rank"
        for name in ("log_scale", "bias"):
            values = [getattr(header, name) for header in headers]
            if len(set(values)) > 1:
                return f"pair {k}: {name} differs between ranks, {values}; expected the same on all"
        log_scale = headers[0].log_scale
        if abs(log_scale) > 80:
            return f"pair {k}: log_scale is {log_scale:g}; expected between -80 and 80"
        x_largest = max(header.x_largest for header in headers)
        y_largest = max(header.y_largest for header in headers)
        dot = x_largest * y_largest * widths[k]
        largest = 2 * (dot * math.exp(log_scale) + abs(headers[0].bias))
        if max(largest, dot) > torch.finfo(torch.promote_types(dtypes[k], torch.float32)).max:
            return f"pair {k}: logits may reach {largest:.1e}, beyond floating point; normalise x and y"
    return None

"""What a call must fulfil before any work starts. On several ranks all learn of a fault, and all raise: none waits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from threetowers.kernels.distributed import RankGroup

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_PAIRS = 32  # bounds the header that ranks exchange


@dataclass(frozen=True, slots=True)
class RankHeader:
    """What one rank tells the others about one pair term."""

    batch: float = 0
    log_scale: float = 0
    bias: float = 0
    x_largest: float = 0
    y_largest: float = 0


def shape_fault(
    x: Sequence[Tensor], y: Sequence[Tensor], log_scale: Sequence[Tensor], bias: Sequence[Tensor | None],
    sample_ids: Tensor | None, family: str, reduction: str, workspace_bytes: int) -> str | None:  # fmt: skip
    """What is wrong with the arguments, judged without reading values; None if nothing is."""
    if family not in ("softmax", "sigmoid"):
        return f"family is {family!r}; expected 'softmax' or 'sigmoid'"
    if reduction not in ("mean", "sum", "none"):
        return f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'"
    if not isinstance(workspace_bytes, int) or workspace_bytes < 0:
        return f"workspace_bytes is {workspace_bytes!r}; expected a whole number of bytes, 0 or more"
    if not 1 <= len(x) <= MOST_PAIRS:
        return f"got {len(x)} pairs; expected 1 to {MOST_PAIRS}"
    for k, parts in enumerate(zip(x, y, log_scale, bias, strict=True)):
        fault = _pair_fault(*parts, sample_ids, family)
        if fault:
            return fault if len(x) == 1 else f"pair {k}: {fault}"
    if len({part.device for part in x}) > 1:
        return f"pairs lie on several devices: {sorted({str(part.device) for part in x})}"
    return None


def _pair_fault(
    x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, ids: Tensor | None, family: str
) -> str | None:
    named = {"x": x, "y": y, "log_scale": log_scale, "bias": bias, "sample_ids": ids}
    for name, value in named.items():
        if not isinstance(value, Tensor) and not (value is None and name in ("bias", "sample_ids")):
            return f"{name} is a {type(value).__name__}; expected a tensor"
    if x.dim() != 2 or x.shape != y.shape or x.shape[1] < 1:
        return f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; expected the same (batch, width) for both"
    if x.dtype not in FLOATS or x.dtype != y.dtype:
        return f"x is {x.dtype} and y {y.dtype}; expected one of float32, bfloat16, float16, float64 for both"
    if bias is not None and family == "softmax":
        return "bias is given, but a constant on all logits leaves the softmax loss as it is; use family='sigmoid'"
    for name, value in (("log_scale", log_scale), ("bias", bias)):
        if value is not None and (value.shape not in ((1,), ()) or not value.is_floating_point()):
            return (
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; expected floating point of shape [1]"
            )
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != x.shape[:1]):
        return f"sample_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected int64 of shape ({x.shape[0]},)"
    others = {name: value.device for name, value in named.items() if value is not None and value.device != x.device}
    if others:
        return f"x is on {x.device}, but " + ", ".join(f"{name} on {device}" for name, device in others.items())
    return None


def read_facts(
    x: Sequence[Tensor], y: Sequence[Tensor], log_scale: Sequence[Tensor], bias: Sequence[Tensor]
) -> tuple[list[RankHeader], str | None]:
    """Every pair's facts, and what is wrong with their values. One transfer from the device for all of them."""
    columns = []
    for k in range(len(x)):
        bounds = [part for side in (x[k], y[k]) for part in _bounds(side)]
        scalars = [log_scale[k], bias[k] if bias else log_scale[k].new_zeros(1)]
        columns.append(torch.stack([part.reshape(()).to(torch.float64) for part in (*scalars, *bounds)]))
    facts, faults = [], []
    for k, values in enumerate(torch.stack(columns).tolist()):
        x_largest, y_largest = (max(abs(low), abs(high)) for low, high in (values[2:4], values[4:6]))
        names = ("log_scale", "bias", "x", "x", "y", "y")
        faults += sorted({f"{name} of pair {k}" for name, v in zip(names, values, strict=True) if not math.isfinite(v)})
        facts.append(RankHeader(len(x[k]), values[0], values[1], x_largest, y_largest))
    if not faults:
        return facts, None
    return facts, f"NaN or infinite values in {', '.join(faults)}; lower the learning rate or skip this batch"


def _bounds(side_bD: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value; NaN where any is NaN."""
    if side_bD.numel() == 0:
        return side_bD.new_zeros(()), side_bD.new_zeros(())
    low, high = side_bD.detach().aminmax()
    return low, high


def settle(ranks: RankGroup, fault: str | None, layout: str, facts: Sequence[RankHeader]) -> list[list[RankHeader]]:
    """Every rank's facts, by rank then pair. Raises ValueError on every rank if any has a fault or another layout.

    layout: whatever must be the same on all ranks, as text.
    """
    if ranks.size == 1:
        if fault:
            raise ValueError(fault)
        return [list(facts)]
    digest = int.from_bytes(hashlib.sha256(layout.encode()).digest()[:6], "big")  # 48 bits: exact in float64
    per_pair = len(fields(RankHeader))
    header = torch.zeros(3 + per_pair * MOST_PAIRS, dtype=torch.float64)
    header[:3] = torch.tensor([fault is not None, digest, len(facts)], dtype=torch.float64)
    for k, fact in enumerate(facts if fault is None else ()):
        header[3 + per_pair * k : 3 + per_pair * (k + 1)] = torch.tensor(astuple(fact), dtype=torch.float64)
    headers = ranks.gather(header.to(ranks.device())).tolist()
    if any(row[0] for row in headers):
        told = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.objects(fault)) if text]
        raise ValueError("; ".join(told))
    if len({row[1] for row in headers}) > 1:
        told = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.objects(layout))]
        raise ValueError("ranks call the loss with different arguments; " + "; ".join(told))
    return [[RankHeader(*row[3 + per_pair * k : 3 + per_pair * (k + 1)]) for k in range(len(facts))] for row in headers]


def joint_fault(
    facts_Wk: Sequence[Sequence[RankHeader]], widths: Sequence[int], dtypes: Sequence[torch.dtype]
) -> str | None:
    """What is wrong with the ranks' values taken together (every rank comes to the same verdict)."""
    for k, column in enumerate(zip(*facts_Wk, strict=True)):
        if sum(fact.batch for fact in column) == 0:
            return f"pair {k}: the global batch is empty"
        for name in ("log_scale", "bias"):
            values = [getattr(fact, name) for fact in column]
            if len(set(values)) > 1:
                return f"pair {k}: {name} differs between ranks: {values}"
        if column[0].log_scale > 80 or column[0].log_scale < -80:
            return f"pair {k}: log_scale is {column[0].log_scale:g}; expected between -80 and 80"
        dot = max(fact.x_largest for fact in column) * max(fact.y_largest for fact in column) * widths[k]
        largest = 2 * (dot * math.exp(column[0].log_scale) + abs(column[0].bias))
        if max(largest, dot) > torch.finfo(torch.promote_types(dtypes[k], torch.float32)).max:
            return f"pair {k}: logits may reach {largest:.1e}, beyond floating point; normalise x and y"
    return None

"""The losses as torch operators: real and fake kernels, and gradients, registered with torch.library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from threetowers.kernels.backends import backend_for
from threetowers.kernels.distributed import Columns, GatheredColumns, RankGroup, Shards
from threetowers.kernels.pair_term import Term
from threetowers.kernels.ring import RingColumns
from threetowers.kernels.sigmoid import SigmoidState, sigmoid_backward, sigmoid_backward_in_place, sigmoid_forward
from threetowers.kernels.softmax import SoftmaxState, softmax_backward, softmax_forward
from threetowers.kernels.tiling import KeptTiles
from threetowers.kernels.validation import RankHeader, joint_fault, read_facts, settle

PER_PAIR = len(SoftmaxState._fields)  # as many as SigmoidState has: outputs of one pair term
COMMON = 3  # after them: the gathered columns (bytes), the labels (int32), the facts (float64, on the CPU)


@torch.library.custom_op("threetowers::contrastive_forward", mutates_args=())
def contrastive_forward(
    x: list[Tensor], y: list[Tensor], log_scale: list[Tensor], bias: list[Tensor], sample_ids: Tensor | None,
    family: str, reduction: str, group: str, workspace_bytes: int, ring: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Losses, accuracies and what backward needs. needs: for each pair whether x, y and log_scale want gradients."""
    with torch.autocast(x[0].device.type, enabled=False):  # else it would turn the logits to half precision
        ranks = RankGroup(group)
        facts_Wk = _agree(ranks, x, y, log_scale, bias, sample_ids, family, reduction, ring, needs)
        labels = _labels(ranks, sample_ids, [int(facts[0].batch) for facts in facts_Wk])
        terms = _terms(x, y, facts_Wk, ranks, labels, needs)
        ring = ring and ranks.size > 1
        columns = _columns(ranks, terms, y, ring, None)
        states: Sequence[SoftmaxState | SigmoidState]
        if family == "softmax":
            states = softmax_forward(terms, columns, ranks, reduction, workspace_bytes)
        else:
            states = sigmoid_forward(terms, columns, ranks, reduction, ring)
        known = [[row[k].log_scale, row[k].bias, row[k].batch] for k in range(len(x)) for row in facts_Wk]
        common = [columns.packed, labels, torch.tensor(known, dtype=torch.float64)]
        return [part for state in states for part in state] + common


def _agree(
    ranks: RankGroup, x: Sequence[Tensor], y: Sequence[Tensor], log_scale: Sequence[Tensor], bias: Sequence[Tensor],
    sample_ids: Tensor | None, family: str, reduction: str, ring: bool, needs: Sequence[bool],
) -> list[list[RankHeader]]:  # fmt: skip
    """All ranks' facts; raises on all of them if anything does not fit."""
    facts, fault = read_facts(x, y, log_scale, bias)
    if not ranks.serves(x[0].device):
        fault = f"x is on {x[0].device}, which process_group's backend cannot send from"
    shapes = [(part.shape[1], str(part.dtype), part.device.type) for part in x]
    options = f"{family}, {reduction}, ring {ring}, sample_ids {sample_ids is not None}"
    layout = f"{options}, widths {shapes}, gradients {list(needs)}"
    facts_Wk = settle(ranks, fault, layout, facts)
    fault = joint_fault(facts_Wk, [part.shape[1] for part in x], [part.dtype for part in x])
    if fault:
        raise ValueError(fault)
    return facts_Wk


def _labels(ranks: RankGroup, sample_ids: Tensor | None, sizes: Sequence[int]) -> Tensor:
    """Global ids renumbered to int32 (B,), which tiles compare twice as fast; empty without ids."""
    if sample_ids is None:
        return torch.empty(0, dtype=torch.int32)
    shards = Shards(sizes, ranks.rank)
    ids_B = shards.join(ranks.gather(shards.pad(sample_ids)))
    labels_B: Tensor = torch.unique(ids_B, return_inverse=True)[1]
    return labels_B.to(torch.int32)


def _terms(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    facts_Wk: Sequence[Sequence[RankHeader]],
    ranks: RankGroup,
    labels: Tensor,
    needs: Sequence[bool],
) -> list[Term]:
    backends = {part.dtype: backend_for(part) for part in x}  # terms share one's scratch: they take turns
    terms = []
    for k in range(len(x)):
        shards = Shards([int(facts[k].batch) for facts in facts_Wk], ranks.rank)
        fact = facts_Wk[ranks.rank][k]
        terms.append(
            Term(
                index=k,
                x_bD=x[k],
                y_bD=y[k],
                scale=math.exp(fact.log_scale),
                bias=fact.bias,
                need_x=needs[3 * k],
                need_y=needs[3 * k + 1],
                need_scale=needs[3 * k + 2],
                shards=shards,
                labels_B=labels if len(labels) else None,
                backend=backends[x[k].dtype],
            )
        )
    return terms


def _columns(
    ranks: RankGroup, terms: Sequence[Term], y: Sequence[Tensor], ring: bool, packed: Tensor | None
) -> Columns:
    shards = [term.shards for term in terms]
    return RingColumns(ranks, shards, y) if ring else GatheredColumns(ranks, shards, y, packed)


@torch.library.custom_op("threetowers::contrastive_backward", mutates_args=())
def contrastive_backward(
    grads: list[Tensor], x: list[Tensor], y: list[Tensor], saved: list[Tensor],
    family: str, reduction: str, group: str, ring: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """dx, dy, d log_scale and d bias of each pair in turn, empty where not wanted."""
    with torch.autocast(x[0].device.type, enabled=False):
        ranks = RankGroup(group)
        packed, labels, known = saved[-COMMON:]
        facts_kW = known.view(len(x), ranks.size, 3).tolist()
        facts_Wk = [[RankHeader(row[2], row[0], row[1]) for row in column] for column in zip(*facts_kW, strict=True)]
        terms = _terms(x, y, facts_Wk, ranks, labels, needs)
        ring = ring and ranks.size > 1
        columns = _columns(ranks, terms, y, ring, packed)
        parts = [saved[PER_PAIR * k : PER_PAIR * (k + 1)] for k in range(len(x))]
        if family == "softmax":
            softmax = [SoftmaxState(*part) for part in parts]
            results = softmax_backward(terms, softmax, grads, columns, ranks, reduction, ring)
            return [part for result in results for part in (*result, x[0].new_empty(0))]
        sigmoid = [SigmoidState(*part) for part in parts]
        return [
            part
            for result in sigmoid_backward(terms, sigmoid, grads, columns, ranks, reduction, ring)
            for part in result
        ]


def _size_when_run() -> Any:
    """A size that nobody knows before the operator runs: how many rows other ranks hold, how many tiles are kept."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
        raise RuntimeError(
            "contrastive_loss over several ranks, or with workspace_bytes and a symbolic batch, has outputs whose size "
            "is known only when it runs, which this fake mode cannot express; trace it with torch.compile, or give "
            "FakeTensorMode a ShapeEnv with allow_dynamic_output_shape_ops"
        ) from error


@contrastive_forward.register_fake
def _(x, y, log_scale, bias, sample_ids, family, reduction, group, workspace_bytes, ring, needs):  # type: ignore[no-untyped-def]
    alone, budget = group == "" or RankGroup(group).size == 1, workspace_bytes
    outputs = []
    for k, x_bD in enumerate(x):
        batch, dtype = x_bD.shape[0], torch.promote_types(x_bD.dtype, torch.float32)

        def vector(*shape: Any, like: Tensor = x_bD, dtype: torch.dtype = dtype) -> Tensor:
            return like.new_empty(shape, dtype=dtype)

        outputs += [vector(batch) if reduction == "none" else vector(), vector(2)]
        if family == "softmax":
            total = batch if alone else _size_when_run()
            outputs += [vector(batch), vector(batch), vector(total), vector(total), vector(batch)]
            kept: Any = 0
            if budget and any(needs[3 * k : 3 * k + 3]):
                if alone and isinstance(batch, int):  # not where torch.compile keeps the batch open
                    kept = KeptTiles.room(backend_for(x_bD), batch, [batch], budget)
                    budget -= kept * dtype.itemsize
                else:
                    kept = _size_when_run()
            outputs.append(vector(kept))
            continue
        for want, side in zip(needs[3 * k : 3 * k + 2], (x_bD, y[k]), strict=True):
            outputs.append(torch.empty_like(side) if want and reduction != "none" else x_bD.new_empty(0))
        scale_wanted = needs[3 * k + 2] and reduction != "none"
        outputs.append(vector(dtype=torch.float64) if scale_wanted else x_bD.new_empty(0))
        outputs += [vector(dtype=torch.float64), vector(batch), vector(batch)]
    packed = x[0].new_empty(0 if alone or ring else (RankGroup(group).size, _size_when_run()), dtype=torch.uint8)
    if sample_ids is None:
        labels = torch.empty(0, dtype=torch.int32)
    else:
        labels = sample_ids.new_empty(sample_ids.shape if alone else _size_when_run(), dtype=torch.int32)
    rows = len(x) * (1 if alone else RankGroup(group).size)
    return [*outputs, packed, labels, torch.empty(rows, 3, dtype=torch.float64)]


@contrastive_backward.register_fake
def _(grads, x, y, saved, family, reduction, group, ring, needs):  # type: ignore[no-untyped-def]
    outputs = []
    for k, (x_bD, y_bD) in enumerate(zip(x, y, strict=True)):
        nothing = [x_bD.new_empty(0) for _ in range(3)]
        want_x, want_y, want_scale = needs[3 * k : 3 * k + 3]
        outputs.append(torch.empty_like(x_bD) if want_x else nothing[0])
        outputs.append(torch.empty_like(y_bD) if want_y else nothing[1])
        outputs.append(x_bD.new_empty((), dtype=torch.float64) if want_scale else nothing[2])
        outputs.append(x[0].new_empty(0) if family == "softmax" else x_bD.new_empty((), dtype=torch.float64))
    return outputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, y, log_scale, bias, _, ctx.family, ctx.reduction, ctx.group, _, ctx.ring, ctx.needs = inputs
    ctx.pairs, ctx.biased = len(x), bool(bias)
    losses = {id(output[PER_PAIR * k]) for k in range(len(x))}
    ctx.mark_non_differentiable(*(part for part in output if id(part) not in losses))
    ctx.set_materialize_grads(False)  # else autograd fills zeros for every output, kept tiles included
    ctx.save_for_backward(*x, *y, *log_scale, *bias, *output)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    k, saved = ctx.pairs, ctx.saved_tensors
    x, y, log_scale = saved[:k], saved[k : 2 * k], saved[2 * k : 3 * k]
    bias = saved[3 * k : 4 * k] if ctx.biased else []
    outputs = saved[(4 if ctx.biased else 3) * k :]
    arrived = [grads[PER_PAIR * i] for i in range(k)]
    needs = [need and arrived[i // 3] is not None for i, need in enumerate(ctx.needs)]  # a loss may go unused
    losses = [outputs[PER_PAIR * i] for i in range(k)]
    incoming = [torch.zeros_like(loss) if grad is None else grad for grad, loss in zip(arrived, losses, strict=True)]
    if ctx.family == "sigmoid" and ctx.reduction != "none" and _only_reader_of(losses):
        states = [SigmoidState(*outputs[PER_PAIR * i : PER_PAIR * (i + 1)]) for i in range(k)]
        flat = sigmoid_backward_in_place(states, incoming)
    else:
        flat = torch.ops.threetowers.contrastive_backward(
            incoming, list(x), list(y), list(outputs), ctx.family, ctx.reduction, ctx.group, ctx.ring, needs
        )
    dx, dy = ([flat[4 * i + side] if needs[3 * i + side] else None for i in range(k)] for side in (0, 1))
    d_scale = [
        flat[4 * i + 2].to(part.dtype).view(part.shape) if needs[3 * i + 2] else None
        for i, part in enumerate(log_scale)
    ]
    d_bias = [flat[4 * i + 3].to(part.dtype).view(part.shape) for i, part in enumerate(bias)]
    return dx, dy, d_scale, d_bias, None, None, None, None, None, None, None


def _only_reader_of(saved: Sequence[Tensor]) -> bool:
    """Whether nobody reads what forward saved after this backward pass: no retain_graph, and not a trace of one."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    alone = kept is not None and not kept() and not torch.is_grad_enabled()
    return alone and all(type(part) is Tensor for part in saved)


def _no_second_backward(ctx: Any, grads: list[Tensor]) -> NoReturn:
    raise RuntimeError(
        "contrastive_loss has no second derivative: call backward without create_graph, "
        "or use dense_contrastive_loss where one is needed"
    )


contrastive_forward.register_autograd(_backward, setup_context=_setup_context)
contrastive_backward.register_autograd(_no_second_backward)

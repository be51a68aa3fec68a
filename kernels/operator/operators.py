"""The losses as torch operators: real and fake kernels, and gradients, registered with torch.library.

An operator takes and returns flat lists of tensors. Teachers are given for all pairs in a row, and `teacher_counts`
says how many each pair has. Forward returns, in this order,

- pair by pair, the fields of `SoftmaxOutputs` or `SigmoidOutputs`;
- teacher by teacher, those of `TeacherOutputs` (softmax only);
- the columns of all ranks, each pair's and behind them its teachers', where backward needs them;
- pair by pair, what is excluded of it alone, the fields of `Exclusions`;
- what is common to all: the labels of groups (int32), how many rows, then how many columns of each pair every rank
  holds (int64 (W, 2 K), on the CPU), how many of each pair's rows and columns have a positive (float64 (K, 2)), the
  scale and bias of each pair, then of each teacher (float64 (N, 2)), and what is wrong with each pair's values
  (int32 (K,)).
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from threetowers.kernels.backends import backend_for
from threetowers.kernels.distributed.agreement import agree_on_sizes
from threetowers.kernels.distributed.columns import ColumnExchange, GatheredColumns
from threetowers.kernels.distributed.rank_group import BatchLayout, RankGroup
from threetowers.kernels.distributed.ring import RingColumns
from threetowers.kernels.operator.exclusions import Exclusions, group_labels, owner_labels
from threetowers.kernels.operator.margin import with_limits
from threetowers.kernels.operator.owners import Owners
from threetowers.kernels.operator.pair_state import PairState, TeacherState
from threetowers.kernels.operator.sigmoid import SigmoidOutputs, sigmoid_forward
from threetowers.kernels.operator.softmax import SoftmaxOutputs, TeacherOutputs, softmax_backward, softmax_forward
from threetowers.kernels.tiles.tile_backend import LogitMap
from threetowers.kernels.tiles.tiling import CachedTiles
from threetowers.kernels.validation import (
    check_owners,
    check_values,
    owner_facts,
    owner_faults,
    pair_faults,
    value_facts,
    value_faults,
)

NUM_EXCLUSIONS = len(fields(Exclusions))  # outputs of forward of each pair that say what is excluded
NUM_COMMON = 5  # outputs that are common to all pairs


def outputs_per_pair(kind: str) -> int:
    """Return how many of forward's outputs belong to each pair."""
    return len(SoftmaxOutputs._fields) if kind == "softmax" else len(SigmoidOutputs._fields)


def outputs_per_teacher(kind: str) -> int:
    """Return how many of forward's outputs belong to each teacher."""
    return len(TeacherOutputs._fields) if kind == "softmax" else 0


@torch.library.custom_op("threetowers::contrastive_forward", mutates_args=())
def contrastive_forward(
    x: list[Tensor],
    y: list[Tensor],
    log_scale: list[Tensor],
    bias: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    teacher_log_scale: list[Tensor],
    teacher_bias: list[Tensor],
    teacher_counts: list[int],
    teacher_weights: list[float],
    owner: list[Tensor | None],
    column_group_ids: list[Tensor | None],
    group_ids: Tensor | None,
    margin: float | None,
    kind: str,
    logit_cache_bytes: int,
    ring: bool,
    need_x: list[bool],
    need_y: list[bool],
    need_scale: list[bool],
    swapped: list[bool],
    check: bool,
) -> list[Tensor]:
    """Return losses, accuracies and what backward needs.

    teacher_weights: of a pair they sum to at most 1; what is missing to 1 is the weight of the samples' own pairs.
    owner: of the columns of each pair, as in `Pair`; pairs with owners are not swapped, and have no teachers.
    need_x, need_y, need_scale: which gradients are wanted. swapped: which pairs' sides the caller calls y and x.
    check: whether to raise where values do not fit.
    """
    with _on_device_of(x[0]):
        ranks = RankGroup()
        needs = need_x, need_y, need_scale

        # Hosts tell each other their sizes and layout: they agree, or all raise.
        fault = None
        if not ranks.serves(x[0].device):
            fault = (
                f"x is on {x[0].device}, which the default process group cannot send from; "
                "initialise it with a backend for that device, such as nccl for cuda"
            )
        shapes = [(part.shape[1], str(part.dtype), part.device.type) for part in [*x, *v]]
        layout = (
            f"{kind}, ring {ring}, check {check}, group_ids {group_ids is not None}, margin {margin}, widths {shapes}, "
            f"gradients {needs}, teachers {teacher_counts} of weights {teacher_weights}, "
            f"owners {_given(owner)}, column_group_ids {_given(column_group_ids)}"
        )
        sizes_WN = agree_on_sizes(ranks, fault, layout, [len(part) for part in x], [len(part) for part in y])

        # What lies on the device is judged there.
        teacher_swapped = [swap for swap, count in zip(swapped, teacher_counts, strict=True) for _ in range(count)]
        sides = zip([*x, *u], [*y, *v], swapped + teacher_swapped, strict=True)
        given = [(b, a) if swap else (a, b) for a, b, swap in sides]
        scalars = [*log_scale, *teacher_log_scale], [*bias, *teacher_bias]
        facts_N42 = value_facts([side[0] for side in given], [side[1] for side in given], *scalars)
        facts_WN42 = ranks.gather(facts_N42)
        faults_N = value_faults(facts_WN42, [a.shape[1] for a, _ in given], [a.dtype for a, _ in given])
        if check:
            check_values(faults_N, facts_WN42, teacher_counts)
        faults_K = pair_faults(faults_N, teacher_counts)

        owners = [Owners.of(part, len(side)) for part, side in zip(owner, x, strict=True)]
        if any(part is not None for part in owner):
            facts_WK3 = ranks.gather(owner_facts(owner, owners, x, y))
            if check:
                check_owners(facts_WK3)
            faults_K = faults_K + owner_faults(facts_WK3)
            counts_K2 = facts_WK3[:, :, :2].sum(0)
        else:
            counts_K2 = sizes_WN.sum(0).double().view(2, -1).T.contiguous()  # on the CPU, as numbers

        # The pairs as this rank sees them, and their losses.
        scalars_N2 = torch.stack([facts_N42[:, 0, 0].exp(), facts_N42[:, 1, 0]], 1)
        layouts = _batch_layouts(sizes_WN, ranks)
        labels = group_labels(ranks, None if all(_given(owner)) else group_ids, layouts[0][0])
        exclusions = _exclusions(ranks, owners, layouts, group_ids, column_group_ids)
        teachers = u, v, teacher_counts, teacher_weights
        pairs = _pair_states(x, y, owners, teachers, layouts, counts_K2, scalars_N2, exclusions, labels, needs)
        if margin is not None:
            pairs = with_limits(pairs, margin, ranks)
            limits = [(pair.exclusions.row_limits_b, pair.exclusions.col_limits_B) for pair in pairs]
            exclusions = [
                replace(part, row_limits_b=of_rows, col_limits_B=of_columns)
                for part, (of_rows, of_columns) in zip(exclusions, limits, strict=True)
            ]
        exchange = _column_exchange(ranks, pairs, ring)
        outputs: Sequence[SoftmaxOutputs | SigmoidOutputs]
        teacher_outputs: Sequence[TeacherOutputs] = []
        if kind == "softmax":
            outputs, teacher_outputs = softmax_forward(pairs, exchange, ranks, logit_cache_bytes)
            columns = exchange.kept()
        else:
            outputs = sigmoid_forward(pairs, exchange, ranks)
            columns = [side_bD.new_empty(0) for pair in pairs for side_bD in pair.columns]
        flat = [tensor for output in [*outputs, *teacher_outputs] for tensor in output]
        excluded = [tensor for part in exclusions for tensor in part.tensors()]
        return [*flat, *columns, *excluded, labels, sizes_WN, counts_K2, scalars_N2, faults_K]


@contextlib.contextmanager
def _on_device_of(x_bD: Tensor) -> Iterator[None]:
    """Make the features' device the current one, and autocast idle, which would turn the logits to half precision."""
    with torch.autocast(x_bD.device.type, enabled=False), torch.cuda.device_of(x_bD):  # type: ignore[no-untyped-call]
        yield


def _given(parts: Sequence[Tensor | None]) -> list[bool]:
    return [part is not None for part in parts]


Layouts = list[tuple[BatchLayout, BatchLayout]]
"""How the rows and the columns of each pair are divided among ranks."""


def _batch_layouts(sizes_WN: Tensor, ranks: RankGroup) -> Layouts:
    layouts = [BatchLayout(sizes_W.tolist(), ranks.rank) for sizes_W in sizes_WN.T]
    num_pairs = len(layouts) // 2
    return list(zip(layouts[:num_pairs], layouts[num_pairs:], strict=True))


def _exclusions(
    ranks: RankGroup,
    owners: Sequence[Owners],
    layouts: Layouts,
    group_ids: Tensor | None,
    column_group_ids: Sequence[Tensor | None],
) -> list[Exclusions]:
    """Return the labels of each pair whose columns have owners. Collective."""
    exclusions = []
    for of_pair, of_ranks, of_columns in zip(owners, layouts, column_group_ids, strict=True):
        if of_pair.owner_m is None:
            exclusions.append(Exclusions())
        else:
            exclusions.append(Exclusions(*owner_labels(ranks, of_pair, *of_ranks, group_ids, of_columns)))
    return exclusions


Teachers = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[int], Sequence[float]]
"""All pairs' teachers: u, v, how many each pair has, and their weights."""


def _pair_states(
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    owners: Sequence[Owners],
    teachers: Teachers,
    layouts: Layouts,
    counts_K2: Tensor,
    scalars_N2: Tensor,
    exclusions: Sequence[Exclusions],
    labels: Tensor,
    needs: tuple[Sequence[bool], Sequence[bool], Sequence[bool]],
) -> list[PairState]:
    need_x, need_y, need_scale = needs
    backends = {part.dtype: backend_for(part) for part in x}  # pairs take turns with one back end's scratch memory
    teacher_scalars = iter(zip(*teachers[:2], teachers[3], scalars_N2[len(x) :], strict=True))
    pairs = []
    for k in range(len(x)):
        backend = backends[x[k].dtype]
        states = []
        for u_bE, v_bE, weight, scalars_2 in itertools.islice(teacher_scalars, teachers[2][k]):
            logit_map = LogitMap.of(scalars_2, backend.dtype)
            states.append(TeacherState(u_bE, v_bE, scalars_2[0], scalars_2[1], logit_map, weight))
        excluded = exclusions[k]
        if owners[k].owner_m is None and len(labels):
            excluded = replace(excluded, row_labels_B=labels, col_labels_B=labels)
        row_layout, column_layout = layouts[k]
        scale, bias = scalars_N2[k].unbind()
        state = PairState(
            x_bD=x[k],
            y_bD=y[k],
            scale=scale,
            bias=bias,
            need_x=need_x[k],
            need_y=need_y[k],
            need_scale=need_scale[k],
            row_layout=row_layout,
            column_layout=column_layout,
            owners=owners[k],
            num_anchors=counts_K2[k, 0],
            num_owned=counts_K2[k, 1],
            exclusions=excluded,
            backend=backend,
            logit_map=LogitMap.of(scalars_N2[k], backend.dtype),
            teachers=tuple(states),
        )
        pairs.append(state)
    return pairs


def _column_exchange(
    ranks: RankGroup, pairs: Sequence[PairState], ring: bool, kept: Sequence[Tensor] | None = None
) -> ColumnExchange:
    if ring and ranks.size > 1:
        return RingColumns(ranks, pairs)
    return GatheredColumns(ranks, pairs, kept)


@torch.library.custom_op("threetowers::contrastive_backward", mutates_args=())
def contrastive_backward(
    grads: list[Tensor],
    x: list[Tensor],
    y: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    owner: list[Tensor | None],
    saved: list[Tensor],
    teacher_counts: list[int],
    teacher_weights: list[float],
    kind: str,
    ring: bool,
    need_x: list[bool],
    need_y: list[bool],
    need_scale: list[bool],
) -> list[Tensor]:
    """Return dx of all pairs, then dy, d log_scale and d bias of all pairs; empty where not wanted.

    grads: one 0-d gradient a pair. saved: what forward returned.
    """
    with _on_device_of(x[0]):
        if kind == "sigmoid":
            return _scaled_sigmoid_gradients(grads, saved, need_x, need_y, need_scale)
        ranks = RankGroup()
        labels, sizes_WN, counts_K2, scalars_N2, _ = saved[-NUM_COMMON:]
        sizes = [
            outputs_per_pair(kind) * len(x),
            outputs_per_teacher(kind) * len(u),
            len(x) + len(u),
            NUM_EXCLUSIONS * len(x),
        ]
        of_pairs, of_teachers, columns, excluded, _ = _split(saved, sizes)
        owners = [Owners.of(part, len(side)) for part, side in zip(owner, x, strict=True)]
        teachers = u, v, teacher_counts, teacher_weights
        layouts = _batch_layouts(sizes_WN, ranks)
        exclusions = [Exclusions.of_tensors(part) for part in _groups(excluded, NUM_EXCLUSIONS)]
        needs = need_x, need_y, need_scale
        pairs = _pair_states(x, y, owners, teachers, layouts, counts_K2, scalars_N2, exclusions, labels, needs)
        exchange = _column_exchange(ranks, pairs, ring, columns)
        outputs = [SoftmaxOutputs(*part) for part in _groups(of_pairs, outputs_per_pair(kind))]
        teacher_outputs = [TeacherOutputs(*part) for part in _groups(of_teachers, outputs_per_teacher(kind))]
        results = softmax_backward(pairs, outputs, teacher_outputs, grads, exchange)
        dx, dy, d_scale = (list(side) for side in zip(*results, strict=True))
        return [*dx, *dy, *d_scale, *(part.new_empty(0) for part in x)]


def _scaled_sigmoid_gradients(
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    need_x: Sequence[bool],
    need_y: Sequence[bool],
    need_scale: Sequence[bool],
) -> list[Tensor]:
    """Return forward's gradients times the incoming ones, as new tensors, in the order of `contrastive_backward`."""
    dx, dy, d_scale, d_bias = [], [], [], []
    for k, output in enumerate(_sigmoid_outputs(saved, len(grads))):
        dx.append(output.dx_bD * grads[k] if need_x[k] else output.dx_bD.new_empty(0))
        dy.append(output.dy_bD * grads[k] if need_y[k] else output.dy_bD.new_empty(0))
        d_scale.append(output.d_scale * grads[k] if need_scale[k] else output.d_scale.new_empty(0))
        d_bias.append(output.d_bias * grads[k])
    return [*dx, *dy, *d_scale, *d_bias]


def _groups(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    """Return consecutive groups of this size."""
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


def _sigmoid_outputs(outputs: Sequence[Tensor], num_pairs: int) -> list[SigmoidOutputs]:
    """Return the outputs of each pair."""
    n = outputs_per_pair("sigmoid")
    return [SigmoidOutputs(*part) for part in _groups(outputs[: n * num_pairs], n)]


def _dynamic_size() -> Any:
    """Return a size unknown before the operator runs: how many rows other ranks hold, how many tiles are cached."""
    try:
        return torch.library.get_ctx().new_dynamic_size()
    except torch._subclasses.fake_tensor.DynamicOutputShapeException as error:
        raise RuntimeError(
            "a loss over several ranks, or with logit_cache_bytes and a symbolic batch, has outputs whose "
            "size is known only when it runs, which this fake mode cannot express; trace it with torch.compile, or "
            "give FakeTensorMode a ShapeEnv with allow_dynamic_output_shape_ops"
        ) from error


@contrastive_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, log_scale, bias, u, v, teacher_log_scale, teacher_bias, teacher_counts, teacher_weights, owner,
    column_group_ids, group_ids, margin, kind, logit_cache_bytes, ring, need_x, need_y, need_scale, swapped, check,
):  # fmt: skip
    num_ranks = RankGroup().size
    alone = num_ranks == 1
    softmax = kind == "softmax"
    totals = [part.shape[0] if alone or not softmax else _dynamic_size() for part in y]
    outputs = []
    for k, (x_bD, y_bD) in enumerate(zip(x, y, strict=True)):
        batch, own_columns = x_bD.shape[0], y_bD.shape[0]
        dtype = torch.promote_types(x_bD.dtype, torch.float32)
        # loss, accuracies, sample losses
        outputs += [x_bD.new_empty(size, dtype=dtype) for size in ((), 2, batch)]
        if softmax:
            outputs += [x_bD.new_empty(size, dtype=dtype) for size in (batch, batch, totals[k], totals[k], own_columns)]
            cached: Any = 0
            if logit_cache_bytes and (need_x[k] or need_y[k] or need_scale[k]):
                # not where torch.compile keeps the batch open
                if alone and isinstance(batch, int) and isinstance(own_columns, int):
                    blocks, layers = [own_columns], 1 + teacher_counts[k]
                    cached = CachedTiles.size_within(logit_cache_bytes, backend_for(x_bD), batch, blocks, layers)
                    logit_cache_bytes -= cached * dtype.itemsize
                else:
                    cached = _dynamic_size()
            outputs.append(x_bD.new_empty(cached, dtype=dtype))
        else:
            outputs.append(torch.empty_like(x_bD) if need_x[k] else x_bD.new_empty(0))
            outputs.append(torch.empty_like(y_bD) if need_y[k] else y_bD.new_empty(0))
            outputs.append(x_bD.new_empty((), dtype=torch.float64) if need_scale[k] else x_bD.new_empty(0))
            outputs.append(x_bD.new_empty((), dtype=torch.float64))

    gathered = softmax and not alone and not ring
    columns = []
    rest = iter(v)
    for k, y_bD in enumerate(y):
        of_teachers = list(itertools.islice(rest, teacher_counts[k]))
        if softmax:
            batch, total = x[k].shape[0], totals[k]
            dtype = torch.promote_types(x[k].dtype, torch.float32)
            for _ in of_teachers:
                outputs += [y_bD.new_empty(size, dtype=dtype) for size in (batch, batch, total, total)]
        columns += [side.new_empty((totals[k], side.shape[1]) if gathered else 0) for side in [y_bD, *of_teachers]]
    labels = torch.empty(0, dtype=torch.int32)
    if group_ids is not None and not all(_given(owner)):
        labels = group_ids.new_empty(group_ids.shape if alone else _dynamic_size(), dtype=torch.int32)
    excluded = []
    for k, (x_bD, y_bD) in enumerate(zip(x, y, strict=True)):
        labelled, limited = owner[k] is not None, margin is not None
        rows = columns_of_all = 0
        if labelled:
            rows = x_bD.shape[0] if alone else _dynamic_size()
        if labelled or limited:
            columns_of_all = y_bD.shape[0] if alone else _dynamic_size()
        dtype = torch.promote_types(x_bD.dtype, torch.float32)
        parts = [(labelled, rows, torch.int32), (labelled, columns_of_all, torch.int32)]
        parts += [(limited, x_bD.shape[0], dtype), (limited, columns_of_all, dtype)]
        excluded += [x_bD.new_empty(n, dtype=kept) if given else torch.empty(0) for given, n, kept in parts]
    sizes_WN = torch.empty(num_ranks, 2 * len(x), dtype=torch.int64)
    counts_on = x[0].device if any(_given(owner)) else "cpu"
    counts_K2 = torch.empty(len(x), 2, dtype=torch.float64, device=counts_on)
    scalars_N2 = x[0].new_empty(len(x) + len(u), 2, dtype=torch.float64)
    faults_K = x[0].new_empty(len(x), dtype=torch.int32)
    return [*outputs, *columns, *excluded, labels, sizes_WN, counts_K2, scalars_N2, faults_K]


@contrastive_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grads, x, y, u, v, owner, saved, teacher_counts, teacher_weights, kind, ring, need_x, need_y, need_scale
):  # fmt: skip
    scalar = {"size": (), "dtype": torch.float64}
    dx = [torch.empty_like(part) if need else part.new_empty(0) for part, need in zip(x, need_x, strict=True)]
    dy = [torch.empty_like(part) if need else part.new_empty(0) for part, need in zip(y, need_y, strict=True)]
    d_scale = [
        part.new_empty(**scalar) if need else part.new_empty(0) for part, need in zip(x, need_scale, strict=True)
    ]
    d_bias = [part.new_empty(0) if kind == "softmax" else part.new_empty(**scalar) for part in x]
    return [*dx, *dy, *d_scale, *d_bias]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, y, log_scale, bias, u, v, _, _, ctx.teacher_counts, ctx.teacher_weights, owner, column_group_ids, *options = (
        inputs
    )
    ctx.owner_grads = _no_gradients(owner), _no_gradients(column_group_ids)
    _, _, ctx.kind, _, ctx.ring, ctx.need_x, ctx.need_y, ctx.need_scale, _, _ = options
    ctx.num_pairs = len(x)
    losses = {k * outputs_per_pair(ctx.kind) for k in range(len(x))}
    ctx.mark_non_differentiable(*(part for i, part in enumerate(output) if i not in losses))
    ctx.set_materialize_grads(False)  # else autograd fills zeros for every output, cached tiles included
    ctx.save_for_backward(*x, *y, *log_scale, *bias, *u, *v, *owner, *output)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n = ctx.num_pairs
    num_bias = n if ctx.kind == "sigmoid" else 0
    num_teachers = len(ctx.teacher_weights)
    sizes = [n, n, n, num_bias, num_teachers, num_teachers, n]
    x, y, log_scale, bias, u, v, owner, outputs = _split(ctx.saved_tensors, sizes)

    # A loss that nothing uses gets no gradient, and then its pair's inputs get none.
    per_pair = outputs_per_pair(ctx.kind)
    losses = outputs[: per_pair * n : per_pair]
    loss_grads = grads[: per_pair * n : per_pair]
    used = [grad is not None for grad in loss_grads]
    incoming = [torch.zeros_like(loss) if grad is None else grad for grad, loss in zip(loss_grads, losses, strict=True)]
    need_x = [need and is_used for need, is_used in zip(ctx.need_x, used, strict=True)]
    need_y = [need and is_used for need, is_used in zip(ctx.need_y, used, strict=True)]
    need_scale = [need and is_used for need, is_used in zip(ctx.need_scale, used, strict=True)]

    if ctx.kind == "sigmoid" and _is_only_reader(losses):
        flat = _scale_sigmoid_gradients_in_place(incoming, outputs)
    else:
        teachers = ctx.teacher_counts, ctx.teacher_weights
        needs = need_x, need_y, need_scale
        flat = contrastive_backward(incoming, x, y, u, v, owner, outputs, *teachers, ctx.kind, ctx.ring, *needs)

    # In the shapes of the inputs, and None where not wanted.
    dx, dy, d_scale, d_bias, _ = _split(flat, [n, n, n, n])
    x_grads = [grad if need else None for grad, need in zip(dx, need_x, strict=True)]
    y_grads = [grad if need else None for grad, need in zip(dy, need_y, strict=True)]
    scale_grads: list[Tensor | None] = [None] * n
    for k in range(n):
        if need_scale[k]:
            scale_grads[k] = d_scale[k].to(log_scale[k].dtype).view(log_scale[k].shape)
    bias_grads = [d_bias[k].to(bias[k].dtype).view(bias[k].shape) for k in range(num_bias)]
    teacher_grads = [[None] * len(part) for part in (u, v, u, v if num_bias else [])]
    no_weights: list[None] | None = None if num_teachers else []  # torch takes an empty list for one of tensors
    rest = None, no_weights, *ctx.owner_grads, *[None] * 10
    return x_grads, y_grads, scale_grads, bias_grads, *teacher_grads, *rest


def _no_gradients(parts: Sequence[Tensor | None]) -> list[None] | None:
    """Return the gradients of a list in which tensors may be left out: torch takes that for a single value."""
    return [None] * len(parts) if all(_given(parts)) else None


def _split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Return consecutive parts of these sizes, and the rest."""
    starts = [0, *itertools.accumulate(sizes)]
    return [list(tensors[start : start + size]) for start, size in zip(starts, [*sizes, len(tensors)], strict=True)]


def _is_only_reader(saved: Sequence[Tensor]) -> bool:
    """Return whether nothing reads what forward saved after this backward pass: no retain_graph, and not a trace."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    alone = keeps_graph is not None and not keeps_graph() and not torch.is_grad_enabled()
    return alone and all(type(part) is Tensor for part in saved)


def _scale_sigmoid_gradients_in_place(grads: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients in the order of `contrastive_backward`, in the memory in which forward left them.

    Only where nothing reads forward's outputs again. Gradients are then never in memory twice.
    """
    dx, dy, d_scale, d_bias = [], [], [], []
    for output, grad in zip(_sigmoid_outputs(outputs, len(grads)), grads, strict=True):
        dx.append(output.dx_bD.mul_(grad))
        dy.append(output.dy_bD.mul_(grad))
        d_scale.append(output.d_scale.mul_(grad))
        d_bias.append(output.d_bias.mul_(grad))
    return [*dx, *dy, *d_scale, *d_bias]


def _refuse_second_backward(ctx: Any, grads: list[Tensor]) -> NoReturn:
    raise RuntimeError(
        "the losses have no second derivative: call backward without create_graph, "
        "or use reference_contrastive_loss or reference_distillation_loss where one is needed"
    )


contrastive_forward.register_autograd(_backward, setup_context=_setup_context)
contrastive_backward.register_autograd(_refuse_second_backward)

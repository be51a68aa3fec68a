"""One pair term while it is being computed, and the steps that both families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from threetowers.kernels.distributed import ColumnGradients, Columns, RankGroup, ReducedGradients, Shards
from threetowers.kernels.ring import RingGradients
from threetowers.kernels.tiles import LOG2E, TileBackend
from threetowers.kernels.tiling import TileBlock, finish_gradient, inner_product, positive_dots


@dataclass(frozen=True, slots=True)
class Term:
    """A pair term as one rank sees it."""

    index: int
    x_bD: Tensor
    y_bD: Tensor
    scale: float
    bias: float
    need_x: bool
    need_y: bool
    need_scale: bool
    shards: Shards
    labels_B: Tensor | None
    backend: TileBackend

    @property
    def batch(self) -> int:
        """Own rows."""
        return len(self.x_bD)

    @property
    def needs_gradient(self) -> bool:
        """Whether any gradient has to go through the tiles."""
        return self.need_x or self.need_y or self.need_scale

    def block(self, columns: Columns, rank: int) -> TileBlock:
        """Own rows against the columns that this rank holds."""
        y_sD = columns.shard(self.index, rank)
        starts = self.shards.starts
        return TileBlock(self.x_bD, y_sD, starts[self.shards.rank], starts[rank], self.scale, self.bias, self.labels_B)

    def vector(self, n: int, value: float = 0.0) -> Tensor:
        """A new vector for statistics."""
        return torch.full((n,), value, dtype=self.backend.dtype, device=self.x_bD.device)

    def positives(self) -> tuple[Tensor, Tensor]:
        """Dots of the positives (b,), and by how much a base-2 logit must exceed another to count as above it.

        The margin covers the rounding of a dot product, so that a tie (a repeated caption) never counts as a win.
        """
        dot_b, norms_b = positive_dots(self.x_bD, self.y_bD, self.backend.dtype)
        return dot_b, norms_b * (8 * torch.finfo(self.backend.dtype).eps * self.scale * LOG2E)

    def row_gradient(self) -> Tensor | None:
        """Zeroed dx (b, D) where tiles have to fill it; None where not.

        The scale's gradient follows from either side's: if neither side wants one, dx is computed for it.
        """
        want = self.need_x or (self.need_scale and not self.need_y)
        return self.zero_rows(self.batch) if want else None

    def zero_rows(self, rows: int) -> Tensor:
        """Zeros (rows, D) to accumulate gradients in."""
        return self.vector(rows * self.x_bD.shape[1]).view(rows, self.x_bD.shape[1])

    def gradients(
        self, dx_bD: Tensor | None, dy_bD: Tensor | None, pull_b: Tensor, gain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dy (in the features' dtype) and d log_scale (0-d) from the tiles' sums, in place; empty where not wanted.

        pull_b: minus the derivative by the positive's logit. gain: 0-d factor on everything.
        """
        factor, d_scale = gain * self.scale, self.x_bD.new_empty(0)
        if dy_bD is not None:
            finish_gradient(dy_bD, self.x_bD, pull_b, factor)
        if dx_bD is not None:
            finish_gradient(dx_bD, self.y_bD, pull_b, factor)
        if self.need_scale:  # from either side
            own_bD, grad_bD = (self.y_bD, dy_bD) if dx_bD is None else (self.x_bD, dx_bD)
            d_scale = (
                self.x_bD.new_zeros((), dtype=torch.float64) if grad_bD is None else inner_product(own_bD, grad_bD)
            )
        dx = dx_bD.to(self.x_bD.dtype) if self.need_x and dx_bD is not None else self.x_bD.new_empty(0)
        dy = self.y_bD.new_empty(0) if dy_bD is None else dy_bD.to(self.y_bD.dtype)
        return dx, dy, d_scale


def reduce_totals(totals: Sequence[Tensor], ranks: RankGroup) -> list[Tensor]:
    """Sums over ranks of each term's (loss sum, rows won, columns won), float64."""
    totals_k3 = torch.stack(list(totals))
    ranks.sum_(totals_k3)
    return list(totals_k3.unbind())


def totals_of(loss_b: Tensor, wins_xy_b: Tensor, wins_yx_b: Tensor) -> Tensor:
    """(loss sum, rows won, columns won) of the own rows, float64."""
    return torch.stack([part_b.sum(dtype=torch.float64) for part_b in (loss_b, wins_xy_b, wins_yx_b)])


def reduced_loss(term: Term, loss_b: Tensor, total_3: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The loss in its final shape and the two accuracies (2,)."""
    dtype, batch = term.backend.dtype, term.shards.total
    accuracy_2 = (total_3[1:] / batch).to(dtype)
    if reduction == "none":
        return loss_b, accuracy_2
    return (total_3[0] / batch if reduction == "mean" else total_3[0].clone()).to(dtype), accuracy_2


def uniform_gain(term: Term, grad: Tensor, reduction: str) -> Tensor:
    """What one rank multiplies its gradients by so that their mean over ranks is that of the joined batch."""
    ranks = len(term.shards.sizes)
    return grad * (ranks / term.shards.total if reduction == "mean" else ranks)


def sample_weights(term: Term, grad_b: Tensor, ranks: RankGroup) -> tuple[Tensor, Tensor]:
    """Per-sample loss weights of the global batch (B,), scaled to at most 1, and the 0-d factor taken out of them."""
    weights_B = term.shards.join(ranks.gather(term.shards.pad(grad_b.to(term.backend.dtype))))
    gain = weights_B.abs().amax()
    return weights_B / torch.where(gain == 0, 1, gain), gain


def column_gradients(terms: Sequence[Term], ranks: RankGroup, wanted: bool, ring: bool) -> ColumnGradients:
    """Where to add column gradients; nowhere, if none are wanted."""
    zeros = [term.zero_rows if wanted and term.need_y else None for term in terms]
    kind = RingGradients if ring else ReducedGradients
    return kind(ranks, [term.shards for term in terms], zeros)


def visit_shards(
    terms: Sequence[Term],
    columns: Columns,
    gradients: ColumnGradients,
    work: Callable[[int, TileBlock, Tensor | None], None],
) -> None:
    """Call work(term's index, block, column gradient's target) for every shard, and send what they added."""
    for group in gradients.groups:
        for step, rank in enumerate(columns.order):
            for k in group:
                work(k, terms[k].block(columns, rank), gradients.target(k, rank))
            gradients.passed(group, step)


def softplus(z_n: Tensor) -> Tensor:
    """log(1 + exp(z)) with full relative accuracy at both ends; 0 at -inf."""
    return z_n.clamp(min=0) + torch.log1p(torch.exp(-z_n.abs()))

"""One pair while its loss is being computed, and the steps that softmax and sigmoid share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from threetowers.kernels.distributed.rank_group import BatchLayout, RankGroup
from threetowers.kernels.operator.exclusions import Exclusions
from threetowers.kernels.operator.owners import Owners
from threetowers.kernels.tiles.tile_backend import LogitMap, TileBackend, spans

ROWS = 4096  # rows at once in the O(b D) loops below: bounds their temporaries


@dataclass(frozen=True, slots=True)
class TeacherState:
    """A teacher of a pair as one rank sees it: its features, how their dots become logits, its share of the target."""

    u_bE: Tensor
    v_bE: Tensor
    scale: Tensor  # 0-d, float64
    bias: Tensor
    logit_map: LogitMap
    weight: float  # all of a pair's and the weight of its own pairs (λ) sum to 1

    def positives(self, dtype: torch.dtype) -> Tensor:
        """Return the dots (b,) of the samples' own pairs."""
        return own_dots(self.u_bE, self.v_bE, dtype)[0]


@dataclass(frozen=True, slots=True)
class PairState:
    """A pair as one rank sees it: its features, how dots become logits, and which gradients are wanted."""

    x_bD: Tensor
    y_bD: Tensor
    scale: Tensor  # 0-d, float64
    bias: Tensor
    need_x: bool
    need_y: bool
    need_scale: bool
    row_layout: BatchLayout
    column_layout: BatchLayout
    owners: Owners
    num_anchors: Tensor  # 0-d, float64: rows, and columns, of the global batch that have a positive
    num_owned: Tensor
    exclusions: Exclusions
    backend: TileBackend
    logit_map: LogitMap
    teachers: tuple[TeacherState, ...] = ()

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The own columns of the pair and of each teacher: what other ranks need. Only the first gets a gradient."""
        return self.y_bD, *(teacher.v_bE for teacher in self.teachers)

    @property
    def needs_gradient(self) -> bool:
        """Whether any gradient has to go through the tiles."""
        return self.need_x or self.need_y or self.need_scale

    def vector(self, n: int, value: float = 0.0) -> Tensor:
        """Return a new vector for statistics."""
        return torch.full((n,), value, dtype=self.backend.dtype, device=self.x_bD.device)

    def zero_rows(self, rows: int) -> Tensor:
        """Return zeros (rows, D) to accumulate gradients in."""
        return self.vector(rows * self.x_bD.shape[1]).view(rows, self.x_bD.shape[1])

    def zero_row_gradient(self) -> Tensor | None:
        """Return a zeroed dx (b, D) where tiles have to fill it; None where not.

        The scale's gradient follows from either side's: if neither side needs one, dx is computed for it.
        """
        if self.need_x or (self.need_scale and not self.need_y):
            return self.zero_rows(len(self.x_bD))
        return None

    def positives(self) -> tuple[Tensor, Tensor]:
        """Return the dots of the own columns with their owners, (m,), and what rounding may add to each, (m,).

        A dot must exceed another by that to count as above it, so that a tie (a repeated caption) never counts as a
        win. Columns without an owner have any value.
        """
        dtype = self.backend.dtype
        dot_m = torch.empty(len(self.y_bD), dtype=dtype, device=self.x_bD.device)
        slack_m = torch.empty_like(dot_m)
        for j in spans(len(dot_m), ROWS):
            dot_m[j], norms_c = own_dots(self.owners.of_columns(self.x_bD, j), self.y_bD[j], dtype)
            slack_m[j] = norms_c * (8 * torch.finfo(dtype).eps)
        return dot_m, slack_m

    def finish_gradients(
        self, dx_bD: Tensor | None, dy_bD: Tensor | None, attraction_m: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx and dy (in the features' dtype) and d log_scale (0-d); empty where not wanted.

        Args:
            dx_bD: the tiles' sums for x, changed in place.
            dy_bD: the tiles' sums for y, changed in place.
            attraction_m: minus the derivative of the loss by each column's logit with its owner; 0 without one.
            factor: 0-d, multiplies everything.
        """
        # The positives entered no tile: their part is added here.
        scaled = factor * self.scale
        if dy_bD is not None:
            for j in spans(len(dy_bD), ROWS):
                _add_positives(dy_bD[j], self.owners.of_columns(self.x_bD, j), attraction_m[j], scaled)
        if dx_bD is not None and self.owners.owner_m is not None:
            attracted_bD = self.owners.weighted_sums(self.y_bD.to(dx_bD.dtype), attraction_m)
            dx_bD.sub_(attracted_bD).mul_(scaled)
        elif dx_bD is not None:
            for i in spans(len(dx_bD), ROWS):
                _add_positives(dx_bD[i], self.y_bD[i], attraction_m[i], scaled)

        # The scale's gradient is the inner product of either side with its gradient.
        d_scale = self.x_bD.new_empty(0)
        if self.need_scale:
            if dx_bD is not None:
                d_scale = _inner_product(self.x_bD, dx_bD)
            elif dy_bD is not None:
                d_scale = _inner_product(self.y_bD, dy_bD)
            else:
                d_scale = self.x_bD.new_zeros((), dtype=torch.float64)

        dx = self.x_bD.new_empty(0)
        if self.need_x and dx_bD is not None:
            dx = dx_bD.to(self.x_bD.dtype)
        dy = self.y_bD.new_empty(0) if dy_bD is None else dy_bD.to(self.y_bD.dtype)
        return dx, dy, d_scale

    def gradient_factor(self, grad: Tensor, count: float | Tensor) -> Tensor:
        """Return what one rank multiplies its gradients by, so that their mean over ranks is the joined batch's.

        count: what the sum over the joined batch is divided by.
        """
        return grad * (len(self.row_layout.sizes) / count)


def own_dots(x_bD: Tensor, y_bD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the dots (b,) of the samples' own pairs, and the products of their norms.

    The dots are diagonals of small products, not sums of elementwise products: under a large offset common to all
    logits their rounding is then close to the negatives' rounding, and cancels.
    """
    dot_b = torch.empty(len(x_bD), dtype=dtype, device=x_bD.device)
    norms_b = torch.empty_like(dot_b)
    for i in spans(len(dot_b), ROWS):
        x_rD = x_bD[i].to(dtype)
        y_rD = y_bD[i].to(dtype)
        norms_b[i] = torch.linalg.vector_norm(x_rD, dim=1) * torch.linalg.vector_norm(y_rD, dim=1)
        # Products of 64 rows each, and one of the rows left over.
        whole = len(x_rD) // 64 * 64
        x_n64D = x_rD[:whole].reshape(-1, 64, x_rD.shape[1])
        y_n64D = y_rD[:whole].reshape(-1, 64, y_rD.shape[1])
        whole_n64 = torch.bmm(x_n64D, y_n64D.mT).diagonal(dim1=1, dim2=2)
        rest_r = (x_rD[whole:] @ y_rD[whole:].T).diagonal()
        dot_b[i] = torch.cat([whole_n64.flatten(), rest_r])
    return dot_b, norms_b


def _add_positives(grad_rD: Tensor, other_rD: Tensor, attraction_r: Tensor, scaled: Tensor) -> None:
    """In place: ``grad = scaled * (grad - attraction * other)``."""
    grad_rD.addcmul_(other_rD.to(grad_rD.dtype), attraction_r[:, None], value=-1).mul_(scaled)


def _inner_product(x_bD: Tensor, dx_bD: Tensor) -> Tensor:
    """Return ``Σ_i <x_i, dx_i>``, with the rows summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=dx_bD.device)
    for i in spans(len(x_bD), ROWS):
        total += (x_bD[i].to(dx_bD.dtype) * dx_bD[i]).sum(1).sum(dtype=torch.float64)
    return total


def sample_totals(loss_b: Tensor, won_xy_b: Tensor, won_yx_b: Tensor) -> Tensor:
    """Return the sums over the own samples of their losses, and of the rows and the columns won: (3,), float64."""
    return torch.stack([part_b.sum(dtype=torch.float64) for part_b in (loss_b, won_xy_b, won_yx_b)])


def mean_losses(
    pairs: Sequence[PairState], totals: Sequence[Tensor], counts: Sequence[float | Tensor], ranks: RankGroup
) -> list[tuple[Tensor, Tensor]]:
    """Return each pair's mean loss (0-d) and its two accuracies (2,), from the `sample_totals` of every rank.

    counts: what the sum of each pair's losses is divided by.
    """
    totals_k3 = torch.stack(list(totals))
    ranks.sum_(totals_k3)
    results = []
    for pair, (loss, won_xy, won_yx), count in zip(pairs, totals_k3, counts, strict=True):
        accuracy_2 = torch.stack([won_xy / pair.num_anchors, won_yx / pair.num_owned])
        results.append(((loss / count).to(pair.backend.dtype), accuracy_2.to(pair.backend.dtype)))
    return results

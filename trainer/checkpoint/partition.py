"""This rank's share of the full-precision parameters and the optimizer's state, whatever the ZeRO stage.

DeepSpeed keeps them flat and cut: from stage 1 on the optimizer works on long vectors, in which a rank holds a piece of
some parameters. A piece says where it lies in both: in its parameter, by name, and in the vector that holds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed


@dataclass(frozen=True)
class Piece:
    """`numel` values from `start` of a flattened parameter are those from `offset` of the flattened `holder`."""

    name: str
    start: int
    numel: int
    holder: Tensor  # full precision; the optimizer's own key for its state
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The view of this piece in the holder, or in a state tensor of the holder's size."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer inside DeepSpeed's wrappers."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def replicated(engine: Any) -> bool:
    """Whether every rank holds all pieces (stage 0)."""
    return int(engine.zero_optimization_stage()) == 0


def pieces(engine: Any) -> Iterator[Piece]:
    """Yield this rank's pieces, in the order of the model's parameters."""
    stage = int(engine.zero_optimization_stage())
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            if stage == 0:
                piece: Piece | None = Piece(name, 0, p.numel(), p, 0)
            else:
                piece = (_partitioned if stage == 3 else _cut)(engine.optimizer, name, p)
            if piece is not None and piece.numel > 0:
                yield piece


def _cut(optimizer: Any, name: str, p: Any) -> Piece | None:
    """Stages 1 and 2: a group's parameters one after the other, cut into equal shares wherever the cuts fall."""
    if p._hp_mapping is None:  # all of it lies on other ranks
        return None
    inside, outside = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    holder = optimizer.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
    return Piece(name, inside.start, inside.numel, holder, outside.start)


def _partitioned(optimizer: Any, name: str, p: Any) -> Piece:
    """Stage 3: every parameter cut into equal shares, the last ones padded."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
    start = distributed.get_rank() * size
    return Piece(name, start, min(size, p.ds_numel - start), optimizer.fp32_partitioned_groups_flat[group], offset)

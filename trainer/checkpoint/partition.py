"""This rank's share of the full-precision parameters and the optimizer's state, at any ZeRO stage.

DeepSpeed keeps them flattened and partitioned: from stage 1 on the optimizer works on long buffers, in which a rank
holds fragments of some parameters. A fragment is located in both: in its parameter, by name, and in the buffer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed


@dataclass(frozen=True)
class Fragment:
    """`numel` values of a flattened parameter from `start`, held in the flattened `buffer` from `offset`."""

    name: str
    start: int
    numel: int
    buffer: Tensor  # full precision; the optimizer's own key for its state
    offset: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return this fragment of the buffer, or of a state tensor of the buffer's size, as a flat view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def inner_optimizer(engine: Any) -> Any:
    """Return the torch optimizer inside DeepSpeed's wrappers."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def is_replicated(engine: Any) -> bool:
    """Return whether every rank holds all fragments (stage 0)."""
    return int(engine.zero_optimization_stage()) == 0


def fragments(engine: Any) -> Iterator[Fragment]:
    """Yield this rank's fragments, in the order of the model's parameters."""
    stage = int(engine.zero_optimization_stage())
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            continue
        if stage == 0:
            fragment: Fragment | None = Fragment(name, 0, p.numel(), p, 0)
        elif stage == 3:
            fragment = _stage_3_fragment(engine.optimizer, name, p)
        else:
            fragment = _stage_1_fragment(engine.optimizer, name, p)
        if fragment is not None and fragment.numel > 0:
            yield fragment


def _stage_1_fragment(optimizer: Any, name: str, p: Any) -> Fragment | None:
    """Stages 1 and 2: a group's parameters in a row, cut into equal shares, also in the middle of a parameter."""
    if p._hp_mapping is None:  # all of it lies on other ranks
        return None
    in_parameter = p._hp_mapping.lp_fragment_address
    in_buffer = p._hp_mapping.hp_fragment_address
    buffer = optimizer.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
    return Fragment(name, in_parameter.start, in_parameter.numel, buffer, in_buffer.start)


def _stage_3_fragment(optimizer: Any, name: str, p: Any) -> Fragment:
    """Stage 3: every parameter cut into equal shares, the last ones padded."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(p)]
    start = distributed.get_rank() * size
    numel = min(size, p.ds_numel - start)
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)

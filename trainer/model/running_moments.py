"""The running moments of a model's batch norms: which passes count in them, and how ranks agree on them.

Each rank normalises by the statistics of its own samples, and keeps running moments of its own; what is saved or
evaluated has their mean over the ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn

NAMES = ("running_mean", "running_var", "num_batches_tracked")  # torch's, which timm's own norms use too


def running_moments(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass in training mode updates."""
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in NAMES]


def remember_running_moments(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives the running moments the values back that they have now.

    Call it once no graph is left that reads them: autograd would find them changed.
    """
    moments = running_moments(model)
    values = [moment.clone() for moment in moments]

    @torch.no_grad()
    def restore() -> None:
        for moment, value in zip(moments, values, strict=True):
            moment.copy_(value)

    return restore


@contextmanager
def running_moments_kept(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Let forward passes in between not count in the running moments."""
    restore = remember_running_moments(model) if enabled else None
    try:
        yield
    finally:
        if restore is not None:
            restore()


def average_running_moments(model: nn.Module) -> None:
    """Replace the running moments, of which each rank has its own, by their mean over the ranks. Collective."""
    world = distributed.get_world_size()
    if world == 1:
        return
    for moment in running_moments(model):
        if moment.is_floating_point():
            distributed.all_reduce(moment)
            moment /= world

"""The L2 form of a pair term: features are pulled onto each other directly, without negatives."""

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup


def transfer_loss(x_bD: Tensor, y_bD: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return the mean of |x - y|^2 over the samples of all ranks, a float32 scalar; 2 - 2 cos for unit-norm features.

    The value is the same on all ranks. Gradients are scaled for the averaging of DDP and DeepSpeed: averaged over
    ranks, they are those of one process with the joined batch, also when local batches differ. At least one rank must
    have a sample.
    """
    total = (x_bD.float() - y_bD.float()).square().sum()
    if not distributed.is_initialized():
        return total / len(x_bD)
    joined = torch.stack([total.detach(), total.new_tensor(len(x_bD))])
    distributed.all_reduce(joined, group=group)
    mine = total * (distributed.get_world_size(group) / joined[1])
    return (mine - mine.detach()) + joined[0] / joined[1]

"""Backward passes of the smallest strided 1x1 convolutions, under whatever watches the heap; prints nothing.

    python tests/trainer/pointwise_steps.py bare|subsampled CHANNELS...

Ends as the heap does, and with 1 where a weight gradient differs from that in float64.
"""

import sys

import torch
from torch import nn

from threetowers.trainer.model.towers.pointwise import subsample_before_pointwise

STEPS = 40


def run(kind: str, channels: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 8, 1, stride=2, bias=False)
    twin = nn.Conv2d(channels, 8, 1, stride=2, bias=False).double()
    twin.load_state_dict(conv.state_dict())
    if kind == "subsampled":
        subsample_before_pointwise(conv)
    for _ in range(STEPS):
        x_bchw = torch.randn(4, channels, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
        for module, x in ((conv, x_bchw), (twin, x_bchw.detach().double())):
            module.zero_grad()
            module(x).square().sum().backward()
        assert conv.weight.grad is not None
        assert twin.weight.grad is not None
        torch.testing.assert_close(conv.weight.grad.double(), twin.weight.grad, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)  # with two, the faulty implementation may wait for ever
    for number in sys.argv[2:]:
        run(sys.argv[1], int(number))

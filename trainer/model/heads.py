"""Heads: the small maps between towers and the spaces in which they are compared."""

from torch import nn

from threetowers.trainer.config import Head


def build_head(head: Head, width: int, dim: int) -> tuple[nn.Module, int]:
    """Return a head on features of `width`, and the width of what it gives; `dim` is the run's.

    An mlp is `depth` times (linear, GELU), then linear.
    """
    if head.kind == "none":
        return nn.Identity(), width
    out = head.embed_dim or dim
    if head.kind == "linear":
        return nn.Linear(width, out, bias=head.bias), out
    layers: list[nn.Module] = []
    hidden = head.hidden or width
    for number in range(head.depth):
        layers += [nn.Linear(hidden if number else width, hidden, bias=head.bias), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out, bias=head.bias)), out

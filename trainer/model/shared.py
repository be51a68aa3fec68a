"""Parameters that two towers have in common (MS-CLIP, arXiv 2207.12661): the same objects in both."""

from typing import Any

from torch import nn

from threetowers.trainer.config import Share


def share_blocks(receiver: Any, donor: Any, share: Share) -> None:
    """Give the receiver's transformer blocks the parameters of the donor's, paired from the last block back.

    Parameters are shared, not modules: under ZeRO 3 each module fetches and releases its own parameters.
    Raises ValueError when there are fewer blocks than asked for, or when their shapes differ.
    """
    count = min(len(receiver), len(donor)) if share.blocks is None else share.blocks
    if count > min(len(receiver), len(donor)):
        raise ValueError(f"share.blocks: {count}, but the towers have {len(receiver)} and {len(donor)} blocks")
    for mine, theirs in zip(list(receiver)[-count:], list(donor)[-count:], strict=True):
        for name in share.modules:
            _share(getattr(mine, name), getattr(theirs, name), name)


def _share(receiver: nn.Module, donor: nn.Module, what: str) -> None:
    ours, theirs = dict(receiver.named_parameters()), dict(donor.named_parameters())
    shapes = {name: (ours[name].shape, theirs[name].shape) for name in ours.keys() & theirs.keys()}
    if ours.keys() != theirs.keys() or any(a != b for a, b in shapes.values()):
        differ = sorted(ours.keys() ^ theirs.keys()) or [f"{n}: {tuple(a)}, {tuple(b)}" for n, (a, b) in shapes.items()]
        raise ValueError(f"share: the {what} of the two towers differ ({'; '.join(differ)}); give them one width")
    for name, parameter in theirs.items():
        path, _, leaf = name.rpartition(".")
        setattr(receiver.get_submodule(path), leaf, parameter)

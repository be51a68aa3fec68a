"""Parameters shared by two towers (MS-CLIP, arXiv 2207.12661): the same objects in both."""

from typing import Any

from torch import nn

from threetowers.trainer.config import Share


def share_blocks(receiver: Any, donor: Any, share: Share) -> None:
    """Give the receiver's transformer blocks the parameters of the donor's, paired from the last block back.

    Parameters are shared, not modules: under ZeRO 3 each module fetches and releases its own parameters.

    Raises:
        ValueError: If there are fewer blocks than asked for, or their shapes differ.
    """
    available = min(len(receiver), len(donor))
    count = available if share.blocks is None else share.blocks
    if count > available:
        raise ValueError(
            f"share.blocks: {count}, but the towers have {len(receiver)} and {len(donor)} blocks; lower it to "
            f"{available} or less"
        )
    for receiver_block, donor_block in zip(list(receiver)[-count:], list(donor)[-count:], strict=True):
        for name in share.modules:
            _share_parameters(getattr(receiver_block, name), getattr(donor_block, name), name)


def _share_parameters(receiver: nn.Module, donor: nn.Module, module: str) -> None:
    """Replace the receiver's parameters by the donor's of the same name."""
    received = {name: tuple(p.shape) for name, p in receiver.named_parameters()}
    donated = {name: tuple(p.shape) for name, p in donor.named_parameters()}
    if received != donated:
        differ = [
            f"{name}: {received.get(name)}, {donated.get(name)}"
            for name in sorted(received | donated)
            if received.get(name) != donated.get(name)
        ]
        raise ValueError(f"share: {module} differs between the two towers ({'; '.join(differ)}); give them one width")
    for name, parameter in donor.named_parameters():
        path, _, leaf = name.rpartition(".")
        setattr(receiver.get_submodule(path), leaf, parameter)

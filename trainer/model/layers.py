"""The layers of a tower from its input up, of which the lower ones may be frozen, or learn more slowly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

WITH_PREVIOUS = (99999,)  # by which timm marks what belongs to the layer before it
ABOVE = "run"  # no parameter's name: as timm does not know it, it is above all layers


@dataclass(frozen=True)
class Layers:
    """The layers of n blocks, as timm numbers them.

    Layer 0 is what is before the first block: stem, token and position embeddings. Layers 1 to n are the blocks, with a
    final norm in the last one. Layer n + 1 is what follows them, if anything, and the heads of the run.

    Attributes:
        numbers: The layer of each parameter, by its name in the tower.
        blocks: Their number n.
    """

    numbers: Mapping[str, int]
    blocks: int

    @property
    def above(self) -> int:
        """The layer above the last block."""
        return self.blocks + 1


def number_layers(tower: nn.Module, matcher: Any, prefix: str = "") -> Layers:
    """Return the layers of a tower.

    Args:
        tower: The tower.
        matcher: Patterns of the names of its parameters, stem first, as timm's `group_matcher` gives them.
        prefix: Of its parameters' names, of which the patterns know nothing.

    Raises:
        ValueError: The patterns find no blocks.
    """
    named = [(name.removeprefix(prefix), None) for name, _ in tower.named_parameters()]
    numbers: dict[str, int] = group_with_matcher([*named, (ABOVE, None)], matcher, reverse=True)
    above = numbers.pop(ABOVE)
    if above < 2:
        raise ValueError(f"{type(tower).__name__} has no blocks")
    return Layers({prefix + name: number for name, number in numbers.items()}, above - 1)

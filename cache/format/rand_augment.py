"""RandAugment: the policy that draws the operations of an augmented view."""

import re
from dataclasses import dataclass
from typing import Self

import numpy as np

from threetowers.cache.format.image_ops import OPS, OpParams

NO_AUGMENT = "none"
MAX_OPS = 8
MAX_MAGNITUDE = 30


@dataclass(frozen=True)
class RandAugment:
    """`num_ops` operations in a row, each drawn from all of `image_ops.OPS`, at one magnitude of 0 to 30.

    Written `randaugment:OPS:MAGNITUDE`. Source: Cubuk et al., RandAugment (2020).
    """

    num_ops: int
    magnitude: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Return the policy of this name; None for `none`.

        Raises:
            ValueError: for any other text.
        """
        if text == NO_AUGMENT:
            return None
        found = re.fullmatch(r"randaugment:([0-9]{1,2}):([0-9]{1,2})", text)
        num_ops, magnitude = map(int, found.groups()) if found else (0, 0)
        if not 1 <= num_ops <= MAX_OPS or magnitude > MAX_MAGNITUDE:
            raise ValueError(
                f"augment {text!r}: expected {NO_AUGMENT}, or randaugment:OPS:MAGNITUDE with 1 to {MAX_OPS} operations "
                f"and a magnitude of 0 to {MAX_MAGNITUDE}, as randaugment:2:9"
            )
        return cls(num_ops, magnitude)

    def draw(self, rng: np.random.Generator) -> OpParams:
        """Draw the ids and values of the operations, (2 · num_ops,): id, value, id, value, ..."""
        numbers: list[float] = []
        for _ in range(self.num_ops):
            op_id = int(rng.random() * len(OPS))
            sign = 1 if rng.random() < 0.5 else -1
            numbers += [op_id, OPS[op_id].value(self.magnitude / MAX_MAGNITUDE, sign)]
        return np.array(numbers, np.float32)

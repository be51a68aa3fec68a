"""What may look at a model while it trains. The trainer knows no evaluation: the command line hands them in."""

from collections.abc import Mapping
from typing import Protocol

from threetowers.trainer.model.model import TowerModel


class Evaluator(Protocol):
    """A callable with a name. Every rank calls it; it may use collectives."""

    name: str

    def every(self, samples: int, batch: int, steps: int) -> int:
        """Return after how many steps it is due again, in a run of `steps` steps over `samples`."""
        ...

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        """Return metrics of the model, in evaluation mode with whole parameters, after `step` steps."""
        ...

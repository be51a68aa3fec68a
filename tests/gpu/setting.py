"""What a step is given: where it computes, at which sizes, and where its figures go."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Setting:
    """The surroundings of one step.

    Attributes:
        step: name of the step, which stands beside each of its figures.
        results: file of JSON lines, to which all steps append.
        scratch: folder of everything that only steps read: tars, caches, runs. Removed in the end.
        rehearse: whether this is the CPU, at tiny sizes, to test the steps themselves.
    """

    step: str
    results: Path
    scratch: Path
    rehearse: bool

    @property
    def device(self) -> "torch.device":
        """Where the step computes. Asked for by a step only: the driver must leave CUDA alone, or it could not fork."""
        import torch

        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    def record(self, figure: str, value: float, unit: str) -> None:
        """Keep a measured figure, and print it to the step's log."""
        print(f"{figure}: {value:.4g} {unit}", flush=True)
        self._append({"figure": figure, "value": float(value), "unit": unit})

    def skip(self, what: str, why: str) -> None:
        """Say that a part of the step was not done, and why. The summary lists it."""
        print(f"not done: {what}: {why}", flush=True)
        self._append({"skipped": what, "why": why})

    def gpu_only(self, what: str) -> bool:
        """Return whether a part that needs a GPU can be done; in a rehearsal it is skipped by its name."""
        if self.rehearse:
            self.skip(what, "needs a GPU")
        return not self.rehearse

    def _append(self, fields: dict[str, object]) -> None:
        with self.results.open("a") as lines:  # one short write each: processes of a step do not cut each other's lines
            lines.write(json.dumps({"step": self.step, **fields}) + "\n")

"""Trains runs on as many ranks as the launch has, and prints the host waits of their steps.

    torchrun --nproc-per-node 2 tests/trainer/waiting_runs.py CONFIG...

A step goes from one batch to the next. The first ones, in which operators are set up, and the last one, which saves, do
not count. Where samples may lack a tower, some do, in each step others, and in one step all of a rank. Prints one JSON
line a run and rank: {"config": file, "rank": r, "steps": [[wait, ...], ...]}.
"""

import json
import sys
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch

from tests.trainer.host_waits import host_waits
from threetowers.cache.processes.world import World
from threetowers.trainer.config import load_config
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.engine import join_process_group, leave_process_group
from threetowers.trainer.train import Trainer

FIRST_STEPS = 2


class WatchedTrainer(Trainer):
    """A trainer that notes the host waits of each step."""

    def _batches(self) -> Generator[Batch, None, None]:
        self.waits: list[list[str]] = []
        for number, batch in enumerate(super()._batches()):
            with host_waits() as found:
                yield without_rows(batch, number, self.world)
            self.waits.append(found)


def without_rows(batch: Batch, number: int, world: World) -> Batch:
    """Take the rows of some samples away, from the towers that may lack them."""

    def mask(has_b: torch.Tensor) -> torch.Tensor:
        if number == FIRST_STEPS and world.rank == world.size - 1:
            return torch.zeros_like(has_b)
        return has_b & (torch.arange(len(has_b)) % 3 != number % 3)

    return replace(batch, present={name: mask(has_b) for name, has_b in batch.present.items()})


def run(file: str, world: World) -> dict[str, Any]:
    trainer = WatchedTrainer(load_config(file), world)
    trainer.train()
    return {"config": file, "rank": world.rank, "steps": trainer.waits[FIRST_STEPS:]}


if __name__ == "__main__":
    here = join_process_group()
    for name in sys.argv[1:]:
        print(json.dumps(run(name, here)), flush=True)
    leave_process_group()

"""Trains runs of which some stop on the way, one after the other, on as many ranks as the launch has.

    torchrun --nproc-per-node 2 tests/trainer/stopping_runs.py JOBS.json

A job: {"config": file, "stop": step after which the last rank alone gets SIGTERM, or null, "poison": {step: parameter}
whose gradient is NaN on the last rank at that step}. Prints one JSON line a job: how it ended.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from threetowers.cache.preemption import Interrupted
from threetowers.cache.world import World
from threetowers.trainer.config import load
from threetowers.trainer.engine import join_process_group, leave_process_group
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.train import Trainer


class Look:
    """An evaluator that measures the model, and lets the launcher's signal come when it is time."""

    name = "look"

    def __init__(self, stop: int | None, world: World) -> None:
        self.stop, self.world = stop, world

    def every(self, samples: int, batch: int, steps: int) -> int:
        return 1

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        assert not model.training
        if step == self.stop and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"weights": float(sum(p.double().abs().sum() for p in model.parameters()))}


def poison(trainer: Trainer, steps: Mapping[str, str]) -> None:
    """Make the gradient of a parameter NaN at given steps, on the last rank."""
    if trainer.world.rank != trainer.world.size - 1:
        return
    named = dict(trainer.engine.module.named_parameters())
    for step, name in steps.items():
        due = int(step)

        def spoil(grad: torch.Tensor, due: int = due) -> torch.Tensor:
            done = trainer.updates + trainer.counts["not_finite"]
            return grad * torch.nan if done + 1 == due else grad

        named[name].register_hook(spoil)
    trainer.watch = type(trainer.watch)(trainer.engine.module, trainer.world.device)  # after the poison


def run_job(job: dict[str, Any], world: World) -> dict[str, Any]:
    trainer = Trainer(load(job["config"]), world, [Look(job.get("stop"), world)])
    poison(trainer, job.get("poison", {}))
    start = trainer.start
    try:
        return {"end": "finished", "start": start, "summary": vars(trainer.train())}
    except Interrupted as error:
        return {"end": "interrupted", "start": start, "message": str(error)}
    except FloatingPointError as error:
        return {"end": "not finite", "start": start, "message": str(error)}


if __name__ == "__main__":
    here = join_process_group()
    for item in json.loads(Path(sys.argv[1]).read_text()):
        found = run_job(item, here)
        if here.first:
            print(json.dumps({"job": item["config"]} | found), flush=True)
    leave_process_group()

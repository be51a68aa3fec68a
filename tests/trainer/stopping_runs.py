"""Trains runs one after the other, some of which are stopped, on as many ranks as the launch has.

    torchrun --nproc-per-node 2 tests/trainer/stopping_runs.py JOBS.json

A job: {"config": file, "stop": step after which the last rank alone gets SIGTERM, or null; "stop_in": name of a method
of Trainer in which it gets it; "poison": {step: parameter} whose gradient is NaN on the last rank at that step;
"take_over": whether another process takes the run's folder over}. Prints one JSON line a job: how it ended.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from threetowers.cache.processes.preemption import Interrupted
from threetowers.cache.processes.world import World
from threetowers.cache.storage.lease import LeaseOwner
from threetowers.cache.storage.local import LocalStorage
from threetowers.trainer.config import load_config
from threetowers.trainer.engine import join_process_group, leave_process_group
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.running_moments import running_moments
from threetowers.trainer.run.run_lease import RunInUse
from threetowers.trainer.train import Trainer


class WeightSum:
    """An evaluator that sums weights and running moments, the same on all ranks, and sends SIGTERM to the last rank
    after a given step.
    """

    name = "weights"

    def __init__(self, stop: int | None, world: World) -> None:
        self.stop, self.world = stop, world

    def every(self, samples: int, batch: int, steps: int) -> int:
        return 1

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        assert not model.training
        if step == self.stop and self.world.rank == self.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        moments = torch.stack([moment.double().abs().sum() for moment in running_moments(model)] or [torch.zeros(())])
        every_rank = [torch.empty_like(moments) for _ in range(self.world.size)]
        distributed.all_gather(every_rank, moments)
        assert all(found.equal(moments) for found in every_rank)
        return {
            "sum": float(sum(p.double().abs().sum() for p in model.parameters())),
            "moments": float(moments.sum()),
        }


def poison(trainer: Trainer, steps: Mapping[str, str]) -> None:
    """Make the gradient of a parameter NaN at given steps, on the last rank."""
    if trainer.world.rank != trainer.world.size - 1:
        return
    named = dict(trainer.engine.module.named_parameters())
    for step, name in steps.items():
        due = int(step)

        def spoil(grad: torch.Tensor, due: int = due) -> torch.Tensor:
            done = trainer.updates + trainer.counts["nonfinite_steps"]
            return grad * torch.nan if done + 1 == due else grad

        named[name].register_hook(spoil)


def stop_in(name: str, world: World) -> None:
    """Send SIGTERM to the last rank when it next comes to a method of the trainer."""
    real = getattr(Trainer, name)

    def stop(self: Trainer, *arguments: Any) -> Any:
        setattr(Trainer, name, real)
        if world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    setattr(Trainer, name, stop)


def take_over(trainer: Trainer) -> None:
    """Give the lease on the run's folder to another machine, while this one is frozen."""
    if trainer.world.first:
        other = LeaseOwner(host="elsewhere")
        LocalStorage(trainer.folder.path / ".lease").put("owner.json", other.content, owner="t")
        assert trainer.launch.lease is not None
        trainer.launch.lease._confirmed_at -= trainer.launch.lease.timeout


def run_job(job: dict[str, Any], world: World) -> dict[str, Any]:
    start = None
    if "stop_in" in job:
        stop_in(job["stop_in"], world)
    try:
        trainer = Trainer(load_config(job["config"]), world, [WeightSum(job.get("stop"), world)])
        poison(trainer, job.get("poison", {}))
        start = trainer.start
        if job.get("take_over"):
            take_over(trainer)
        return {"end": "finished", "start": start, "summary": vars(trainer.train())}
    except Interrupted as error:
        return {"end": "interrupted", "start": start, "message": str(error)}
    except RunInUse as error:
        return {"end": "in use", "start": start, "message": str(error)}
    except FloatingPointError as error:
        return {"end": "nonfinite", "start": start, "message": str(error)}


if __name__ == "__main__":
    here = join_process_group()
    for item in json.loads(Path(sys.argv[1]).read_text()):
        found = run_job(item, here)
        if here.first:
            print(json.dumps({"job": item["config"]} | found), flush=True)
    leave_process_group()

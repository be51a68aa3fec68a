"""Steps of a small model on random inputs, in as many processes as the launch has; each prints nothing and saves.

    torchrun --nproc-per-node 2 tests/trainer/step_processes.py JOBS.json

A job: {"run": a config tree, "steps": n, "batch": file of inputs, "out": file for the parameters after the steps}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from threetowers.cache.world import World
from threetowers.trainer.checkpoint.checkpoint import save_weights
from threetowers.trainer.config import parse
from threetowers.trainer.engine import (
    chunks,
    deepspeed_config,
    join_process_group,
    leave_process_group,
    start_engine,
)
from threetowers.trainer.grad_cache import accumulate
from threetowers.trainer.loss import objective
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.train import seed_dropout


def run_job(job: dict[str, Any], world: World) -> None:
    run = parse(job["run"])
    torch.manual_seed(0)
    model = TowerModel(run, vocab_size=48, cache_widths={"third": 20})
    if run.engine.activation_checkpointing:
        model.checkpoint_activations()
    engine = start_engine(model, run, deepspeed_config(run, world.size))
    everything = load_file(job["batch"])
    local = run.global_batch_size // world.size
    for step in range(job["steps"]):
        rows = slice(
            step * run.global_batch_size + world.rank * local, step * run.global_batch_size + (world.rank + 1) * local
        )
        batch = {name: tensor[rows] for name, tensor in everything.items()}
        concepts = batch.pop("concepts")
        measured = accumulate(
            engine,
            batch,
            lambda outputs: objective(run, outputs, concepts),  # noqa: B023  # called within this step
            chunks(run, world.size),
            lambda chunk: seed_dropout(0, step, world.rank, chunk),  # noqa: B023
            world.device,
        )
        assert not measured.faults
        engine.step()
    save_weights(engine, Path(job["out"]), world)


if __name__ == "__main__":
    here = join_process_group()
    for item in json.loads(Path(sys.argv[1]).read_text()):
        run_job(item, here)
    leave_process_group()

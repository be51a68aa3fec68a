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

from threetowers.trainer.accumulate import accumulate
from threetowers.trainer.checkpoint import save_weights
from threetowers.trainer.config import parse
from threetowers.trainer.engine import Ranks, chunks, deepspeed_config, leave_ranks, start_engine, start_ranks
from threetowers.trainer.loop import seed_dropout
from threetowers.trainer.objective import objective
from threetowers.trainer.towers.model import TowerModel


def run_job(job: dict[str, Any], ranks: Ranks) -> None:
    run = parse(job["run"])
    torch.manual_seed(0)
    model = TowerModel(run, vocab_size=48, cache_widths={"third": 20})
    if run.engine.activation_checkpointing:
        model.checkpoint_activations()
    engine = start_engine(model, run, deepspeed_config(run, ranks.world))
    everything = load_file(job["batch"])
    local = run.batch // ranks.world
    for step in range(job["steps"]):
        rows = slice(step * run.batch + ranks.rank * local, step * run.batch + (ranks.rank + 1) * local)
        batch = {name: tensor[rows] for name, tensor in everything.items()}
        concepts = batch.pop("concepts")
        measured = accumulate(
            engine,
            batch,
            lambda outputs: objective(run, outputs, concepts),  # noqa: B023  # called within this step
            chunks(run, ranks.world),
            lambda chunk: seed_dropout(0, step, ranks.rank, chunk),  # noqa: B023
            ranks.device,
        )
        assert not measured.faults
        engine.step()
    save_weights(engine, Path(job["out"]), ranks)


if __name__ == "__main__":
    here = start_ranks()
    for item in json.loads(Path(sys.argv[1]).read_text()):
        run_job(item, here)
    leave_ranks()

"""Steps of a small model on random inputs, in as many processes as the launch has; each saves its parameters.

    torchrun --nproc-per-node 2 tests/trainer/step_processes.py JOBS.json

A job: {"config": a config tree, "steps": n, "batch": file of inputs, "out": file for the parameters after the steps}.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from threetowers.cache.processes.world import World
from threetowers.trainer.checkpoint.checkpoint import save_weights
from threetowers.trainer.config import parse
from threetowers.trainer.engine import (
    deepspeed_config,
    join_process_group,
    leave_process_group,
    num_micro_batches,
    start_engine,
)
from threetowers.trainer.grad_cache import GradCache
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.agreed_step import AgreedStep


def run_job(job: dict[str, Any], world: World) -> None:
    config = parse(job["config"])
    torch.manual_seed(0)
    model = TowerModel(config, vocab_size=48, cache_widths={"third": 20})  # as in small_models.py
    if config.engine.activation_checkpointing:
        model.checkpoint_activations()
    engine = start_engine(model, config, deepspeed_config(config, world.size))
    micro_batches = num_micro_batches(config, world.size)
    grad_cache = GradCache(
        engine, partial(total_loss, config), micro_batches, seed=0, rank=world.rank, device=world.device
    )
    agreed_step = AgreedStep(engine, config.optim.grad_clip_norm, world.device)
    everything = load_file(job["batch"])
    local = config.global_batch_size // world.size
    for step in range(job["steps"]):
        start = step * config.global_batch_size + world.rank * local
        batch = {name: tensor[start : start + local] for name, tensor in everything.items()}
        groups_b = batch.pop("groups")
        result = grad_cache(batch, step, groups_b)
        assert not agreed_step(result).nonfinite
    save_weights(engine, Path(job["out"]), world)


if __name__ == "__main__":
    here = join_process_group()
    for item in json.loads(Path(sys.argv[1]).read_text()):
        run_job(item, here)
    leave_process_group()

"""DeepSpeed: the process group, the engine config generated from ours, the engine."""

import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from threetowers.cache.world import World
from threetowers.trainer.config import ConfigError, TrainConfig
from threetowers.trainer.optimizer.adafactor import Adafactor
from threetowers.trainer.optimizer.optimizer import parameter_groups

GRACE_SECONDS = 0.2


def join_process_group() -> World:
    """Join the process group of `deepspeed` or `torchrun`, or start one of a single process, and return its world.

    NCCL and one GPU a process where there are GPUs, else gloo and an even share of the cores.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed guesses, with warnings
        # DeepSpeed compiles a small CPU op at its first use, by the `ninja` it finds on PATH. It must find the one
        # installed beside this Python: there may be no other, and another version would compile it all over again.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if not os.environ.get("LOCAL_WORLD_SIZE"):  # DeepSpeed's launcher sets LOCAL_SIZE
        os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
    world = World.from_env()
    if cuda:
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world.local_size))

    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return World.from_process_group()


def leave_process_group() -> None:
    """End this process's part in the group, once every rank is done with it.

    Gloo's threads let go of the tensors of the last collective after it is over, and need the interpreter for it. One
    that asks while the interpreter is ending aborts the process, so they are let in before; the group cannot be waited
    for, as DeepSpeed keeps references to it.
    """
    time.sleep(GRACE_SECONDS)
    torch.distributed.destroy_process_group()


def deepspeed_config(run: TrainConfig, world: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a run; it is written beside the run, and never by hand.

    Raises ValueError for a batch, an optimizer or a precision that the layout cannot hold.
    """
    _check_layout(run, world)
    config: dict[str, Any] = {
        "train_batch_size": run.global_batch_size,
        "train_micro_batch_size_per_gpu": run.global_batch_size // world,
        "gradient_accumulation_steps": 1,
        # backward() only adds gradients, step() ends the step: else ZeRO 1 and 2 take each chunk for a whole batch.
        "managed_gradient_accumulation": False,
        "gradient_clipping": run.optim.grad_clip_norm,  # always written: DeepSpeed's own default is 1.0, not off
        "zero_optimization": {"stage": run.engine.zero_stage},
        "steps_per_print": 10**9,  # the trainer logs
    }
    if run.engine.precision == "bfloat16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if chunks(run, world) > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if run.optim.name == "adamw":
        # torch_adam: the fused variants are compiled at first use and round differently on each device.
        parameters = {"torch_adam": True, "lr": run.optim.lr, "betas": list(run.optim.betas), "weight_decay": 0.0}
        config["optimizer"] = {"type": "AdamW", "params": parameters}
    return _merge(config, run.engine.deepspeed_extra)


def _check_layout(run: TrainConfig, world: int) -> None:
    stage, half = run.engine.zero_stage, run.engine.precision == "bfloat16"
    if run.global_batch_size % world:
        raise ValueError(
            f"batch {run.global_batch_size} is not divisible by {world} ranks; change `batch` or the launch"
        )
    if run.optim.name == "adafactor" and (stage > 0 or half):
        raise ConfigError(
            f"optim.name: adafactor keeps row and column means of whole matrices, but ZeRO stage {stage} with "
            f"{run.engine.precision} works on flat pieces of them; set engine.zero_stage: 0 and engine.precision: "
            "float32, or take adamw"
        )
    if half and stage == 0:
        raise ConfigError(
            "engine.zero_stage: in bfloat16 DeepSpeed begins stage 0 with a step of its own, of weight decay alone; "
            "set engine.zero_stage: 1, which sends no more, or engine.precision: float32"
        )
    if half and stage == 1 and chunks(run, world) > 1:
        raise ConfigError(
            "engine.micro_batch_size: in bfloat16 DeepSpeed's stage 1 adds gradients of many chunks up in bfloat16, "
            "or counts the early ones twice; set engine.zero_stage: 2, which adds them in float32"
        )


def chunks(run: TrainConfig, world: int) -> int:
    """Return in how many parts a rank's batch goes forward and backward."""
    return (
        1 if run.engine.micro_batch_size is None else -(-run.global_batch_size // world // run.engine.micro_batch_size)
    )


def start_engine(model: nn.Module, run: TrainConfig, config: Mapping[str, Any]) -> Any:
    """Return a DeepSpeed engine (`config` as from `deepspeed_config`) with the run's optimizer."""
    import deepspeed

    groups = parameter_groups(model, run.optim)
    adafactor = Adafactor(groups, run.optim.lr, run.optim.betas) if run.optim.name == "adafactor" else None
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adafactor,
        model_parameters=None if adafactor else groups,
        config=dict(config),
    )
    return engine


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""DeepSpeed: the process group, the engine config generated from ours, the engine."""

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.optim import Optimizer

from threetowers.cache.processes.float32_products import allow_tf32
from threetowers.cache.processes.stop_request import RankStore
from threetowers.cache.processes.world import World
from threetowers.trainer.config import ConfigError, TrainConfig
from threetowers.trainer.config.deepspeed_extra import check_deepspeed_extra
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.precision import float32_parameters
from threetowers.trainer.optimizer.optimizer import build_optimizer

GRACE_SECONDS = 0.2
REDUCE_BUCKET_SIZE = 50_000_000  # gradients that ranks add up at a time: 200 MB; DeepSpeed's own default takes 2 GB


def join_process_group() -> World:
    """Join the process group of `deepspeed` or `torchrun`, or start one of a single process, and return its world.

    NCCL and one GPU a process where there are GPUs, with float32 products in TF32; else gloo and an even share of the
    cores. A single process takes no port and leaves nothing of ranks in its environment, so that those that it starts
    may train as well.

    Raises:
        ConfigError: Another rank has this rank's GPU.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed guesses, with warnings
        # DeepSpeed compiles a small CPU op at its first use, by the `ninja` it finds on PATH. It must find the one
        # installed beside this Python: there may be no other, and another version would compile it all over again.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    world = World(rank=0, size=1, local_rank=0, local_size=1)
    if "RANK" in os.environ:
        if not os.environ.get("LOCAL_WORLD_SIZE"):  # DeepSpeed's launcher sets LOCAL_SIZE
            os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
        world = World.from_env()
    if cuda:
        torch.cuda.set_device(world.device)
        os.environ["LOCAL_RANK"] = str(world.device.index)  # DeepSpeed takes it for the number of the GPU
        allow_tf32(True)  # as open_clip does, and the next line too
        torch.backends.cudnn.benchmark = True  # batches are of one shape: cuDNN tries its algorithms once
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.cores())
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, on CPUs too
    backend = "nccl" if cuda else "gloo"
    if not distributed.is_initialized():
        if world.size == 1:
            distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        elif cuda:
            _start_nccl(world)

    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return World.from_process_group()


def _start_nccl(world: World) -> None:
    """Start the process group of NCCL, once it is known that each rank has a GPU of its own. DeepSpeed joins it."""
    from deepspeed.constants import default_pg_timeout

    store, _, _ = next(rendezvous("env://"))
    refuse_shared_gpu(store, world.rank, str(torch.cuda.get_device_properties(world.device).uuid))
    distributed.init_process_group(
        "nccl",
        store=PrefixStore("nccl", store),
        rank=world.rank,
        world_size=world.size,
        timeout=default_pg_timeout,
        device_id=world.device,
    )


def refuse_shared_gpu(store: Store, rank: int, gpu: str) -> None:
    """Raise ConfigError where another rank has this GPU, unless NCCL has been told that ranks share GPUs.

    Args:
        store: What all ranks can read and write.
        rank: This rank.
        gpu: The identifier of its GPU, which no other GPU has on any machine.
    """
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "0") != "0" or "NCCL_HOSTID" in os.environ:
        return
    owner = int(store.compare_set(f"threetowers/gpu/{gpu}", "", str(rank)))
    if owner != rank:
        raise ConfigError(
            f"ranks {owner} and {rank} have the same GPU ({gpu}), but NCCL needs one for each rank; start as many "
            "ranks as there are GPUs, or let CUDA_VISIBLE_DEVICES show each rank its own"
        )


def rank_store() -> RankStore | None:
    """Return a connection of its own to what all ranks can read and write at any time; None for a single rank."""
    if distributed.get_world_size() == 1:
        return None
    store: RankStore = distributed.distributed_c10d._get_default_store().clone()
    return store


def leave_process_group() -> None:
    """Leave the process group, once every rank is done with it.

    By itself it would not wait for gloo's threads, as DeepSpeed keeps references to it.
    """
    finish_collectives()
    distributed.destroy_process_group()


def finish_collectives() -> None:
    """Give gloo's threads the time to release the tensors of the last collective, before the process ends.

    They do so after it has returned, and need the interpreter for it. A thread that asks for it during shutdown aborts
    the process, whose exit code would then say nothing.
    """
    time.sleep(GRACE_SECONDS)


def deepspeed_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """Return the DeepSpeed config of a run on `world` ranks; it is generated for every launch, never written by hand.

    Raises:
        ConfigError: The layout does not fit the global batch, the optimizer or the precision, or DeepSpeed settings
            of the config's own cannot be used.
    """
    _check_layout(config, world)
    check_deepspeed_extra(config.engine.deepspeed_extra, config.engine.zero_stage)
    tree: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.global_batch_size // world,
        "gradient_accumulation_steps": 1,
        # backward() only adds gradients, step() ends the step: else ZeRO 1 and 2 take a micro-batch for a whole batch.
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,  # AgreedStep clips; always written: DeepSpeed's own default is 1.0, not off
        "zero_optimization": _zero_config(config, world),
        "zero_force_ds_cpu_optimizer": False,  # where optimizer state is offloaded, ours works on it there
        "steps_per_print": 10**9,  # the trainer logs
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step; the trainer has its own
    }
    if config.engine.precision == "mixed":
        # No module reduces its gradients in bfloat16.
        tree["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    if config.engine.precision == "bfloat16":
        tree["bf16"] = {"enabled": True, "check_grad_overflow": False}  # AgreedStep finds it
        if num_micro_batches(config, world) > 1:
            tree["data_types"] = {"grad_accum_dtype": "fp32"}
    merged = _merge(tree, config.engine.deepspeed_extra)
    zero = merged["zero_optimization"]
    if zero["stage"] in (1, 2) and not zero.get("offload_optimizer"):
        zero["compute_grad_norm"] = False  # AgreedStep does: DeepSpeed waits for it on the host, once a parameter group
    return merged


def _zero_config(config: TrainConfig, world: int) -> dict[str, Any]:
    stage = config.engine.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE}
    # DeepSpeed reduces gradients under the backward pass at stage 2 alone, where step() ends the step. It then waits
    # for the device at the end of each backward pass: once a step is worth it, once a micro-batch is not.
    if stage == 2 and world > 1 and torch.cuda.is_available() and num_micro_batches(config, world) == 1:
        zero["overlap_comm"] = True
    return zero


def _check_layout(config: TrainConfig, world: int) -> None:
    stage = config.engine.zero_stage
    half = config.engine.precision == "bfloat16"
    if config.global_batch_size % world:
        raise ConfigError(
            f"global_batch_size: {config.global_batch_size} is not divisible by {world} ranks; change it, or launch "
            "another number of processes"
        )
    if config.optim.name == "adafactor" and (stage > 0 or half):
        raise ConfigError(
            f"optim.name: adafactor needs whole matrices for their row and column means, but ZeRO stage {stage} with "
            f"{config.engine.precision or 'float32'} works on flat fragments of them; set engine.zero_stage: 0 and "
            "engine.precision: mixed, or optim.name: adamw"
        )
    if half and stage == 0:
        raise ConfigError(
            "engine.zero_stage: in bfloat16 DeepSpeed starts stage 0 with a step of weight decay alone; set "
            "engine.zero_stage: 1, which communicates no more, or engine.precision: mixed"
        )
    if half and stage == 3:
        raise ConfigError(
            "engine.zero_stage: in bfloat16 DeepSpeed's stage 3 keeps all weights in one type, temperature and "
            "batch norms, which need float32; set engine.precision: mixed, or engine.zero_stage: 2"
        )
    if half and stage == 1 and num_micro_batches(config, world) > 1:
        raise ConfigError(
            "engine.micro_batch_size: in bfloat16 DeepSpeed's stage 1 adds the gradients of micro-batches in bfloat16, "
            "or counts the first ones twice; set engine.zero_stage: 2, which adds them in float32, or "
            "engine.precision: mixed"
        )
    if config.engine.compile and stage == 3:
        raise ConfigError(
            f"engine.compile: {config.engine.compile} does not go with ZeRO stage 3, which fetches the weights of each "
            "module while it runs; set engine.compile: false, or engine.zero_stage: 2"
        )


def num_micro_batches(config: TrainConfig, world: int) -> int:
    """Return into how many micro-batches a rank's batch is split."""
    if config.engine.micro_batch_size is None:
        return 1
    return math.ceil(config.global_batch_size // world / config.engine.micro_batch_size)


def start_engine(model: TowerModel, config: TrainConfig, engine_config: Mapping[str, Any]) -> Any:
    """Return a DeepSpeed engine of the model with the run's optimizer; `engine_config` is from `deepspeed_config`."""
    import deepspeed

    exact = {p: p.detach().clone() for p in float32_parameters(model).values()}

    def optimizer(_: Any) -> Optimizer:
        """Return the optimizer. DeepSpeed calls this once it has moved the model, and cast all of it in bfloat16."""
        for p, value in exact.items():
            p.data = value.to(p.device)
        return build_optimizer(model, config.optim)

    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(engine_config))
    except Exception as error:
        if not config.engine.deepspeed_extra:
            raise
        raise ConfigError(
            f"engine.deepspeed_extra: DeepSpeed does not start with {config.engine.deepspeed_extra}: {error}; change "
            "or remove it"
        ) from error
    return engine


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both_trees = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_trees else value
    return merged

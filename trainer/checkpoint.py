"""Checkpoints: DeepSpeed's own state to resume from, and safetensors to use the model by.

A checkpoint exists once `latest` names it; `latest` is replaced atomically, after every rank has written its part.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, distributed

from threetowers.trainer.atomic import replace_text, settle
from threetowers.trainer.engine import Ranks
from threetowers.trainer.weights import distinct_state

RANKS = "ranks"  # how many wrote a checkpoint, inside it
LATEST = "latest"  # DeepSpeed's name for it, so that its conversion tools find the checkpoint too


def latest(folder: Path) -> int | None:
    """Return the step of the newest whole checkpoint, None where there is none."""
    pointer = folder / LATEST
    return int(pointer.read_text().removeprefix("step-")) if pointer.exists() else None


def save(engine: Any, folder: Path, step: int, keep: int, ranks: Ranks) -> None:
    """Write a checkpoint of all ranks, point `latest` at it and remove all but the newest `keep`.

    Raises OSError when it cannot be written; the one before it stays.
    """
    tag = f"step-{step:08d}"
    average_buffers(engine)  # DeepSpeed keeps those of the first rank
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(
            f"{folder / tag} cannot be written: {error}. Make room or change `out`, then run the same command again: "
            f"it goes on from {f'step {before}' if (before := latest(folder)) else 'the start'}"
        ) from error
    distributed.barrier()
    if ranks.first:
        replace_text(folder / tag / RANKS, str(ranks.world))
        replace_text(folder / LATEST, tag)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


def resume(engine: Any, folder: Path, ranks: Ranks) -> int:
    """Load the newest checkpoint into the engine and return the number of steps it had made; 0 where there is none.

    Raises ValueError when it was written by another number of ranks (each keeps a part), or cannot be loaded.
    """
    step = latest(folder)
    if step is None:
        return 0
    wrote = int((folder / f"step-{step:08d}" / RANKS).read_text())
    if wrote != ranks.world:
        raise ValueError(
            f"{folder}: the checkpoint of step {step} was written by {wrote} ranks, this launch has {ranks.world}; "
            f"start {wrote} ranks to resume it, or choose another `out`"
        )
    path, state = engine.load_checkpoint(str(folder), tag=f"step-{step:08d}")
    if path is None or state["step"] != step:
        raise ValueError(f"{folder}: checkpoint step-{step:08d} cannot be loaded; is it damaged?")
    return step


def average_buffers(engine: Any) -> None:
    """Make buffers that each rank keeps for itself (batch norm's running moments) their mean over the ranks."""
    for buffer in engine.module.buffers():
        if buffer.is_floating_point() and distributed.get_world_size() > 1:
            distributed.all_reduce(buffer)
            buffer /= distributed.get_world_size()


def save_weights(engine: Any, path: Path, ranks: Ranks) -> None:
    """Write the model's parameters and buffers as one safetensors file, whole also under ZeRO 3. Call on all ranks."""
    import deepspeed

    average_buffers(engine)
    module = engine.module
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
        if ranks.first:
            state: dict[str, Tensor] = {n: t.detach().cpu().contiguous() for n, t in distinct_state(module).items()}
            temporary = path.with_name(f".{path.name}.partial")
            save_file(state, temporary)
            settle(temporary, path)
    distributed.barrier()

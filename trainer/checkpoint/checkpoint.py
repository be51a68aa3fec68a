"""Checkpoints that any layout can go on from: pieces of named parameters and of their optimizer state.

checkpoints/step-00000120/state-00000-of-00002.safetensors   what a rank held: param|NAME|START, exp_avg|NAME|START, ...
checkpoints/step-00000120/checkpoint.json                    step, updates, who wrote it, the run's clock and counts

Every rank writes its own pieces, nothing is gathered. A checkpoint exists once its folder has this name: it is written
under another one and renamed when every rank's file is on the disk.
"""

import json
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from threetowers.cache.storage.atomic import finish_partial, write_atomic
from threetowers.cache.world import World
from threetowers.trainer.checkpoint.partition import inner_optimizer, pieces, replicated
from threetowers.trainer.model.state_dict import distinct_state

ABOUT = "checkpoint.json"
STEP_LENGTH = 8


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int  # steps of the run, with those that were skipped
    updates: int  # steps that the optimizer made
    counts: dict[str, int] = field(default_factory=dict)
    clock: dict[str, float] = field(default_factory=dict)


def newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run's checkpoint folder, None where there is none."""
    return max(folder.glob("step-" + "[0-9]" * STEP_LENGTH), default=None)


def sweep(folder: Path) -> None:
    """Remove what a run left that died while it wrote a checkpoint. For one rank alone, before any other writes."""
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)


def save(engine: Any, folder: Path, progress: Progress, keep: int, world: World) -> None:
    """Write a checkpoint of all ranks and remove all but the newest `keep`.

    Collective. Raises OSError, on all ranks, when one of them cannot write; the checkpoints before stay.
    """
    final = folder / f"step-{progress.step:0{STEP_LENGTH}d}"
    partial = folder / f".{final.name}.partial"
    average_buffers(engine)
    parts = _parts(engine, world)
    error: str | None = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        file = partial / f"state-{world.rank:05d}-of-{world.size:05d}.safetensors"
        save_file(parts, f"{file}.partial")
        finish_partial(Path(f"{file}.partial"), file)
    except (OSError, SafetensorError) as problem:
        error = str(problem)
    told: list[str | None] = [None] * world.size
    distributed.all_gather_object(told, error)
    if problems := [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
        before = newest(folder)
        raise OSError(
            f"{final} cannot be written: {'; '.join(problems)}. Make room or change `out`, then run the same command "
            f"again: it goes on from {before.name if before else 'the start'}"
        )
    if world.first:
        about = asdict(progress) | {"ranks": world.size, "zero_stage": int(engine.zero_optimization_stage())}
        write_atomic(partial / ABOUT, json.dumps(about, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()


class Saved:
    """A checkpoint on the disk, read piece by piece."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if a file is missing or damaged."""
        self.path = path
        try:
            about = json.loads((path / ABOUT).read_text())
            self.ranks, self.zero_stage = int(about.pop("ranks")), int(about.pop("zero_stage"))
            self.progress = Progress(**about)
            names = [path / f"state-{rank:05d}-of-{self.ranks:05d}.safetensors" for rank in range(self.ranks)]
            self._files: list[Any] = [safe_open(name, framework="pt") for name in names]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{path}: this checkpoint is damaged ({error}); remove it to go on from the one before it"
            ) from error
        self._index: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for file in self._files:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                kind, name, start = key.split("|")
                stored = file.get_slice(key)
                self._index[kind, name].append((int(start), _numel(stored.get_shape()), file, key))

    def kinds(self, name: str) -> list[str]:
        """What is stored for a parameter beside its values: the names of its optimizer state."""
        return [kind for kind, other in self._index if other == name and kind not in ("param", "buffer")]

    def whole(self, kind: str, name: str) -> Tensor:
        """Return one tensor as it was stored by one rank, with its shape."""
        (_, _, file, key), *_ = self._index[kind, name]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def size(self, kind: str, name: str) -> int:
        """How many values are stored."""
        return sum(numel for _, numel, _, _ in self._index.get((kind, name), ()))

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return `numel` values from `start` of a flattened tensor, whichever ranks wrote them.

        Raises ValueError if some were not written.
        """
        found, stop = [], start + numel
        for first, count, file, key in sorted(self._index.get((kind, name), ()), key=lambda part: part[0]):
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                found.append(file.get_tensor(key).view(-1)[low - first : high - first])
        if sum(len(part) for part in found) != numel:
            raise ValueError(
                f"{self.path}: {kind} of {name!r} has {self.size(kind, name)} values, this model needs {start}.."
                f"{stop}; is it a checkpoint of another model?"
            )
        return torch.cat(found) if len(found) > 1 else found[0]

    def load_model(self, model: nn.Module) -> None:
        """Put parameters and buffers into a model that no engine holds yet. Raises ValueError if they do not fit."""
        saved = model.state_dict().keys()
        tensors: list[tuple[str, str, Tensor]] = [("param", name, p) for name, p in model.named_parameters()]
        tensors += [("buffer", name, b) for name, b in model.named_buffers() if name in saved]
        for kind, name, tensor in tensors:
            tensor.detach().copy_(self.read(kind, name, 0, tensor.numel()).view_as(tensor))

    def load_optimizer(self, engine: Any) -> None:
        """Put full-precision parameters and optimizer state into an engine whose model has the parameters already."""
        optimizer = inner_optimizer(engine)
        for piece in pieces(engine):
            piece.of(piece.holder).copy_(self.read("param", piece.name, piece.start, piece.numel))
            for kind in self.kinds(piece.name):
                state = optimizer.state[piece.holder]
                if self.size(kind, piece.name) != self.size("param", piece.name):  # a mean over rows, say
                    state[kind] = self.whole(kind, piece.name).to(piece.holder.device)
                    continue
                values = self.read(kind, piece.name, piece.start, piece.numel)
                if kind not in state:
                    state[kind] = torch.zeros_like(piece.holder, dtype=values.dtype)
                piece.of(state[kind]).copy_(values)
            if self.progress.updates:
                optimizer.state[piece.holder]["step"] = torch.tensor(float(self.progress.updates))


def _parts(engine: Any, world: World) -> dict[str, Tensor]:
    """What this rank writes: its pieces; where all hold all, a share of them; the first also what never changes."""
    import deepspeed

    state, parts = inner_optimizer(engine).state, {}
    for number, piece in enumerate(pieces(engine)):
        if replicated(engine) and number % world.size != world.rank:
            continue
        parts[f"param|{piece.name}|{piece.start}"] = piece.of(piece.holder)
        for kind, tensor in state.get(piece.holder, {}).items():
            if kind != "step":
                elementwise = tensor.numel() == piece.holder.numel()
                parts[f"{kind}|{piece.name}|{piece.start}"] = piece.of(tensor) if elementwise else tensor
    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    sharded = engine.zero_optimization_stage() == 3 and bool(frozen)
    with deepspeed.zero.GatheredParameters(list(frozen.values()), enabled=sharded):
        if world.first:
            saved = engine.module.state_dict().keys()
            parts |= {f"param|{name}|0": p.detach().clone() for name, p in frozen.items()}
            parts |= {f"buffer|{name}|0": b.detach() for name, b in engine.module.named_buffers() if name in saved}
    # Copies: views of one vector share its storage, which safetensors refuses to write.
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in parts.items()}


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def average_buffers(engine: Any) -> None:
    """Make buffers that each rank keeps for itself (batch norm's running moments) their mean over the ranks."""
    for buffer in engine.module.buffers():
        if buffer.is_floating_point() and distributed.get_world_size() > 1:
            distributed.all_reduce(buffer)
            buffer /= distributed.get_world_size()


def save_weights(engine: Any, path: Path, world: World) -> None:
    """Write the model's parameters and buffers as one safetensors file, whole also under ZeRO 3. Call on all ranks."""
    import deepspeed

    average_buffers(engine)
    module = engine.module
    sharded = engine.zero_optimization_stage() == 3
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=sharded):
        if world.first:
            state: dict[str, Tensor] = {n: t.detach().cpu().contiguous() for n, t in distinct_state(module).items()}
            temporary = path.with_name(f".{path.name}.partial")
            save_file(state, temporary)
            finish_partial(temporary, path)
    distributed.barrier()

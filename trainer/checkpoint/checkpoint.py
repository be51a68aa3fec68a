"""Checkpoints that any layout can resume from: fragments of named parameters and of their optimizer state.

checkpoints/step-00000120/state-00000-of-00002.safetensors   what a rank held: param|NAME|START, exp_avg|NAME|START, ...
checkpoints/step-00000120/checkpoint.json                    step, updates, layout, the run's counts and timer

Every rank writes its own fragments, nothing is gathered. A checkpoint is complete or absent at any moment, see
`CheckpointStore`.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from threetowers.cache.processes.world import World
from threetowers.cache.storage.atomic import finish_partial, partial_path
from threetowers.trainer.checkpoint.partition import fragments, inner_optimizer, is_replicated
from threetowers.trainer.checkpoint.store import INDEX_FILE, CheckpointStore, step_name
from threetowers.trainer.model.running_moments import average_running_moments
from threetowers.trainer.model.state_dict import deduplicated_state_dict


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int  # steps of the run, with those that were skipped
    updates: int  # steps that the optimizer made
    counts: dict[str, int] = field(default_factory=dict)
    timer: dict[str, float] = field(default_factory=dict)


def save_checkpoint(engine: Any, store: CheckpointStore, progress: Progress, keep: int, world: World) -> None:
    """Write a checkpoint of all ranks and remove all but the newest `keep`. Collective.

    Raises:
        OSError: On all ranks, when one of them cannot write; earlier checkpoints stay.
    """
    average_running_moments(engine.module)
    tensors = _local_tensors(engine, world)

    # Every rank writes its file.
    error: str | None = None
    try:
        file = store.begin(progress.step) / f"state-{world.rank:05d}-of-{world.size:05d}.safetensors"
        save_file(tensors, f"{file}.partial")
        finish_partial(Path(f"{file}.partial"), file)
        store.add(progress.step, file)
    except (OSError, SafetensorError) as problem:
        error = str(problem)

    # All ranks fail together.
    errors: list[str | None] = [None] * world.size
    distributed.all_gather_object(errors, error)
    if problems := [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text]:
        if world.first:
            store.discard(progress.step)
        raise OSError(_cannot_write(store, progress.step, "; ".join(problems)))

    # The first rank makes it a checkpoint.
    completed: list[str | None] = [None]
    if world.first:
        index = asdict(progress) | {"world_size": world.size, "zero_stage": int(engine.zero_optimization_stage())}
        try:
            store.complete(progress.step, json.dumps(index, indent=2), keep)
        except OSError as problem:
            completed = [str(problem)]
    distributed.broadcast_object_list(completed)
    if completed[0] is not None:
        raise OSError(_cannot_write(store, progress.step, completed[0]))


def _cannot_write(store: CheckpointStore, step: int, problem: str) -> str:
    """Return the message for a checkpoint that cannot be written."""
    try:
        before = store.newest()
        resumed = "the start" if before is None else step_name(before)
    except OSError:  # a store that cannot be reached
        resumed = "the newest one before it"
    return (
        f"{store.address(step)} cannot be written: {problem}. Make room or change output_dir, then run the same "
        f"command again: it resumes from {resumed}"
    )


@dataclass(frozen=True)
class _StoredFragment:
    """`numel` values from `start` of a flattened tensor, under `key` in one of the files."""

    start: int
    numel: int
    file: Any
    key: str

    def read(self) -> Tensor:
        tensor: Tensor = self.file.get_tensor(self.key)
        return tensor


class CheckpointReader:
    """A checkpoint on the disk, read fragment by fragment."""

    def __init__(self, path: Path, address: str | None = None) -> None:
        """Open the files of all ranks.

        Args:
            path: The checkpoint's folder.
            address: Where it is kept, for messages; None: in this folder.

        Raises:
            ValueError: If a file is missing or damaged.
        """
        self.address = address or str(path)
        try:
            index = json.loads((path / INDEX_FILE).read_text())
            self.world_size = int(index.pop("world_size"))
            self.zero_stage = int(index.pop("zero_stage"))
            self.progress = Progress(**index)
            names = [f"state-{rank:05d}-of-{self.world_size:05d}.safetensors" for rank in range(self.world_size)]
            files: list[Any] = [safe_open(path / name, framework="pt") for name in names]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{self.address}: this checkpoint is damaged ({error}); remove it to resume from the one before it"
            ) from error
        self._fragments: dict[tuple[str, str], list[_StoredFragment]] = defaultdict(list)
        for file in files:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                kind, name, start = key.split("|")
                numel = int(torch.Size(file.get_slice(key).get_shape()).numel())
                self._fragments[kind, name].append(_StoredFragment(int(start), numel, file, key))

    def load_model(self, model: nn.Module) -> None:
        """Put parameters and buffers into a model that no engine holds yet.

        Raises:
            ValueError: If they are of another model.
        """
        persistent = model.state_dict().keys()
        tensors: list[tuple[str, str, Tensor]] = [("param", name, p) for name, p in model.named_parameters()]
        tensors += [("buffer", name, b) for name, b in model.named_buffers() if name in persistent]
        for kind, name, tensor in tensors:
            tensor.detach().copy_(self._read(kind, name, 0, tensor.numel()).view_as(tensor))

    def load_optimizer(self, engine: Any) -> None:
        """Put full-precision parameters and optimizer state into an engine whose model has the parameters already."""
        optimizer = inner_optimizer(engine)
        for fragment in fragments(engine):
            buffer, name = fragment.buffer, fragment.name
            fragment.view(buffer).copy_(self._read("param", name, fragment.start, fragment.numel))
            for kind in self._state_names(name):
                state = optimizer.state[buffer]
                if self._numel(kind, name) != self._numel("param", name):  # not element by element: a mean over rows
                    state[kind] = self._fragments[kind, name][0].read().to(buffer.device)
                    continue
                values = self._read(kind, name, fragment.start, fragment.numel)
                if kind not in state:
                    state[kind] = torch.zeros_like(buffer, dtype=values.dtype)
                fragment.view(state[kind]).copy_(values)
            if self.progress.updates:
                optimizer.state[buffer]["step"] = torch.tensor(float(self.progress.updates))

    def _state_names(self, name: str) -> list[str]:
        """Return the names of a parameter's optimizer state."""
        return [kind for kind, other in self._fragments if other == name and kind not in ("param", "buffer")]

    def _numel(self, kind: str, name: str) -> int:
        return sum(fragment.numel for fragment in self._fragments.get((kind, name), ()))

    def _read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return `numel` values from `start` of a flattened tensor, whichever ranks wrote them.

        Raises:
            ValueError: If some were not written.
        """
        stop = start + numel
        found = []
        for fragment in sorted(self._fragments.get((kind, name), ()), key=lambda fragment: fragment.start):
            low = max(start, fragment.start)
            high = min(stop, fragment.start + fragment.numel)
            if low < high:
                found.append(fragment.read().view(-1)[low - fragment.start : high - fragment.start])
        if sum(len(values) for values in found) != numel:
            raise ValueError(
                f"{self.address}: {kind} of {name!r} has {self._numel(kind, name)} values, this model needs {start}.."
                f"{stop}; it is a checkpoint of another model: go back to its config, or change output_dir"
            )
        return torch.cat(found) if len(found) > 1 else found[0]


def _local_tensors(engine: Any, world: World) -> dict[str, Tensor]:
    """Return the tensors that this rank writes, on the CPU, by key.

    They are its fragments; where every rank holds all of them, its share; on the first rank also frozen parameters and
    buffers.
    """
    import deepspeed

    state = inner_optimizer(engine).state
    tensors: dict[str, Tensor] = {}
    for number, fragment in enumerate(fragments(engine)):
        if is_replicated(engine) and number % world.size != world.rank:
            continue
        suffix = f"{fragment.name}|{fragment.start}"
        tensors[f"param|{suffix}"] = fragment.view(fragment.buffer)
        for kind, tensor in state.get(fragment.buffer, {}).items():
            if kind != "step":
                elementwise = tensor.numel() == fragment.buffer.numel()
                tensors[f"{kind}|{suffix}"] = fragment.view(tensor) if elementwise else tensor

    frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}
    partitioned = engine.zero_optimization_stage() == 3 and bool(frozen)
    with deepspeed.zero.GatheredParameters(list(frozen.values()), enabled=partitioned):
        if world.first:
            tensors |= {f"param|{name}|0": p.detach().clone() for name, p in frozen.items()}
    if world.first:
        persistent = engine.module.state_dict().keys()
        tensors |= {f"buffer|{name}|0": b.detach() for name, b in engine.module.named_buffers() if name in persistent}
    # Copies: views of one buffer share its storage, which safetensors refuses to write.
    return {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}


def save_weights(engine: Any, path: Path, world: World) -> None:
    """Write the model's parameters and buffers as one safetensors file, complete also under ZeRO 3. Collective.

    Raises:
        OSError: On all ranks, when the first one cannot write.
    """
    import deepspeed

    average_running_moments(engine.module)
    module = engine.module
    partitioned = engine.zero_optimization_stage() == 3
    error: list[str | None] = [None]
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=partitioned):
        if world.first:
            state = deduplicated_state_dict(module)
            partial = partial_path(path)
            try:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, partial)
                finish_partial(partial, path)
            except (OSError, SafetensorError) as problem:
                error = [str(problem)]
                partial.unlink(missing_ok=True)
    distributed.broadcast_object_list(error)  # all ranks fail together
    if error[0] is not None:
        raise OSError(
            f"{path} cannot be written: {error[0]}. Make room, then run the same command again: it goes on from the "
            "last checkpoint"
        )

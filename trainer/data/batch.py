"""The batch of one rank, and its transfer to the device."""

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The samples of a global batch that fall to one rank.

    Attributes:
        inputs: One tensor per tower, by its name: images (b, 3, S, S) uint8, tokens (b, L) int64, or cached rows (b, D)
            float32.
        present: For each tower that some samples may lack (`on_missing_row: mask`), which have its row: (b,) bool.
        groups_b: Group of each sample, int64; equal for samples that show the same thing.
        bad: Why samples of this batch are left out: one reason for each bad sample.
        notes: What cannot be used of its samples' annotations, as short phrases, once for each sample.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    groups_b: Tensor
    bad: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of usable samples."""
        return len(self.groups_b)

    def pin_memory(self) -> "Batch":
        """Return the batch with its inputs in pinned memory; called by torch's DataLoader."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. Copies from pinned memory are asynchronous."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            present={name: has_b.to(device, non_blocking=True) for name, has_b in self.present.items()},
            groups_b=self.groups_b.to(device, non_blocking=True),
        )


def concatenate_batches(parts: Sequence[Batch]) -> Batch:
    """Return the parts of a batch as one batch, in their order."""
    if len(parts) == 1:
        return parts[0]
    filled = [part for part in parts if len(part)] or parts[:1]  # a part without a usable sample has no inputs
    return Batch(
        {name: _concatenate([part.inputs[name] for part in filled]) for name in filled[0].inputs},
        {name: _concatenate([part.present[name] for part in filled]) for name in filled[0].present},
        _concatenate([part.groups_b for part in filled]),
        tuple(itertools.chain.from_iterable(part.bad for part in parts)),
        tuple(itertools.chain.from_iterable(part.notes for part in parts)),
    )


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Like torch.cat, but pinned parts give a pinned tensor."""
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=tensors[0].is_pinned())
    return torch.cat(list(tensors), out=out)


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Yield the batches on a device.

    On a GPU the next batch is copied, on a CUDA stream of its own, while the present one is used.
    """
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        if waiting is not None:
            yield _hand_over(*waiting, device)
        waiting = moved, copying.record_event()
    if waiting is not None:
        yield _hand_over(*waiting, device)


def _hand_over(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Make the current CUDA stream wait for the copy, and tell the allocator that it uses the batch."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in (*batch.inputs.values(), *batch.present.values(), batch.groups_b):
        tensor.record_stream(current)
    return batch

"""The batch of one rank, and its transfer to the device."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The samples of a global batch that fall to one rank.

    Attributes:
        inputs: One tensor per tower, by its name: images (b, 3, S, S) uint8, tokens (b, L) int64, or cached rows (b, D)
            float32.
        present: For each tower that some samples may lack (`on_missing_row: mask`), which have its row: (b,) bool. It
            stays on the CPU, where the loss finds the numbers of such samples without waiting for the device.
        groups_b: Group of each sample, int64; equal for samples that show the same thing.
        bad: Why samples of this batch are left out: one reason for each bad sample.
        notes: What cannot be used of its samples' annotations, as short phrases, once for each sample.
        reasons: Why samples are left out, as phrases to count by: one for each of `bad`.
        pad_id: The token that fills up rows of tokens.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    groups_b: Tensor
    bad: tuple[str, ...]
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    pad_id: int = 0

    def __len__(self) -> int:
        """Return the number of usable samples."""
        return len(self.groups_b)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. Copies from pinned memory are asynchronous."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            groups_b=self.groups_b.to(device, non_blocking=True),
        )


def join_parts(parts: Iterable[Batch], samples: int, pin_memory: bool = False) -> Batch:
    """Return the parts of a batch as one batch, in their order; tokens are as long as those of the longest part.

    A part is copied when it arrives and not kept, so that the shared memory in which workers hand it over is free again
    before the next one is taken.

    Args:
        parts: The parts, one at least. One without a usable sample has no inputs.
        samples: The samples, usable or not, of all of them together.
        pin_memory: Put the inputs into pinned memory, from which a GPU copies asynchronously.
    """
    joined: dict[tuple[str, str], Tensor] = {}
    filled = 0
    bad: list[str] = []
    notes: list[str] = []
    reasons: list[str] = []
    pad_id = 0
    for part in parts:
        columns = {("inputs", name): tensor for name, tensor in part.inputs.items()}
        columns |= {("present", name): tensor for name, tensor in part.present.items()}
        columns["groups", ""] = part.groups_b
        for column, tensor in columns.items():
            if column not in joined:
                joined[column] = torch.empty((samples, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pin_memory)
            if is_tokens(tensor) and tensor.shape[1] > joined[column].shape[1]:
                wider = torch.empty((samples, tensor.shape[1]), dtype=tensor.dtype, pin_memory=pin_memory)
                joined[column] = _fill(wider, 0, joined[column][:filled], pad_id)
            _fill(joined[column], filled, tensor, part.pad_id)
        filled += len(part)
        pad_id = part.pad_id
        bad += part.bad
        notes += part.notes
        reasons += part.reasons
    by_kind: dict[str, dict[str, Tensor]] = {"inputs": {}, "present": {}, "groups": {}}
    for (kind, name), tensor in joined.items():
        by_kind[kind][name] = tensor[:filled]
    groups_b = by_kind["groups"][""]
    return Batch(by_kind["inputs"], by_kind["present"], groups_b, tuple(bad), tuple(notes), tuple(reasons), pad_id)


def is_tokens(tensor: Tensor) -> bool:
    """Return whether an input is of tokens, (b, L) int64."""
    return tensor.dtype == torch.int64 and tensor.ndim == 2


def _fill(whole: Tensor, start: int, part: Tensor, pad_id: int) -> Tensor:
    """Put a part into the rows from `start` on, and return the whole. Tokens may be shorter: padding follows them."""
    rows = whole[start : start + len(part)]
    if is_tokens(part):
        rows[:, : part.shape[1]] = part
        rows[:, part.shape[1] :] = pad_id
    else:
        rows.copy_(part)
    return whole


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
    for tensor in (*batch.inputs.values(), batch.groups_b):
        tensor.record_stream(current)
    return batch

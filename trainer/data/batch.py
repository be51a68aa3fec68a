"""The batch of one rank, and its transfer to the device."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The samples of a global batch that fall to one rank.

    Attributes:
        inputs: One tensor per tower, by its name: images (b, 3, S, S) uint8, tokens (b, L) int64, or cached rows (b, D)
            float32. Where samples may have several captions, a tower of text has a row for each of m captions, those
            of a sample next to each other.
        present: For each tower that some samples may lack (`on_missing_row: mask`), which have its row: (b,) bool. It
            stays on the CPU, where the loss finds the numbers of such samples without waiting for the device.
        groups_b: Group of each sample, int64; equal for samples that show the same thing.
        bad: Why samples of this batch are left out: one reason for each bad sample.
        notes: What cannot be used of its samples' annotations, as short phrases, once for each sample.
        reasons: Why samples are left out, as phrases to count by: one for each of `bad`.
        pad_id: The token that fills up rows of tokens.
        owner_m: Where samples may have several captions, the position of the sample of each, (m,) int64, ascending:
            every sample has one at least, and the first is the one that it would have alone. It stays on the CPU, as
            `present` does. None: each sample has one.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    groups_b: Tensor
    bad: tuple[str, ...]
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    pad_id: int = 0
    owner_m: Tensor | None = None

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


def owners(counts_b: Sequence[int]) -> Tensor:
    """Return the sample of each caption, (m,) int64, of samples with so many captions."""
    return torch.repeat_interleave(torch.arange(len(counts_b)), torch.tensor(counts_b, dtype=torch.int64))


def join_parts(
    parts: Iterable[Batch], samples: int, pin_memory: bool = False, most_captions: Mapping[str, int] | None = None
) -> Batch:
    """Return the parts of a batch as one batch, in their order; tokens are as long as those of the longest part.

    A part is copied when it arrives and not kept, so that the shared memory in which workers hand it over is free again
    before the next one is taken.

    Args:
        parts: The parts, one at least. One without a usable sample has no inputs.
        samples: The samples, usable or not, of all of them together.
        pin_memory: Put the inputs into pinned memory, from which a GPU copies asynchronously.
        most_captions: The most rows that a sample has in the inputs of a tower, where that may be more than one.
    """
    most_captions = most_captions or {}
    joined: dict[tuple[str, str], Tensor] = {}
    filled: dict[tuple[str, str], int] = {}
    num_samples = 0
    owner: list[Tensor] = []
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
                room = samples * (most_captions.get(column[1], 1) if column[0] == "inputs" else 1)
                joined[column] = torch.empty((room, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pin_memory)
            whole = joined[column]
            first = filled.get(column, 0)
            if is_tokens(tensor) and tensor.shape[1] > whole.shape[1]:
                wider = torch.empty((len(whole), tensor.shape[1]), dtype=tensor.dtype, pin_memory=pin_memory)
                joined[column] = _fill(wider, 0, whole[:first], pad_id)
            _fill(joined[column], first, tensor, part.pad_id)
            filled[column] = first + len(tensor)
        if part.owner_m is not None:
            owner.append(part.owner_m + num_samples)
        num_samples += len(part)
        pad_id = part.pad_id
        bad += part.bad
        notes += part.notes
        reasons += part.reasons
    by_kind: dict[str, dict[str, Tensor]] = {"inputs": {}, "present": {}, "groups": {}}
    for (kind, name), tensor in joined.items():
        by_kind[kind][name] = tensor[: filled[kind, name]]
    groups_b = by_kind["groups"][""]
    owner_m = torch.cat(owner) if owner else None
    phrases = tuple(bad), tuple(notes), tuple(reasons)
    return Batch(by_kind["inputs"], by_kind["present"], groups_b, *phrases, pad_id, owner_m)


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

"""Batches on the device before they are asked for."""

from collections.abc import Generator, Iterable

import torch

from threetowers.trainer.data.loader import Batch


def prefetched(batches: Iterable[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """Yield the batches on a device. On a GPU the next one is copied, on a stream of its own, while one is used."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    before: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = batch.to(device)
        if before is not None:
            yield _handed_over(*before, device)
        before = moved, copying.record_event()
    if before is not None:
        yield _handed_over(*before, device)


def _handed_over(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the current stream wait for the copy, and the allocator know that it is used there."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in (*batch.inputs.values(), *batch.present.values(), batch.concepts_b):
        tensor.record_stream(current)
    return batch

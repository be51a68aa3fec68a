"""Memory for kept tiles that waits between steps: what one backward frees, the next forward takes.

A GPU's allocator does so by itself; on the CPU new memory comes from the system, and the first write to each of its
pages costs as much as a tenth of the products that kept tiles save. A buffer is out from `take` until the last tensor
over it dies, wherever that is: two graphs alive at once never share one. Buffers that wait are offered to the system
(MADV_FREE), which takes their pages back when it is short of memory.
"""

from __future__ import annotations

import mmap
import weakref
from functools import cache

import numpy as np
import torch
from torch import Tensor

SMALLEST = 2**25  # bytes; below, glibc keeps freed memory by itself (its DEFAULT_MMAP_THRESHOLD_MAX)
MOST = 32  # buffers that wait: as many as a step has pair terms


class Reserve:
    """Waiting buffers by their size: those given back since a size was last asked for that none had."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[mmap.mmap]] = {}

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor (count,) with undefined values."""
        size = count * dtype.itemsize
        if device.type != "cpu" or size < SMALLEST or not hasattr(mmap, "MADV_FREE"):
            return torch.empty(count, dtype=dtype, device=device)
        if self._waiting.get(size):
            buffer = self._waiting[size].pop()
        else:
            self._waiting.clear()  # the batch has changed, and the old sizes may not come back
            buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(buffer, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return torch.from_numpy(array)  # which lives as long as any tensor over its memory

    def _give_back(self, buffer: mmap.mmap) -> None:
        if sum(map(len, self._waiting.values())) < MOST:
            buffer.madvise(mmap.MADV_FREE)
            self._waiting.setdefault(len(buffer), []).append(buffer)


@cache
def reserve() -> Reserve:
    """This process's."""
    return Reserve()

"""Memory of logit caches that is reused between steps: what one backward frees, the next forward takes.

A GPU's allocator does so by itself; on the CPU new memory comes from the system, and the first write to each of its
pages costs as much as a tenth of the products that a logit cache saves. A buffer is in use from `take` until the last
tensor over it is freed, wherever that is: two graphs alive at once never share one. Free buffers are offered to the
system (MADV_FREE), which takes their pages back when it is short of memory.
"""

import mmap
import weakref
from functools import cache

import numpy as np
import torch
from torch import Tensor

MIN_BYTES = 2**25  # bytes; below, glibc keeps freed memory by itself (its DEFAULT_MMAP_THRESHOLD_MAX)
MAX_FREE = 32  # free buffers to keep: as many as a step has pairs


class BufferPool:
    """Free buffers by size: those given back since a size was last asked for that none had."""

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor (count,) with undefined values."""
        size = count * dtype.itemsize
        if device.type != "cpu" or size < MIN_BYTES or not hasattr(mmap, "MADV_FREE"):
            return torch.empty(count, dtype=dtype, device=device)
        if self._free.get(size):
            buffer = self._free[size].pop()
        else:
            self._free.clear()  # the batch has changed, and the old sizes may not come back
            buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(buffer, dtype=torch.empty(0, dtype=dtype).numpy().dtype)
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return torch.from_numpy(array)  # the array lives as long as any tensor over its memory

    def _give_back(self, buffer: mmap.mmap) -> None:
        if sum(map(len, self._free.values())) < MAX_FREE:
            buffer.madvise(mmap.MADV_FREE)
            self._free.setdefault(len(buffer), []).append(buffer)


@cache
def buffer_pool() -> BufferPool:
    """Return this process's pool."""
    return BufferPool()

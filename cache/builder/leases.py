"""Leases on the tars of a cache: which worker builds which tar.

Losing one is never harmful: rows are written at once, are the same whoever writes them, and the done record comes last.
Leases only save duplicate work.
"""

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Self

from threetowers.cache.storage.lease import Lease, LeaseOwner, StorageClock, heartbeat
from threetowers.cache.storage.storage import Storage

LEASES = "leases"


class Leases:
    """The leases on the tars of one cache, as seen by one worker."""

    def __init__(
        self, storage: Storage, worker: LeaseOwner, timeout: float = 120, now: Callable[[], float] = time.time
    ) -> None:
        self.storage = storage
        self.worker = worker
        self.timeout = timeout
        self._clock = StorageClock(storage, f"{LEASES}/clock.{worker.token}", now)
        self._held: dict[int, Lease] = {}

    def acquire(self, tar_id: int) -> bool:
        """Acquire the lease on a tar if it is free or expired; return whether that succeeded."""
        lease = self._lease(f"{tar_id}.json")
        if lease.acquire():
            self._held[tar_id] = lease
        return lease.held

    def held(self, tar_id: int) -> bool:
        """Return whether this worker acquired the lease and has not noticed a loss, from local state, without I/O."""
        lease = self._held.get(tar_id)
        return lease is not None and lease.held

    def confirm(self, tar_id: int) -> bool:
        """Return whether the stored lease is still this worker's; to be called before anything is written."""
        lease = self._held.get(tar_id)
        return lease is not None and lease.confirm()

    def expired(self, tar_id: int) -> bool:
        """Return whether the lease on a tar timed out, or its owner has ended."""
        return self._lease(f"{tar_id}.json").expired()

    def release(self, tar_id: int) -> None:
        """Release a lease, if it is still this worker's."""
        lease = self._held.pop(tar_id, None)
        if lease is not None:
            lease.release()

    def release_all(self) -> None:
        """Release all leases of this worker."""
        for tar_id in tuple(self._held):
            self.release(tar_id)

    def refresh(self) -> None:
        """Renew every lease that this worker holds."""
        for lease in tuple(self._held.values()):
            lease.refresh()

    def leased(self) -> set[int]:
        """Return the tars with a lease of any worker, by one listing."""
        return {int(name.removesuffix(".json")) for name in self.storage.listdir(LEASES) if name.endswith(".json")}

    def remove_stale(self, finished: Collection[int]) -> None:
        """Remove expired leases on finished tars, and expired clock probes, of workers that were killed."""
        for name in self.storage.listdir(LEASES):
            is_lease = name.endswith(".json")
            obsolete = not is_lease or int(name.removesuffix(".json")) in finished
            if obsolete and self._lease(name).expired():
                self.storage.delete(f"{LEASES}/{name}")

    @contextmanager
    def heartbeat(self) -> Iterator[Self]:
        """Refresh from a thread inside the context; release all leases at its end."""
        try:
            with heartbeat(self.refresh, self.timeout):
                yield self
        finally:
            self.release_all()

    def _lease(self, name: str) -> Lease:
        return Lease(self.storage, f"{LEASES}/{name}", self.worker, self.timeout, self._clock)

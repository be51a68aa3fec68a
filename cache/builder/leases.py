"""Leases: which worker builds which tar, so that workers share the tars of a cache without a coordinator.

A lease is a small object that is created exclusively, and refreshed by a heartbeat while its owner lives. Losing one is
never harmful: rows are written at once, are the same whoever writes them, and the done record comes last. Leases only
save duplicate work.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Self

from threetowers.cache.storage.local import process_exists
from threetowers.cache.storage.storage import Storage

LEASES = "leases"


@dataclass(frozen=True)
class Worker:
    """A process that builds."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def is_dead(self, other: "Worker") -> bool:
        """Return whether another worker has ended for certain: it ran on this host, and its process is gone."""
        if other.host != self.host or other.token == self.token:
            return False
        if other.pid == self.pid:
            return True  # an earlier build of this process
        return not process_exists(other.pid)


class Leases:
    """The leases on the tars of one cache, as seen by one worker.

    A lease that was not refreshed for `timeout` seconds, by the clock of the storage, is expired: any worker may
    acquire it.
    """

    def __init__(
        self, storage: Storage, worker: Worker, timeout: float = 120, now: Callable[[], float] = time.time
    ) -> None:
        self.storage = storage
        self.worker = worker
        self.timeout = timeout
        self._now = now
        self._data = json.dumps(asdict(worker)).encode()
        self._clock_offset: float | None = None  # seconds from this clock to the storage's
        self._held: set[int] = set()
        self._lock = threading.RLock()  # held while a lease of this worker is written or deleted

    def acquire(self, tar_id: int) -> bool:
        """Acquire the lease on a tar if it is free or expired; return whether that succeeded."""
        name = _name(tar_id)
        if not self.storage.create_exclusive(name, self._data, owner=_owner(tar_id)):
            if not self.expired(tar_id):
                return False
            self.storage.put(name, self._data, owner=_owner(tar_id))
            if self._owner_of(name) != self.worker:  # another worker acquired it at the same moment
                return False
        with self._lock:
            self._held.add(tar_id)
        return True

    def held(self, tar_id: int) -> bool:
        """Return whether this worker acquired the lease and has not noticed a loss, from local state, without I/O."""
        return tar_id in self._held

    def confirm(self, tar_id: int) -> bool:
        """Return whether the stored lease is still this worker's; to be called before anything is written."""
        try:
            confirmed = self.storage.read(_name(tar_id)) == self._data
        except FileNotFoundError:
            confirmed = False
        if not confirmed:
            with self._lock:
                self._held.discard(tar_id)
        return confirmed

    def expired(self, tar_id: int) -> bool:
        """Return whether the lease on a tar timed out, or its owner has ended."""
        return self._expired(_name(tar_id))

    def _expired(self, name: str) -> bool:
        owner = self._owner_of(name)
        modified = self.storage.modified(name)
        if owner is not None and self.worker.is_dead(owner):
            return True
        return modified is not None and self._storage_time() - modified > self.timeout

    def release(self, tar_id: int) -> None:
        """Release a lease, if it is still this worker's."""
        with self._lock:
            if self.confirm(tar_id):
                self.storage.delete(_name(tar_id))
            self._held.discard(tar_id)

    def release_all(self) -> None:
        """Release all leases of this worker."""
        for tar_id in tuple(self._held):
            self.release(tar_id)

    def refresh(self) -> None:
        """Renew every lease that this worker holds."""
        for tar_id in tuple(self._held):
            with self._lock:  # a lease that is released meanwhile must not come back
                if tar_id in self._held and self.confirm(tar_id):
                    self.storage.put(_name(tar_id), self._data, owner=_owner(tar_id))

    def leased(self) -> set[int]:
        """Return the tars with a lease of any worker, by one listing."""
        return {int(name.removesuffix(".json")) for name in self.storage.listdir(LEASES) if name.endswith(".json")}

    def remove_stale(self, finished: Collection[int]) -> None:
        """Remove expired leases on finished tars, and expired clock probes, of workers that were killed."""
        for name in self.storage.listdir(LEASES):
            is_lease = name.endswith(".json")
            obsolete = not is_lease or int(name.removesuffix(".json")) in finished
            if obsolete and self._expired(f"{LEASES}/{name}"):
                self.storage.delete(f"{LEASES}/{name}")

    @contextmanager
    def heartbeat(self) -> Iterator[Self]:
        """Refresh from a thread inside the context; release all leases at its end."""
        stopped = threading.Event()

        def run() -> None:
            while not stopped.wait(self.timeout / 4):
                try:
                    self.refresh()
                except OSError:  # tried again soon; if it persists the leases expire and other workers take over
                    continue

        thread = threading.Thread(target=run, daemon=True, name="leases")
        thread.start()
        try:
            yield self
        finally:
            stopped.set()
            thread.join()
            self.release_all()

    def _owner_of(self, name: str) -> Worker | None:
        try:
            return Worker(**json.loads(self.storage.read(name)))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _storage_time(self) -> float:
        """Return the time by the clock of the storage, which is compared with this one once."""
        if self._clock_offset is None:
            probe = f"{LEASES}/clock.{self.worker.token}"
            self.storage.put(probe, self._data, owner="clock")
            self._clock_offset = (self.storage.modified(probe) or self._now()) - self._now()
            self.storage.delete(probe)
        return self._now() + self._clock_offset


def _name(tar_id: int) -> str:
    return f"{LEASES}/{tar_id}.json"


def _owner(tar_id: int) -> str:
    return f"{tar_id}.lease"

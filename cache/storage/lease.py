"""A lease: a process's claim on something that one process at a time should work on, without a coordinator.

It is a small object that is created exclusively and refreshed by a heartbeat while its owner lives. It lies beside what
it is about, so that whoever shares the storage sees it.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from threetowers.cache.processes.liveness import process_start
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage

WAIT_SECONDS = 0.2
BEATS = 4  # heartbeats in the time after which a silent owner's lease expires


@dataclass(frozen=True)
class LeaseOwner:
    """A process that may hold leases.

    Attributes:
        host: name of its machine.
        pid: its id there.
        token: tells apart what claims leases in one process, one after the other.
        start: tells processes of the same id apart, see `process_start`.
        since: when it began to claim leases, in ISO 8601.
    """

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    start: str = field(default_factory=lambda: process_start(os.getpid()) or "")
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @cached_property
    def content(self) -> bytes:
        """What is stored of it in a lease."""
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def sees(self, other: "LeaseOwner") -> bool:
        """Return whether another owner's process id means the same here: same machine, same namespace of ids."""
        return (self.host, _namespace(self.start)) == (other.host, _namespace(other.start))

    def is_dead(self, other: "LeaseOwner") -> bool:
        """Return whether another owner has ended for certain: its process would be seen here, and is gone."""
        if not self.sees(other) or other.token == self.token:
            return False
        if other.pid == self.pid:
            return True  # what this process did before
        return process_start(other.pid) != other.start


class StorageClock:
    """The time by the clock of a storage, which is compared with this machine's once."""

    def __init__(self, storage: Storage, probe: str, now: Callable[[], float] = time.time) -> None:
        """`probe` is an object that is written, looked at and deleted."""
        self._storage = storage
        self._probe = probe
        self._now = now
        self._offset: float | None = None  # seconds from this clock to the storage's

    def time(self, content: bytes) -> float:
        """Return the seconds since 1970. `content` tells others whose the probe is."""
        if self._offset is None:
            self._storage.put(self._probe, content, owner="clock")
            self._offset = (self._storage.modified(self._probe) or self._now()) - self._now()
            self._storage.delete(self._probe)
        return self._now() + self._offset


class Lease:
    """The lease of one name, as seen by one process.

    A lease that was not refreshed for `timeout` seconds, by the clock of the storage, is expired: anyone may acquire
    it. That of a process of this machine that has ended is free at once.
    """

    def __init__(self, storage: Storage, name: str, owner: LeaseOwner, timeout: float, clock: StorageClock) -> None:
        """`name` is that of the object."""
        self.storage = storage
        self.name = name
        self.owner = owner
        self.timeout = timeout
        self._clock = clock
        self._partial_owner = name.rpartition("/")[2].removesuffix(".json") + ".lease"
        self._lock = threading.RLock()  # held while the own lease is written or deleted
        self._confirmed_at = time.monotonic()
        self.held = False  # acquired, and no loss was noticed; without I/O

    def acquire(self) -> bool:
        """Acquire the lease if it is free or expired; return whether that succeeded."""
        if not self.storage.create_exclusive(self.name, self.owner.content, owner=self._partial_owner):
            if not self.expired():
                return False
            self.storage.put(self.name, self.owner.content, owner=self._partial_owner)
            if self.holder() != self.owner:  # another process acquired it at the same moment
                return False
        self.held = True
        self._confirmed_at = time.monotonic()
        return True

    def holder(self) -> LeaseOwner | None:
        """Return whose the stored lease is; None where there is none, or it cannot be read."""
        try:
            return LeaseOwner(**json.loads(self.storage.read(self.name)))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def modified(self) -> float | None:
        """Return when the stored lease was last refreshed, by the clock of the storage; None where there is none."""
        return self.storage.modified(self.name)

    def expired(self) -> bool:
        """Return whether the stored lease timed out, or its owner has ended."""
        holder = self.holder()
        modified = self.modified()
        if holder is not None and self.owner.is_dead(holder):
            return True
        return modified is not None and self._clock.time(self.owner.content) - modified > self.timeout

    def confirm(self) -> bool:
        """Return whether the stored lease is still this owner's."""
        try:
            confirmed = self.storage.read(self.name) == self.owner.content
        except FileNotFoundError:
            confirmed = False
        self.held &= confirmed
        self._confirmed_at = time.monotonic()
        return confirmed

    def still_held(self) -> bool:
        """Return whether this owner holds the lease; the storage is asked only where the heartbeat has missed beats."""
        if self.held and time.monotonic() - self._confirmed_at > self.timeout * 2 / BEATS:
            self.confirm()
        return self.held

    def refresh(self) -> None:
        """Renew the lease, if it is held."""
        with self._lock:  # a lease that is released meanwhile must not come back
            if self.held and self.confirm():
                self.storage.put(self.name, self.owner.content, owner=self._partial_owner)

    def release(self) -> None:
        """Release the lease, if it is still this owner's."""
        with self._lock:
            if self.confirm():
                self.storage.delete(self.name)
            self.held = False


class LocalLease:
    """A lease in the folder `.lease` of a local folder, which is there only while one is held."""

    def __init__(self, folder: Path, name: str, timeout: float) -> None:
        """Say which; nothing is acquired yet."""
        self._folder = folder / ".lease"
        storage = LocalStorage(self._folder)
        owner = LeaseOwner()
        self.lease = Lease(storage, name, owner, timeout, StorageClock(storage, f"clock.{owner.token}"))

    @contextmanager
    def kept(self) -> Iterator[Lease]:
        """Keep the acquired lease alive inside the context, and release it at the end."""
        try:
            with heartbeat(self.lease.refresh, self.lease.timeout):
                yield self.lease
        finally:
            self.lease.release()
            for empty in (self._folder / PARTIAL_FOLDER, self._folder):
                with suppress(OSError):  # not empty: others hold leases there
                    empty.rmdir()


@contextmanager
def one_at_a_time(folder: Path, name: str, timeout: float = 120) -> Iterator[None]:
    """Hold a lease of a local folder inside the context, after waiting for another process that holds it."""
    local = LocalLease(folder, f"{name}.json", timeout)
    while not local.lease.acquire():
        time.sleep(WAIT_SECONDS)
    with local.kept():
        yield


@contextmanager
def heartbeat(refresh: Callable[[], None], timeout: float) -> Iterator[None]:
    """Call `refresh` from a thread inside the context, often enough that leases of that timeout stay alive."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(timeout / BEATS):
            try:
                refresh()
            except OSError:  # tried again soon; if it persists the leases expire
                continue

    thread = threading.Thread(target=run, daemon=True, name="leases")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _namespace(start: str) -> str:
    return start.rpartition("/")[0]

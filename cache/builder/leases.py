"""Claims: who is working on which tar, so that workers share the tars of a cache without talking to each other.

A claim is a small object that is created exclusively and refreshed while its owner lives. Losing one is never harmful:
rows are written whole, are the same whoever writes them, and the done record comes last. A claim only saves work.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from threetowers.cache.storage.local import process_exists
from threetowers.cache.storage.storage import Storage

CLAIMS = "claims"


@dataclass(frozen=True)
class Worker:
    """One process that builds."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def gone(self, other: Worker) -> bool:
        """Whether another worker is known to have ended: it ran on this host, and its process is no more."""
        if other.host != self.host or other.token == self.token:
            return False
        if other.pid == self.pid:
            return True  # an earlier build of this very process
        return not process_exists(other.pid)


class Claims:
    """The claims on the tars of one cache, as one worker sees them.

    A claim that was not refreshed for `stale_seconds`, by the clock of the place, may be taken over.
    """

    def __init__(
        self, storage: Storage, worker: Worker, stale_seconds: float = 120, now: Callable[[], float] = time.time
    ) -> None:
        self.storage, self.worker, self.stale_seconds = storage, worker, stale_seconds
        self._now = now
        self._data = json.dumps(asdict(worker)).encode()
        self._ahead: float | None = None  # of the place's clock to this one, in seconds
        self._held: set[int] = set()
        self._lock = threading.Lock()

    def take(self, tar_id: int) -> bool:
        """Claim a tar: a free one, or one whose owner is gone."""
        name = _name(tar_id)
        if not self.storage.create_exclusive(name, self._data, owner=_owner(tar_id)):
            if not self.abandoned(tar_id):
                return False
            self.storage.put(name, self._data, owner=_owner(tar_id))
            if self._owner_of(name) != self.worker:  # another took it over at the same moment
                return False
        with self._lock:
            self._held.add(tar_id)
        return True

    def has(self, tar_id: int) -> bool:
        """Whether this worker took the claim and has not learnt that it lost it; asks nobody."""
        return tar_id in self._held

    def holds(self, tar_id: int) -> bool:
        """Whether the claim is still this worker's; asked before anything is written."""
        try:
            held = self.storage.read(_name(tar_id)) == self._data
        except FileNotFoundError:
            held = False
        if not held:
            with self._lock:
                self._held.discard(tar_id)
        return held

    def abandoned(self, tar_id: int) -> bool:
        """Whether the claim on a tar is stale, or its owner known to have ended."""
        return self._abandoned(_name(tar_id))

    def _abandoned(self, name: str) -> bool:
        owner, modified = self._owner_of(name), self.storage.modified(name)
        if owner is not None and self.worker.gone(owner):
            return True
        return modified is not None and self._place_time() - modified > self.stale_seconds

    def release(self, tar_id: int) -> None:
        """Give up a claim, if it is still this worker's."""
        if self.holds(tar_id):
            self.storage.delete(_name(tar_id))
        with self._lock:
            self._held.discard(tar_id)

    def release_all(self) -> None:
        """Give up all claims."""
        for tar_id in tuple(self._held):
            self.release(tar_id)

    def refresh(self) -> None:
        """Say that this worker lives, once for each claim that it holds."""
        for tar_id in tuple(self._held):
            if self.holds(tar_id):
                self.storage.put(_name(tar_id), self._data, owner=_owner(tar_id))

    def claimed(self) -> set[int]:
        """The tars that somebody claims, by one listing."""
        return {int(name.removesuffix(".json")) for name in self.storage.listdir(CLAIMS) if name.endswith(".json")}

    def sweep(self, finished: Collection[int]) -> None:
        """Remove claims on finished tars, and probes of the clock, whose owners were killed before they could."""
        for name in self.storage.listdir(CLAIMS):
            is_claim = name.endswith(".json")
            if (not is_claim or int(name.removesuffix(".json")) in finished) and self._abandoned(f"{CLAIMS}/{name}"):
                self.storage.delete(f"{CLAIMS}/{name}")

    @contextmanager
    def kept(self) -> Iterator[Claims]:
        """Refresh from a thread while this is open; give up all claims at the end."""
        stopped = threading.Event()

        def run() -> None:
            while not stopped.wait(self.stale_seconds / 4):
                try:
                    self.refresh()
                except OSError:  # tried again soon; if it lasts the claims grow stale, and others take over
                    continue

        thread = threading.Thread(target=run, daemon=True, name="claims")
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

    def _place_time(self) -> float:
        """Now, by the clock of the place."""
        if self._ahead is None:
            probe = f"{CLAIMS}/clock.{self.worker.token}"
            self.storage.put(probe, self._data, owner="clock")
            self._ahead = (self.storage.modified(probe) or self._now()) - self._now()
            self.storage.delete(probe)
        return self._now() + self._ahead


def _name(tar_id: int) -> str:
    return f"{CLAIMS}/{tar_id}.json"


def _owner(tar_id: int) -> str:
    return f"{tar_id}.claim"

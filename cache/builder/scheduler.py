"""Which tar a worker builds next: first its own share of the list, then whatever other workers have not reached.

There is no central plan. Workers may join, leave and die at any time, even two with the same rank; all they see of each
other are done records and leases. The build and its simulation run this same code.
"""

import random
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from threetowers.cache.builder.leases import Leases
from threetowers.cache.format.done_record import DONE, done_record_name

MIN_MISSES = 3  # tars in a row that other workers were faster at, before a worker lists again what is unfinished
MAX_LISTINGS = 4
LISTED = 1000  # names that object stores list per request
POLL_SECONDS = 0.5, 60  # first and longest wait for the tars of other workers
MAX_PROBES = 4  # leases of other workers that an idle worker examines at a time


@dataclass(frozen=True)
class WorkItem:
    """A tar, by its number in the list, and the numbers of the caches in which its lease was acquired."""

    number: int
    caches: tuple[int, ...]


class TarStatus:
    """Which tars are finished and which are leased in one cache. `ids[i]` is the id of tar i of the list."""

    def __init__(self, leases: Leases, ids: Sequence[int]) -> None:
        self.leases = leases
        self.ids = ids

    def unfinished(self, numbers: Collection[int]) -> set[int]:
        """Return which of these tars have no done record and are not in this worker's hands.

        This takes one listing, or one request per tar where that is cheaper.
        """
        if len(numbers) <= 1 + len(self.ids) // LISTED:
            left = {number for number in numbers if self._missing(number)}
        else:
            names = set(self.leases.storage.listdir(DONE))
            left = {number for number in numbers if f"{self.ids[number]}.json" not in names}
        return {number for number in left if not self.leases.held(self.ids[number])}

    def unleased(self, numbers: Iterable[int]) -> set[int]:
        """Return which of these tars no worker has a lease on, by one listing."""
        leased = self.leases.leased()
        return {number for number in numbers if self.ids[number] not in leased}

    def expired(self, number: int) -> bool:
        """Return whether the lease on a tar is expired."""
        return self.leases.expired(self.ids[number])

    def acquire(self, number: int) -> bool:
        """Acquire the lease on a tar, unless the tar is finished by now."""
        tar_id = self.ids[number]
        if not self.leases.acquire(tar_id):
            return False
        if not self._missing(number):
            self.leases.release(tar_id)
            return False
        return True

    def _missing(self, number: int) -> bool:
        return self.leases.storage.size(done_record_name(self.ids[number])) is None


class WorkQueue:
    """The tars that one worker builds, one after the other, in one or several caches."""

    def __init__(
        self,
        statuses: Sequence[TarStatus],
        rank: int,
        world: int,
        *,
        seed: str,
        unfinished: Sequence[Collection[int]],
    ) -> None:
        """Start with the worker's own share.

        Args:
            statuses: of each cache.
            rank: of this worker.
            world: number of workers that share the list from the start.
            seed: of the order in which tars of other workers are tried; should differ between workers.
            unfinished: numbers of the tars that each cache lacked a moment ago.
        """
        self._statuses = statuses
        self._poll_seconds = POLL_SECONDS[0]
        self._unfinished = list(unfinished)
        self._random = random.Random(seed)
        n_tars = len(statuses[0].ids)
        self._queue = deque(number for number in range(rank, n_tars, world) if self._lacking(number))
        self._own_share_done = False
        self._misses = 0
        self._max_misses = max(MIN_MISSES, n_tars // LISTED)  # a listing costs as much as this many misses

    def next(self) -> WorkItem | float | None:
        """Return the next tar, leased; or seconds to wait while others build the rest; or None when all is done."""
        for _ in range(MAX_LISTINGS):
            while self._queue and self._misses < self._max_misses:
                if item := self._acquire(self._queue.popleft()):
                    self._misses = 0
                    self._poll_seconds = POLL_SECONDS[0]
                    return item
                self._misses += self._own_share_done
            if not self._list_unfinished():
                return None
            if not self._queue:
                break
        wait = self._poll_seconds
        self._poll_seconds = min(2 * wait, POLL_SECONDS[1])
        return wait

    def _lacking(self, number: int) -> list[int]:
        """Return the numbers of the caches that lack a tar."""
        return [i for i, unfinished in enumerate(self._unfinished) if number in unfinished]

    def _acquire(self, number: int) -> WorkItem | None:
        acquired = tuple(i for i in self._lacking(number) if self._statuses[i].acquire(number))
        return WorkItem(number, acquired) if acquired else None

    def _list_unfinished(self) -> bool:
        """Queue the unfinished tars without a lease, or else a few whose lease expired; return whether any is left."""
        self._own_share_done = True
        self._misses = 0
        pairs = list(zip(self._statuses, self._unfinished, strict=True))
        self._unfinished = [status.unfinished(numbers) for status, numbers in pairs]
        if not any(self._unfinished):
            return False
        free: set[int] = set()
        for status, numbers in zip(self._statuses, self._unfinished, strict=True):
            free |= status.unleased(numbers)
        shuffled = sorted(free)
        self._random.shuffle(shuffled)
        self._queue = deque(shuffled)
        if not free:
            left = sorted(set().union(*self._unfinished))
            for number in self._random.sample(left, min(MAX_PROBES, len(left))):
                if any(self._statuses[i].expired(number) for i in self._lacking(number)):
                    self._queue.append(number)
        return True

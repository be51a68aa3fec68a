"""Which tar a worker builds next: first its own share of the list, then what others have not got to.

Nothing is planned centrally. Workers may join, leave and die at any time, also two with the same rank; what they know
of each other are done records and claims. The build and its simulation run this same code.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from threetowers.cache.builder.leases import Claims
from threetowers.cache.format.done_record import DONE, done_record_name

MIN_MISSES = 3  # tars in a row that others were faster at, before a worker looks again at what is left
MAX_LOOKS = 4
LISTED = 1000  # names that object stores list by one request
POLL_SECONDS = 0.5, 60  # first and longest wait for the tars of others
MAX_PROBES = 4  # claims of others that an idle worker examines at a time


@dataclass(frozen=True)
class Work:
    """A tar, by its number in the list, and the caches that it was claimed in, by their numbers."""

    number: int
    ledgers: tuple[int, ...]


class Ledger:
    """What is finished and what is claimed in one cache. `ids` has the tar's id there for each tar of the list."""

    def __init__(self, claims: Claims, ids: Sequence[int]) -> None:
        self.claims, self.ids = claims, ids

    def unfinished(self, numbers: Collection[int]) -> set[int]:
        """Those of these tars that have no done record and that this worker is not about to finish.

        By one listing, or one look for each tar where that asks for less.
        """
        if len(numbers) <= 1 + len(self.ids) // LISTED:
            left = {number for number in numbers if self._missing(number)}
        else:
            names = set(self.claims.storage.listdir(DONE))
            left = {number for number in numbers if f"{self.ids[number]}.json" not in names}
        return {number for number in left if not self.claims.has(self.ids[number])}

    def unclaimed(self, numbers: Iterable[int]) -> set[int]:
        """Those of these tars that nobody works on, by one listing."""
        claimed = self.claims.claimed()
        return {number for number in numbers if self.ids[number] not in claimed}

    def abandoned(self, number: int) -> bool:
        """Whether the owner of the claim on a tar is gone."""
        return self.claims.abandoned(self.ids[number])

    def take(self, number: int) -> bool:
        """Claim a tar, unless it is finished by now."""
        tar_id = self.ids[number]
        if not self.claims.take(tar_id):
            return False
        if not self._missing(number):
            self.claims.release(tar_id)
            return False
        return True

    def _missing(self, number: int) -> bool:
        return self.claims.storage.size(done_record_name(self.ids[number])) is None


class Assignment:
    """The tars of one worker, one after the other."""

    def __init__(
        self,
        ledgers: Sequence[Ledger],
        rank: int,
        world: int,
        *,
        seed: str,
        unfinished: Sequence[Collection[int]],
    ) -> None:
        """`unfinished`: numbers of the tars that each ledger lacked a moment ago. `seed`: of the order of stealing,
        which should differ between workers."""
        self._ledgers, self._poll_seconds = ledgers, POLL_SECONDS[0]
        self._left = list(unfinished)
        self._random = random.Random(seed)
        self._queue = deque(number for number in range(rank, len(ledgers[0].ids), world) if self._lacking(number))
        self._stealing, self._misses = False, 0
        self._max_misses = max(MIN_MISSES, len(ledgers[0].ids) // LISTED)  # a look costs as much as so many misses

    def next(self) -> Work | float | None:
        """The next tar, claimed; or seconds to wait, because others work on all that is left; None when all is done."""
        for _ in range(MAX_LOOKS):
            while self._queue and self._misses < self._max_misses:
                if work := self._take(self._queue.popleft()):
                    self._misses, self._poll_seconds = 0, POLL_SECONDS[0]
                    return work
                self._misses += self._stealing
            if not self._look():
                return None
            if not self._queue:
                break
        wait, self._poll_seconds = self._poll_seconds, min(2 * self._poll_seconds, POLL_SECONDS[1])
        return wait

    def _lacking(self, number: int) -> list[int]:
        return [i for i, left in enumerate(self._left) if number in left]

    def _take(self, number: int) -> Work | None:
        taken = tuple(i for i in self._lacking(number) if self._ledgers[i].take(number))
        return Work(number, taken) if taken else None

    def _look(self) -> bool:
        """List what is left, and queue what nobody works on; where there is no such tar, a few that are abandoned."""
        self._stealing, self._misses = True, 0
        self._left = [ledger.unfinished(left) for ledger, left in zip(self._ledgers, self._left, strict=True)]
        if not any(self._left):
            return False
        unclaimed = [ledger.unclaimed(left) for ledger, left in zip(self._ledgers, self._left, strict=True)]
        free = sorted(set().union(*unclaimed))
        self._random.shuffle(free)
        self._queue = deque(free)
        if not free:
            left = sorted(set().union(*self._left))
            for number in self._random.sample(left, min(MAX_PROBES, len(left))):
                if any(self._ledgers[i].abandoned(number) for i in self._lacking(number)):
                    self._queue.append(number)
        return True

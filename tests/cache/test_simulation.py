"""100,000 tars, 256 workers that crash, come back, freeze and straggle, on a virtual clock, with the real work queue
and leases: no tar is lost, no worker waits for long, and the number of requests to the storage is bounded.
"""

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from threetowers.cache.builder.leases import Leases
from threetowers.cache.builder.scheduler import TarStatus, WorkItem, WorkQueue
from threetowers.cache.format.done_record import done_record_name
from threetowers.cache.storage.lease import LeaseOwner

LISTED = 1000  # names that one request lists, as S3 does
LEASE_TIMEOUT = 120
SECONDS = 60  # a tar, on an ordinary worker


class Bucket:
    """A storage in memory, with a virtual clock, that counts requests."""

    url = "simulated"

    def __init__(self) -> None:
        self.now = 0.0
        self.folders: defaultdict[str, dict[str, tuple[bytes, float]]] = defaultdict(dict)
        self.asked: Counter[str] = Counter()

    def _at(self, name: str) -> tuple[dict[str, tuple[bytes, float]], str]:
        folder, _, base = name.rpartition("/")
        return self.folders[folder], base

    def uri(self, name: str) -> str:
        return name

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        self.asked["read"] += 1
        folder, base = self._at(name)
        if base not in folder:
            raise FileNotFoundError(name)
        return folder[base][0]

    def size(self, name: str) -> int | None:
        self.asked["look"] += 1
        folder, base = self._at(name)
        return len(folder[base][0]) if base in folder else None

    def modified(self, name: str) -> float | None:
        self.asked["look"] += 1
        folder, base = self._at(name)
        return folder[base][1] if base in folder else None

    def listdir(self, folder: str = "") -> list[str]:
        self.asked["list"] += 1 + len(self.folders[folder]) // LISTED
        return list(self.folders[folder])

    def walk(self, folder: str = "") -> list[str]:
        held = [f"{inside}/{name}" for inside, objects in self.folders.items() for name in objects]
        return sorted(name for name in held if name.startswith(folder))

    def put(self, name: str, data: bytes, owner: str) -> None:
        self.asked["write"] += 1
        folder, base = self._at(name)
        folder[base] = data, self.now

    def create_exclusive(self, name: str, data: bytes, owner: str) -> bool:
        folder, base = self._at(name)
        if base in folder:
            self.asked["write"] += 1
            return False
        self.put(name, data, owner)
        return True

    def delete(self, name: str) -> None:
        self.asked["write"] += 1
        folder, base = self._at(name)
        folder.pop(base, None)

    def remove_partial(self, owner: str) -> None: ...

    def remove_stale(self) -> None: ...

    def local_path(self, name: str) -> Path | None:
        return None


@dataclass
class Life:
    """When a worker is there, how fast it is, and when it is frozen."""

    rank: int
    joins: float
    leaves: float
    speed: float
    frozen: tuple[float, float] = (float("inf"), float("inf"))

    def done(self, at: float, work: float) -> float:
        """When so many seconds of work are done that begin at a time."""
        end = at + work / self.speed
        start, stop = self.frozen
        return end + (stop - start) if at < start < end else max(end, stop) if start <= at < stop else end


@dataclass
class Outcome:
    finished: dict[int, int]
    makespan: float
    ideal: float
    wasted: int
    asked: Counter[str]


def simulate(costs: list[float], lives: list[Life], world: int) -> Outcome:
    """Run the workers to the end. Each leases one tar ahead of the one that it works on, as builds do."""
    bucket, events, order = Bucket(), [], itertools.count()
    finished: Counter[int] = Counter()
    wasted = 0
    ids = range(len(costs))

    def at(when: float, life: Life, act: Callable[[], None]) -> None:
        if when < life.leaves:
            start, stop = life.frozen
            heapq.heappush(events, (stop if start <= when < stop else when, next(order), act))

    def start(number: int, life: Life) -> None:
        worker = LeaseOwner(f"host{number}", number, f"{number:x}")
        leases = Leases(bucket, worker, LEASE_TIMEOUT, now=lambda: bucket.now + number)  # clocks differ
        queue = WorkQueue([TarStatus(leases, ids)], life.rank, world, seed=worker.token, unfinished=[ids])
        leased: list[WorkItem] = []

        def take() -> float | None:
            """Lease a tar ahead; return the seconds to wait where there is none."""
            work = queue.next()
            if not isinstance(work, WorkItem):
                return work
            leased.append(work)
            return None

        def begin() -> None:
            wait = take() if not leased else None
            if leased:
                work = leased.pop(0)
                take()
                at(life.done(bucket.now, costs[work.number]), life, lambda: end(work))
            elif wait is not None:
                at(bucket.now + wait, life, begin)

        def end(work: WorkItem) -> None:
            nonlocal wasted
            if leases.confirm(work.number):
                for _ in range(4):  # rows, hashes, statuses
                    bucket.asked["write"] += 1
                bucket.put(done_record_name(work.number), b"{}", owner="")
                leases.release(work.number)
                finished[work.number] += 1
            else:
                wasted += 1
            begin()

        def refresh() -> None:
            leases.refresh()
            at(bucket.now + LEASE_TIMEOUT / 4, life, refresh)

        begin()
        at(bucket.now + LEASE_TIMEOUT / 4, life, refresh)

    for number, life in enumerate(lives):
        at(life.joins, life, lambda number=number, life=life: start(number, life))
    makespan = 0.0
    while events and len(finished) < len(costs):
        bucket.now, _, act = heapq.heappop(events)
        act()
        makespan = bucket.now
    return Outcome(dict(finished), makespan, ideal(costs, lives), wasted, bucket.asked)


def ideal(costs: list[float], lives: list[Life]) -> float:
    """When all is done if work could be cut as finely as one likes, and nothing were lost."""

    def done_by(time: float) -> float:
        total = 0.0
        for life in lives:
            end = min(time, life.leaves)
            frozen = max(0.0, min(end, life.frozen[1]) - max(life.joins, life.frozen[0]))
            total += life.speed * max(0.0, end - life.joins - frozen)
        return total

    low, high = 0.0, 10 * sum(costs)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if done_by(middle) < sum(costs) else (low, middle)
    return high


def lives_of(world: int, hours: float, seed: int) -> list[Life]:
    """An unquiet cluster: a tenth crashes (half of these come back), some freeze, some are four times slower, some join
    late under ranks that exist already.
    """
    rng, never, span = random.Random(seed), float("inf"), hours * 3600
    lives = []
    for rank in range(world):
        kind, when = rng.random(), rng.uniform(0, span)
        speed = rng.uniform(0.9, 1.1) * (0.25 if rng.random() < 0.04 else 1)
        frozen = (when, when + rng.uniform(200, 2000)) if kind > 0.95 else (never, never)
        lives.append(Life(rank, rng.uniform(0, 60), when if kind < 0.1 else never, speed, frozen))
        if kind < 0.05:
            lives.append(Life(rank, when + rng.uniform(10, 600), never, speed))
    return lives + [Life(rng.randrange(world), rng.uniform(0, span), never, 1.0) for _ in range(world // 32)]


@pytest.mark.parametrize(("n_tars", "world"), [(100_000, 256)])
def test_no_tar_is_lost_and_the_work_is_shared(n_tars: int, world: int) -> None:
    rng = random.Random(7)
    costs = [SECONDS * rng.lognormvariate(0, 0.3) for _ in range(n_tars)]
    lives = lives_of(world, hours=n_tars * SECONDS / world / 3600, seed=11)
    outcome = simulate(costs, lives, world)
    assert len(outcome.finished) == n_tars
    assert set(outcome.finished.values()) == {1}, "a tar was finished twice"
    assert outcome.makespan <= 1.1 * outcome.ideal
    assert outcome.wasted < n_tars / 1000
    per_tar = {name: count / n_tars for name, count in outcome.asked.items()}
    assert sum(per_tar.values()) <= 30, per_tar
    assert per_tar["list"] <= 4, per_tar


@pytest.mark.parametrize("seed", range(30))
def test_a_few_tars_among_many_workers_that_mostly_die(seed: int) -> None:
    rng = random.Random(seed)
    lives = [Life(rank, 0, rng.uniform(10, 500), 1.0) for rank in range(12)] + [Life(3, 700, float("inf"), 1.0)]
    outcome = simulate([60.0] * 40, lives, 12)
    assert set(outcome.finished) == set(range(40))

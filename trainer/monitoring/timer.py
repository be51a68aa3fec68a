"""Where a run's time goes, over all its launches: phases that are kept apart, and what they say of the bottleneck."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["warm-up", "data", "step", "evaluation", "checkpoint"]
WARM_UP_STEPS = 2  # after each start: workers fork, operators are compiled, memory is first touched
DATA_BOUND = 0.1  # share of training time spent waiting for data from which more workers are worth trying


@dataclass(frozen=True)
class Lap:
    """Steps since the last look: images per second, and the share of the time spent waiting for data."""

    images_per_s: float
    data_wait: float


class Clock:
    """Seconds by phase and images, of this launch and of those before it."""

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        """`before`: `state()` as a checkpoint has it."""
        self._seconds: defaultdict[str, float] = defaultdict(float, before or {})
        self._lap: defaultdict[str, float] = defaultdict(float)
        self._steps = 0
        self.images = int(self._seconds.pop("images", 0))  # of steps that are no warm-up

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {**self._seconds, "images": self.images}

    @property
    def warm(self) -> bool:
        """Whether this launch has done its first steps."""
        return self._steps >= WARM_UP_STEPS

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count the time inside as `phase`; of the first steps, as warm-up."""
        started = time.perf_counter()
        try:
            yield
        finally:
            name = "warm-up" if phase in ("data", "step") and not self.warm else phase
            seconds = time.perf_counter() - started
            self._seconds[name] += seconds
            self._lap[phase] += seconds

    def stepped(self, images: int) -> None:
        """Count one finished step of so many images."""
        self.images += images if self.warm else 0
        self._lap["images"] += images
        self._steps += 1

    def lap(self) -> Lap:
        """Return the steps since the last call, warm-up included, and begin anew."""
        lap, self._lap = self._lap, defaultdict(float)
        seconds = lap["data"] + lap["step"]
        return Lap(lap["images"] / seconds, lap["data"] / seconds) if seconds else Lap(0.0, 0.0)

    def seconds(self, phase: Phase) -> float:
        return self._seconds[phase]

    @property
    def training(self) -> float:
        """Seconds of training: steps, waiting for their data, and warm-up; no evaluation, no checkpoint."""
        return self.seconds("warm-up") + self.seconds("data") + self.seconds("step")

    @property
    def images_per_s(self) -> float:
        """Of the steps after warm-up; 0 before there are any."""
        seconds = self.seconds("data") + self.seconds("step")
        return self.images / seconds if seconds else 0.0

    @property
    def data_wait(self) -> float:
        """Share of training time, after warm-up, spent waiting for data."""
        seconds = self.seconds("data") + self.seconds("step")
        return self.seconds("data") / seconds if seconds else 0.0

    def verdict(self) -> str:
        """What to do about the time, in a sentence."""
        wait = self.data_wait
        if not self.images:
            return "too short to tell what it was bound by"
        if wait >= DATA_BOUND:
            return f"data-bound: {wait:.0%} of the time waiting for data; raise data.workers or use faster storage"
        return f"compute-bound: {wait:.1%} of the time waiting for data"

"""Where a run's time goes, over all its launches, and what it is bound by."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["warm-up", "data", "step", "evaluation", "checkpoint"]
WARM_UP_STEPS = 2  # after each start: workers fork, operators are compiled, memory is first touched
RECENT_STEPS = 100  # over which the pace of a run is averaged
DATA_BOUND = 0.1  # share of training time spent waiting for data from which more workers are worth trying


@dataclass(frozen=True)
class StepInterval:
    """The steps between two log lines: images per second, and the share of the time spent waiting for data."""

    images_per_s: float
    data_wait: float


class Timer:
    """Seconds by phase and images, of this launch and of those before it."""

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        """Start from nothing, or from the `state()` that a checkpoint holds."""
        self._seconds: defaultdict[str, float] = defaultdict(float, state or {})
        self._interval: defaultdict[str, float] = defaultdict(float)
        self._steps = 0  # of this launch
        self._step_began = self.training
        self._pace: float | None = None  # seconds of training a step, lately
        self.images = int(self._seconds.pop("images", 0))  # without those of warm-up steps

    def state(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {**self._seconds, "images": self.images}

    @property
    def warm(self) -> bool:
        """Whether this launch has completed its warm-up steps."""
        return self._steps >= WARM_UP_STEPS

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Count the time inside as `phase`; during the first steps, as warm-up."""
        started = time.perf_counter()
        try:
            yield
        finally:
            name = "warm-up" if phase in ("data", "step") and not self.warm else phase
            seconds = time.perf_counter() - started
            self._seconds[name] += seconds
            self._interval[phase] += seconds

    def count_step(self, images: int) -> None:
        """Count one completed step of so many images."""
        seconds = self.training - self._step_began
        self._step_began = self.training
        if self.warm:
            self.images += images
            weight = 1 / min(self._steps - WARM_UP_STEPS + 1, RECENT_STEPS)
            self._pace = seconds if self._pace is None else self._pace + weight * (seconds - self._pace)
        self._interval["images"] += images
        self._steps += 1

    def time_left(self, done: int, steps: int) -> float | None:
        """Return in how many seconds a run will have made its `steps` steps, after `done` of them.

        At the pace of this launch's last steps; with as much time for evaluations and checkpoints, by step, as they
        took so far. None while this launch is warming up, for its pace may be another than that of those before.
        """
        if self._pace is None:
            return None
        pauses = self.seconds("evaluation") + self.seconds("checkpoint")
        return (self._pace + pauses / done) * (steps - done)

    def interval(self) -> StepInterval:
        """Return the steps since the last call, warm-up included, and start the next interval."""
        totals = self._interval
        self._interval = defaultdict(float)
        seconds = totals["data"] + totals["step"]
        return StepInterval(totals["images"] / seconds, totals["data"] / seconds) if seconds else StepInterval(0.0, 0.0)

    def seconds(self, phase: Phase) -> float:
        """Return the seconds counted as `phase`."""
        return self._seconds[phase]

    @property
    def training(self) -> float:
        """Seconds of training: steps, waiting for their data, and warm-up; no evaluation, no checkpoint."""
        return self.seconds("warm-up") + self.seconds("data") + self.seconds("step")

    @property
    def images_per_s(self) -> float:
        """Images per second after warm-up; 0 before."""
        seconds = self.seconds("data") + self.seconds("step")
        return self.images / seconds if seconds else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the training time after warm-up that was spent waiting for data."""
        seconds = self.seconds("data") + self.seconds("step")
        return self.seconds("data") / seconds if seconds else 0.0

    def bottleneck(self) -> str:
        """Return in a sentence what bounds the run, and what to do about it."""
        wait = self.data_wait
        if not self.images:
            return "rate and bottleneck unknown: no steps after warm-up"
        if wait >= DATA_BOUND:
            return f"data-bound: {wait:.0%} of the time waiting for data; raise data.workers or use faster storage"
        return f"compute-bound: {wait:.1%} of the time waiting for data"

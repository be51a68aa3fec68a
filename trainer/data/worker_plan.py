"""How the worker processes of a rank share its batches, and what the parts that they hand over take in shared memory.

A rank's batch is made in parts, each by one worker. A part that is made waits in /dev/shm, which all ranks of a machine
share and which may be small (64 MB in a Docker container by default): a worker that fills it is killed by a bus error.
So the parts that may wait are bounded before the first worker starts.
"""

import math
import shutil
from dataclasses import dataclass

import torch

from threetowers.cache.processes.world import World
from threetowers.trainer.config import ConfigError, TrainConfig
from threetowers.trainer.data.sample_set import SampleSet

SHARED_MEMORY = "/dev/shm"
SHARE = 0.5  # of what is free there; the rest is for what else runs on the machine
PARTS_AHEAD = 4  # that each worker has ready, where there is room for them
MOST_WORKERS = 16  # of a rank beside a GPU, unless the config says otherwise
TOKEN_BYTES = GROUP_BYTES = 8
ROW_BYTES = 4  # per value


@dataclass(frozen=True)
class WorkerPlan:
    """The workers of a rank.

    Attributes:
        workers: Processes; 0: the training process itself.
        parts: In how many parts a batch of the rank is made. Part i comes from worker i modulo `workers`.
        ahead: Parts that each worker makes before they are needed.
        part_bytes: Of the tensors of the largest part.
        ranks: Ranks on this machine.
        free_bytes: Free in /dev/shm; None: there is none, and nothing is bounded.
    """

    workers: int
    parts: int
    ahead: int
    part_bytes: int
    ranks: int = 1
    free_bytes: int | None = None

    @property
    def shared_bytes(self) -> int:
        """What all ranks of this machine take in shared memory at most: parts that wait, and one that is copied."""
        return self.ranks * (self.workers * self.ahead + 1) * self.part_bytes if self.workers else 0

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.free_bytes is None or self.shared_bytes <= SHARE * self.free_bytes

    def line(self) -> str:
        """Return a line for the start-up page."""
        if not self.workers:
            return "workers: none, the training process reads and decodes"
        line = (
            f"workers: {self.workers} a rank, up to {self.ahead} parts of {_megabytes(self.part_bytes)} ahead each; at "
            f"most {_megabytes(self.shared_bytes)} in {SHARED_MEMORY}"
        )
        if self.free_bytes is not None:
            line += f", where {_megabytes(self.free_bytes)} are free"
        if self.ahead < PARTS_AHEAD:
            line += (
                f"; more would take over {SHARE:.0%} of that: enlarge it (docker run --shm-size) if the run waits for "
                "data"
            )
        return line


def plan_workers(config: TrainConfig, samples: SampleSet, world: World) -> WorkerPlan:
    """Return how the workers of a rank share its batches, so that what waits fits into /dev/shm.

    Every worker makes one part of each batch and has up to PARTS_AHEAD of them ready; where that is too much fewer, and
    then smaller ones.

    Raises:
        ConfigError: Not even single samples would fit.
    """
    local_batch = math.ceil(config.global_batch_size / world.size)
    workers = config.data.workers
    if workers is None:
        workers = min(MOST_WORKERS, max(1, world.cores() - 1)) if torch.cuda.is_available() else 1
    most_parts = local_batch
    if samples.sequential:  # a stream belongs to one worker
        most_parts = max(1, samples.num_streams // world.size)
        workers = min(workers, most_parts)
    if not workers:
        return WorkerPlan(0, 1, 0, 0)

    free = _free_bytes()
    parts = min(workers, most_parts)
    ahead = PARTS_AHEAD
    while True:
        part_bytes = math.ceil(local_batch / parts) * sample_bytes(config, samples)
        plan = WorkerPlan(workers, parts, ahead, part_bytes, world.local_size, free)
        if plan.fits:
            return plan
        if ahead > 1:
            ahead -= 1
        elif parts + workers <= most_parts:
            parts = min(2 * parts, most_parts // workers * workers)
        else:
            raise ConfigError(
                f"data.workers: {workers} on each of {world.local_size} ranks hand over parts of batches in "
                f"{SHARED_MEMORY}, {_megabytes(plan.shared_bytes)} at least, but {_megabytes(free or 0)} are free "
                "there; enlarge it (docker run --shm-size=8g), or lower data.workers; 0 needs none"
            )


def sample_bytes(config: TrainConfig, samples: SampleSet) -> int:
    """Return the bytes of one sample in a batch."""
    data = config.data
    total = GROUP_BYTES
    for name, tower in config.towers.items():
        match tower.reads:
            case "images":
                total += 3 * data.side**2
            case "tokens":
                total += TOKEN_BYTES * data.context_length
            case "rows":
                total += ROW_BYTES * samples.caches[name].cache.dim + 1
    return total


def _free_bytes() -> int | None:
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except FileNotFoundError:
        return None


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"

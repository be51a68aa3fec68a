"""Training while a cache is still being built: the tars whose rows were built when each epoch began.

They are recorded in the run's folder before the first sample of the epoch is drawn, so that a resumed run, on any
number of ranks, sees the same samples as an uninterrupted one.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import distributed

from threetowers.cache.processes.world import World
from threetowers.cache.storage.atomic import write_atomic
from threetowers.trainer.config import ConfigError
from threetowers.trainer.data.joins.cache_join import CacheJoin

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0


def wait_until_built(joins: Sequence[CacheJoin[Any]]) -> None:
    """Return once the rows of all tars of these joins are built."""
    _wait(joins, lambda built_T: bool(built_T.all()))
    for join in joins:
        join.check_built()


class EpochSnapshots:
    """The tars that each epoch visits. Collective: every rank asks for the same epochs in the same order."""

    def __init__(
        self, path: Path, joins: Sequence[CacheJoin[Any]], samples_per_batch: int, tar_numbers: range | None = None
    ) -> None:
        """Set up the snapshots of one data set.

        Args:
            path: File in which they are recorded.
            joins: All caches of the run.
            samples_per_batch: An epoch does not begin before so many samples have their rows.
            tar_numbers: The data set's tars in the run's list; None for all of them.
        """
        self._path = path
        self._joins = list(joins)
        self._samples_per_batch = samples_per_batch
        self._tar_numbers = range(len(joins[0].tars)) if tar_numbers is None else tar_numbers
        tars = [joins[0].tars[number] for number in self._tar_numbers]
        self._fingerprints = [tar.fingerprint for tar in tars]
        self._sizes_T = np.array([len(tar.samples) for tar in tars])
        self._snapshots: dict[int, list[int]] = {}

    def tar_numbers(self, epoch: int) -> list[int]:
        """Return the numbers of an epoch's tars in the run's list.

        Raises:
            ConfigError: The run's list of tars has changed since the snapshot was recorded.
        """
        if epoch not in self._snapshots:
            own = slice(self._tar_numbers.start, self._tar_numbers.stop)
            built_T = _wait(
                self._joins, lambda built_T: int(self._sizes_T[built_T[own]].sum()) >= self._samples_per_batch
            )
            # What rank 0 has seen holds for all; others may have seen more
            snapshot: list[object] = [None]
            if World.from_process_group().first:
                snapshot = [self._record(epoch, np.flatnonzero(built_T[own]).tolist())]
            if distributed.is_initialized():
                distributed.broadcast_object_list(snapshot)
            if isinstance(snapshot[0], str):
                raise ConfigError(snapshot[0])
            assert isinstance(snapshot[0], list)
            self._snapshots[epoch] = [self._tar_numbers[position] for position in snapshot[0]]
        return self._snapshots[epoch]

    def _record(self, epoch: int, built: list[int]) -> list[int] | str:
        """Return the recorded positions of an epoch's tars, recording those that are built if there is no record.

        An error is returned as its message, so that all ranks can raise it.
        """
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        positions = {fingerprint: position for position, fingerprint in enumerate(self._fingerprints)}
        for line in lines:
            record = json.loads(line)
            if record["epoch"] != epoch:
                continue
            lost = [fingerprint for fingerprint in record["tars"] if fingerprint not in positions]
            if lost:
                return (
                    f"{self._path}: epoch {epoch} was begun with {len(lost)} tars that data.tars no longer names "
                    f"(fingerprints {lost[:3]}); name them again, or choose another output_dir"
                )
            return [positions[fingerprint] for fingerprint in record["tars"]]
        record = {
            "epoch": epoch,
            "built": len(built),
            "total": len(self._fingerprints),
            "tars": [self._fingerprints[position] for position in built],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, "".join(f"{line}\n" for line in [*lines, json.dumps(record)]))
        logger.info("epoch %d: %d of %d tars are built", epoch, len(built), len(self._fingerprints))
        return built


def _wait(joins: Sequence[CacheJoin[Any]], enough: Callable[[npt.NDArray[np.bool_]], bool]) -> npt.NDArray[np.bool_]:
    """Return which tars are built in all caches, as soon as they are enough."""
    logged = False
    while True:
        built_T = functools.reduce(np.logical_and, (join.built() for join in joins))
        if enough(built_T):
            return built_T
        if not logged:
            logger.info("waiting for the cache: %d of %d tars are built", built_T.sum(), len(built_T))
            logged = True
        time.sleep(POLL_SECONDS)

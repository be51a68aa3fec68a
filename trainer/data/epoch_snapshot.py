"""Training while a cache is still being built: the tars that were finished when each epoch began.

The set is pinned in the run's folder before the first sample of the epoch is drawn, so that a resumed run, on any
number of ranks, sees the samples that an undisturbed one would.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import distributed

from threetowers.cache.storage.atomic import write_atomic
from threetowers.cache.world import World
from threetowers.trainer.config import ConfigError
from threetowers.trainer.data.cache_join import CacheJoin

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0


def wait_until_built(joins: Sequence[CacheJoin]) -> None:
    """Return once all tars of these joins are finished."""
    _wait(joins, lambda finished_T: bool(finished_T.all()))
    for join in joins:
        join.check_built()


class FinishedTars:
    """The tars that each epoch visits. Collective: every rank asks for the same epochs in the same order."""

    def __init__(self, path: Path, joins: Sequence[CacheJoin], batch: int, numbers: range | None = None) -> None:
        """`path`: where the sets are pinned. `numbers`: of the tars in the run's list, where they are not all of it.

        An epoch is not begun before `batch` samples are there.
        """
        self._path, self._joins, self._batch = path, list(joins), batch
        self._numbers = range(len(joins[0].tars)) if numbers is None else numbers
        tars = [joins[0].tars[number] for number in self._numbers]
        self._tars = [tar.fingerprint for tar in tars]
        self._samples_T = np.array([len(tar.samples) for tar in tars])
        self._known: dict[int, list[int]] = {}

    def of(self, epoch: int) -> list[int]:
        """Return the places of an epoch's tars in the run's list.

        Raises:
            ConfigError: the run's list of tars has changed since the epoch was pinned.
        """
        if epoch not in self._known:
            mine = slice(self._numbers.start, self._numbers.stop)
            finished_T = _wait(self._joins, lambda found_T: int(self._samples_T[found_T[mine]].sum()) >= self._batch)
            pinned: list[object] = [None]
            if World.from_process_group().first:
                pinned = [self._pin(epoch, np.flatnonzero(finished_T[mine]).tolist())]
            if distributed.is_initialized():
                distributed.broadcast_object_list(pinned)
            if isinstance(pinned[0], str):
                raise ConfigError(pinned[0])
            assert isinstance(pinned[0], list)
            self._known[epoch] = [self._numbers[storage] for storage in pinned[0]]
        return self._known[epoch]

    def _pin(self, epoch: int, finished: list[int]) -> list[int] | str:
        """The pinned set of an epoch, by fingerprint in the file; or what is wrong, to be raised by all ranks."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        places = {fingerprint: storage for storage, fingerprint in enumerate(self._tars)}
        for line in lines:
            pin = json.loads(line)
            if pin["epoch"] == epoch:
                if lost := [fingerprint for fingerprint in pin["tars"] if fingerprint not in places]:
                    return (
                        f"{self._path}: epoch {epoch} was begun with {len(lost)} tars that data.tars no longer names "
                        f"(fingerprints {lost[:3]}); name them again, or choose another `output_dir`"
                    )
                return [places[fingerprint] for fingerprint in pin["tars"]]
        pin = {"epoch": epoch, "finished": len(finished), "of": len(self._tars)}
        pin["tars"] = [self._tars[storage] for storage in finished]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path, "".join(f"{line}\n" for line in [*lines, json.dumps(pin)]))
        logger.info("epoch %d: %d of %d tars are finished", epoch, len(finished), len(self._tars))
        return finished


def _wait(joins: Sequence[CacheJoin], enough: Callable[[npt.NDArray[np.bool_]], bool]) -> npt.NDArray[np.bool_]:
    """Which tars are finished in all caches, as soon as they are enough."""
    told = False
    while not enough(finished_T := functools.reduce(np.logical_and, (join.finished() for join in joins))):
        if not told:
            logger.info("waiting for the cache: %d of %d tars are finished", finished_T.sum(), len(finished_T))
            told = True
        time.sleep(POLL_SECONDS)
    return finished_T

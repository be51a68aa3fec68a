"""The lease on a run, so that no second process trains it meanwhile."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from threetowers.cache.storage.lease import Lease, LeaseOwner, LocalLease, StorageClock, heartbeat
from threetowers.cache.storage.storage import Storage

logger = logging.getLogger(__name__)

LEASE = ".lease"  # the folder of the lease in that of the run
LEASE_FILE = "owner.json"
LEASE_SECONDS = 120.0  # of silence after which the lease of a process that cannot be looked at is expired
POLL_SECONDS = 1.0
SETTLE_SECONDS = 0.5  # after an expired lease was taken over: others may be doing the same


class RunInUse(ValueError):
    """A run that another process trains. The message names the process."""


@contextlib.contextmanager
def local_run_lease(folder: Path, timeout: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the lease on a run's local folder inside the context.

    That of a process that has ended is taken over: at once if it ran on this machine, else after `timeout` seconds
    without a sign of life.

    Raises:
        RunInUse: Another process holds it and lives.
    """
    local = LocalLease(folder, LEASE_FILE, timeout)
    _acquire(local.lease, str(folder))
    try:
        with local.kept() as lease:
            yield lease
    finally:
        with contextlib.suppress(OSError):  # not empty: of a run that has begun
            folder.rmdir()


@contextlib.contextmanager
def remote_run_lease(storage: Storage, timeout: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the lease on a run that is kept in a storage inside the context; otherwise as `local_run_lease`.

    Raises:
        RunInUse: Another process holds it and lives.
    """
    owner = LeaseOwner()
    clock = StorageClock(storage, f"{LEASE}/clock.{owner.token}")
    lease = Lease(storage, f"{LEASE}/{LEASE_FILE}", owner, timeout, clock)
    _acquire(lease, str(storage))
    try:
        with heartbeat(lease.refresh, timeout):
            yield lease
    finally:
        with contextlib.suppress(OSError):  # it expires
            lease.release()


def taken_over(run: str) -> str:
    """Return the message for a process that has lost the lease of a run."""
    return (
        f"{run}: taken over by another process, or removed, while this one gave no sign of life for "
        f"{LEASE_SECONDS:.0f} s. Nothing was written since; the other one goes on"
    )


def _acquire(lease: Lease, run: str) -> None:
    seen: tuple[LeaseOwner, float] | None = None
    while True:
        holder = lease.holder()
        if lease.acquire():
            if holder is not None:
                logger.info("%s: %s, which trained this run, has ended", run, holder)
                time.sleep(SETTLE_SECONDS)
            if holder is None or lease.confirm():
                return
        holder = lease.holder()
        modified = lease.modified()
        if holder is not None and modified is not None:
            if seen not in (None, (holder, modified)) or lease.owner.sees(holder):
                raise RunInUse(
                    f"{run}: {holder} has been training this run since {holder.since}. Wait until it has "
                    "ended, stop it, or choose another `output_dir`"
                )
            if seen is None:
                logger.info("%s: waiting up to %.0f s for a sign of life of %s", run, lease.timeout, holder)
            seen = (holder, modified)
        time.sleep(POLL_SECONDS)

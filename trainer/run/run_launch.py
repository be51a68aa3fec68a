"""One rank's part in a launch of a run: the hold on the run, requests to stop, and what ranks do for each other."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import distributed

from threetowers.cache.processes.preemption import PREEMPTED_EXIT_CODE, Interrupted
from threetowers.cache.processes.stop_request import StopRequest
from threetowers.cache.processes.world import World
from threetowers.cache.storage.lease import Lease
from threetowers.trainer.engine import rank_store
from threetowers.trainer.run.run_store import RunStore

logger = logging.getLogger(__name__)


class RunLaunch:
    """The processes that train a run together, as seen by one of them.

    Attributes:
        run: What they train.
        world: Which of them this one is.
        stop: Whether it was asked to stop.
        lease: On the run; the first rank's alone.
        held: What is given back when the launch ends: the lease, and the local copy of a run at a URL.
    """

    def __init__(self, run: RunStore, world: World) -> None:
        self.run = run
        self.world = world
        self.stop = StopRequest.of_process()
        self.lease: Lease | None = None
        self.held = ExitStack()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a request to stop end all ranks alike inside the context; give the run free on any error."""
        with self.stop.listening(), self.stop.together(rank_store(), self.world.size):
            try:
                yield
            except BaseException:
                self.held.close()
                raise

    def hold_run(self) -> None:
        """Lease the run to the first rank, and bring its files to each machine. Collective.

        Raises:
            RunInUse: On all ranks, where another process has it.
        """

        def lease() -> None:
            self.lease = self.held.enter_context(self.run.lease())

        def fetch() -> None:
            self.held.callback(self.run.forget)
            self.run.fetch()

        self.on_first_rank(lease)
        self.on_each_machine(fetch)

    def on_first_rank(self, action: Callable[[], None]) -> None:
        """Do something on the first rank, while the others wait. An error there is raised on all. Collective."""
        self._together(action if self.world.first else None)

    def on_each_machine(self, action: Callable[[], None]) -> None:
        """Do something on one rank of each machine, while the others wait. An error is raised on all. Collective."""
        self._together(action if self.world.local_rank == 0 else None)

    def _together(self, action: Callable[[], None] | None) -> None:
        error: Exception | None = None
        if action is not None:
            try:
                action()
            except (OSError, ValueError) as problem:
                error = problem
        errors: list[Exception | None] = [None] * self.world.size
        distributed.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found

    def lease_lost(self) -> bool:
        """Whether this is the first rank and the run is no longer leased to it."""
        return self.lease is not None and not self.lease.still_held()

    def interruption(self, done: int, steps: int, by_keyboard: bool) -> Interrupted:
        """Return what ends a run that was asked to stop, after `done` of its steps and a checkpoint."""
        cause, code = ("Ctrl-C", 128 + signal.SIGINT) if by_keyboard else ("SIGTERM", PREEMPTED_EXIT_CODE)
        return Interrupted(
            f"stopped by {cause} after step {done} of {steps}; run the same command again to resume", code
        )

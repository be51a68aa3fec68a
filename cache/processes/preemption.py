"""SIGTERM, by which schedulers and launchers ask a process to stop.

A build stops at once (`exit_on_sigterm`), a training run after a checkpoint (`StopRequest`), and the workers that load
its data only when the run has ended (`ignore_sigterm`).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Self

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped on request after a checkpoint; start again to resume


class Interrupted(Exception):
    """The run was asked to stop, and did so after a checkpoint. The message names the step."""


class StopRequest:
    """Whether SIGTERM has arrived. While `listening`, the signal does nothing else."""

    def __init__(self) -> None:
        self.received = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Self]:
        """Note SIGTERM instead of ending the process."""
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, with exit code 143; further signals are ignored meanwhile.

    Outside the main thread, where Python allows no signal handlers, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        ignore_sigterm()
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on, in this process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

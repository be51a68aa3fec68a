"""SIGTERM, by which schedulers and launchers ask a process to stop.

A build stops at once (`exit_on_sigterm`), a training run as its `StopRequest` says, and the workers that load its data
only when the run has ended (`ignore_sigterm`).
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped on request, with more to do; start again to go on


class Interrupted(BaseException):
    """The run was asked to stop, and did so: before its first step, or after a checkpoint. The message says which.

    Like KeyboardInterrupt it is no error: what handles errors should let it pass.

    Attributes:
        exit_code: with which the process should end.
        at_once: whether nothing needs to be brought to an end first.
    """

    def __init__(self, message: str, exit_code: int = PREEMPTED_EXIT_CODE, at_once: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.at_once = at_once


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

"""A run that is asked to stop: by SIGTERM, as schedulers and launchers do."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: stopped on request and saved, start again to go on


class Interrupted(Exception):
    """The run was asked to stop, and did so after a checkpoint. The message says after which step."""


class StopRequest:
    """Whether SIGTERM has come. While `listening`, the signal does nothing by itself."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

"""SIGTERM and Ctrl-C to a training run, from the first moment of its process to the last.

Before the first step there is nothing to save, so the run ends where it is. Later it ends after a step, on which all
ranks agree, and a checkpoint. Once the last step is done the signals change nothing any more.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from enum import Enum
from types import FrameType
from typing import NoReturn, Protocol, Self

from threetowers.cache.processes.preemption import Interrupted

GRACE_SECONDS = 10.0  # in which the main thread may end by itself; launchers kill their ranks after 30
POLL_SECONDS = 1.0  # between two looks at what other ranks have told
REPEAT_SECONDS = 2.0  # after which `Interrupted` is raised again: callbacks and destructors swallow exceptions
INSIST_SECONDS = 1.0  # launchers repeat a Ctrl-C at once, users do not
KEYBOARD_MESSAGE = "threetowers: stopping after this step and a checkpoint; Ctrl-C again to stop at once\n"
MESSAGE = "stopped by SIGTERM before the first step: nothing to save; run the same command again to start or resume"


class RankStore(Protocol):
    """What all ranks of a launch can read and write at any time, such as torch's Store."""

    def set(self, key: str, value: str) -> None:
        """Store a value."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are stored."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return its value."""


class _Phase(Enum):
    """How far a run has come, as far as a request to stop is concerned."""

    SETUP = 1  # a request ends the process
    FIRST_STEP = 2  # a request is noted; but one that met another rank in its setup ends this one too
    LATER = 3  # a request is noted


class StopRequest:
    """Whether a run was asked to stop. The one of a process is `StopRequest.of_process()`.

    While it listens, a request before the first step raises `Interrupted` in the main thread, wherever that is, and is
    told to the other ranks, which may be waiting for this one. A main thread that does not come back to Python (a
    collective, a compiler) is given GRACE_SECONDS, then the process ends all the same.
    """

    _current: "StopRequest | None" = None
    _uses = 0  # of `together` in this process: each has its own keys in the store

    def __init__(self) -> None:
        self.received = False  # a request was noted, to be followed after a step
        self.by_keyboard = False
        self._phase = _Phase.SETUP
        self._ending = False  # a request before the first step, here or elsewhere, is being followed
        self._leaving = False  # the main thread is on its way out
        self._raised_at = float("-inf")
        self._keyboard_at = 0.0
        self._store: RankStore | None = None
        self._ranks = 1
        # Whether a request ends the run is decided by the thread or the main thread, whichever sees it first.
        self._lock = threading.RLock()
        self._watching: threading.Event | None = None  # set to end the thread
        self._wakeup_before = -1

    @classmethod
    def of_process(cls) -> "StopRequest":
        """Return the request that listens in this process, or a new one."""
        return cls._current or cls()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Self]:
        """Handle the signals inside the context; where they are handled already, or cannot be, change nothing."""
        if StopRequest._current is not None or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        unraisable_before = sys.unraisablehook
        self.listen()
        try:
            yield self
        finally:
            self._stop_watching()
            StopRequest._current = None
            sys.unraisablehook = unraisable_before
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Handle the signals from now on, for the rest of this process."""
        self._phase = _Phase.SETUP
        StopRequest._current = self
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        self._watching = threading.Event()
        threading.Thread(target=self._watch, args=(read_end, self._watching), daemon=True, name="stop request").start()
        # The interpreter writes each signal's number there, also while the main thread does not run Python.
        self._wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        sys.unraisablehook = _unraisable

    @contextlib.contextmanager
    def together(self, store: RankStore | None, ranks: int) -> Iterator[None]:
        """Before the first step, let a request to one rank inside the context end all of them.

        Args:
            store: That the ranks share, for the use of this object alone; None for a single rank.
            ranks: Their number.

        Raises:
            Interrupted: In place of errors that come from the end of other ranks.
        """
        StopRequest._uses += 1
        self._ranks = ranks
        self._store = store
        try:
            yield
        except BaseException as error:
            if not self._ending:
                raise
            self._leaving = True
            self._wait_for_ranks()
            if isinstance(error, Interrupted):
                raise
            raise Interrupted(MESSAGE, at_once=True) from error
        finally:
            self._store = None

    def begin_first_step(self) -> None:
        """Note requests from now on, instead of ending the process. Raises Interrupted if one came before."""
        with self._lock:
            if self._ending:
                raise Interrupted(MESSAGE, at_once=True)
            self._phase = _Phase.FIRST_STEP

    def first_step_done(self) -> None:
        """Say that every rank has begun its first step: from now on no rank ends without the others' agreement."""
        with self._lock:
            self._phase = _Phase.LATER
        self._stop_watching()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a request, or end the main thread's work."""
        if number == signal.SIGINT and not self._ending:
            insisting = self.by_keyboard and time.monotonic() - self._keyboard_at > INSIST_SECONDS
            if self._phase is _Phase.SETUP or insisting:
                raise KeyboardInterrupt
            if not self.by_keyboard:
                os.write(2, KEYBOARD_MESSAGE.encode())
                self._keyboard_at = time.monotonic()
            self.by_keyboard = True
        with self._lock:
            self._ending |= self._phase is _Phase.SETUP
            self.received = True
        if self._ending and not self._leaving and time.monotonic() - self._raised_at > REPEAT_SECONDS:
            self._raised_at = time.monotonic()
            raise Interrupted(MESSAGE, at_once=True)

    def _watch(self, wakeup: int, stopped: threading.Event) -> None:
        """Tell other ranks of a request before the first step, hear of theirs, and end the process if nothing does."""
        deadline = float("inf")
        told = False
        while not stopped.is_set():
            ready, _, _ = select.select([wakeup], [], [], POLL_SECONDS)
            asked = bool(ready) and signal.SIGTERM in os.read(wakeup, 4096)
            store = self._store
            try:
                if not asked and not self._ending and store is not None and store.check([self._key("told")]):
                    with self._lock:
                        self._ending = self._phase is not _Phase.LATER
                with self._lock:
                    self._ending |= asked and self._phase is _Phase.SETUP
                if self._ending and not told and store is not None:
                    told = True
                    store.set(self._key("told"), "")
                    store.add(self._key("heard"), 1)
            except Exception:  # the rank that holds the store is gone: errors of collectives, or the deadline, end this
                self._store = None
            if self._ending:
                with self._lock:
                    if not asked and not stopped.is_set():  # so that the main thread hears of it, and again if need be
                        os.kill(os.getpid(), signal.SIGTERM)
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            if time.monotonic() >= deadline:
                leave(Interrupted(MESSAGE, at_once=True))
        os.close(wakeup)

    def _stop_watching(self) -> None:
        """End the thread. For the main thread."""
        if self._watching is None:
            return
        write_end = signal.set_wakeup_fd(self._wakeup_before)
        with self._lock:
            self._watching.set()
        self._watching = None
        if write_end >= 0:
            os.close(write_end)

    @classmethod
    def _key(cls, what: str) -> str:
        return f"threetowers/stop/{cls._uses}/{what}"

    def _wait_for_ranks(self) -> None:
        """Give the other ranks the time to hear of a request, before this one's end breaks their connections."""
        deadline = time.monotonic() + GRACE_SECONDS / 2
        with contextlib.suppress(Exception):  # the store's own kinds, when its rank has gone
            while self._store is not None and self._store.add(self._key("heard"), 0) < self._ranks:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)


def leave(error: Interrupted) -> NoReturn:
    """Say that the run was interrupted, and end this process. From the main thread, or where nothing matters any more.

    An interruption `at_once` ends it whatever its threads are doing: they may be reading a tar, or waiting for a rank.
    """
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    os.write(2, f"threetowers: {rank}Interrupted: {error}\n".encode())
    if error.at_once:
        os._exit(error.exit_code)
    sys.exit(error.exit_code)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Report an exception where none can be raised, except for `Interrupted`, which is raised again later."""
    if not isinstance(unraisable.exc_value, Interrupted):
        sys.__unraisablehook__(unraisable)


def _in_child() -> None:
    """Leave the signals of a forked child to its parent once the run notes them; before, they end the child.

    Schedulers send SIGTERM to every process, a terminal its Ctrl-C, and the last step still needs the data workers.
    """
    request = StopRequest._current
    if request is None:
        return
    signal.set_wakeup_fd(-1)
    in_setup = request._phase is _Phase.SETUP
    signal.signal(signal.SIGTERM, signal.SIG_DFL if in_setup else signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler if in_setup else signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)

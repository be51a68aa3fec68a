"""SIGTERM and Ctrl-C to a run: they end it before the first step, on all ranks, and are noted later."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from threetowers.cache.processes import stop_request
from threetowers.cache.processes.preemption import Interrupted
from threetowers.cache.processes.stop_request import StopRequest

# Rank 0 waits in a collective for rank 1, which waits for something else and is asked to stop: arguments RANK PORT.
RANK = """
import sys, time
from threetowers.cache.processes.preemption import Interrupted
from threetowers.cache.processes.stop_request import StopRequest, leave
from torch import distributed
rank, port = map(int, sys.argv[1:])
try:
    with StopRequest().listening() as request:
        distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        with request.together(distributed.distributed_c10d._get_default_store().clone(), 2):
            print("ready", flush=True)
            distributed.barrier() if rank == 0 else time.sleep(60)
except Interrupted as error:
    leave(error)
"""
# The main thread does not come back to Python: the interpreter's handlers of signals never run.
STUCK = """
import ctypes
from threetowers.cache.processes import stop_request
stop_request.GRACE_SECONDS = stop_request.POLL_SECONDS = 0.1
with stop_request.StopRequest().listening():
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # no signal interrupts the second
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""
# The signal arrives in a destructor, where exceptions end.
SWALLOWED = """
import os, signal, time
from threetowers.cache.processes import stop_request
from threetowers.cache.processes.preemption import Interrupted
stop_request.POLL_SECONDS = stop_request.REPEAT_SECONDS = 0.05
class Swallowing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
try:
    with stop_request.StopRequest().listening():
        Swallowing()
        time.sleep(60)
except Interrupted as error:
    stop_request.leave(error)
"""


@contextlib.contextmanager
def started(code: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that runs `code` and has said that it is ready."""
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def request_(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopRequest]:
    with StopRequest().listening() as listening:
        yield listening


def test_before_the_first_step_sigterm_interrupts_whatever_is_done(request_: StopRequest) -> None:
    with pytest.raises(
        Interrupted, match="before the first step: nothing to save; run the same command again"
    ) as found:
        os.kill(os.getpid(), signal.SIGTERM)
    assert (found.value.exit_code, found.value.at_once) == (75, True)
    os.kill(os.getpid(), signal.SIGTERM)  # a second signal does not stop the clean-up
    with pytest.raises(Interrupted):
        request_.begin_first_step()


def test_before_the_first_step_ctrl_c_is_as_everywhere(request_: StopRequest) -> None:
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not request_.received


def test_later_sigterm_is_noted(request_: StopRequest) -> None:
    for begin in (request_.begin_first_step, request_.first_step_done):
        begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request_.received
        assert not request_.by_keyboard


def test_later_ctrl_c_is_noted_unless_it_is_repeated(
    request_: StopRequest, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    request_.begin_first_step()
    for _ in range(2):  # a launcher passes on what the terminal has sent already
        os.kill(os.getpid(), signal.SIGINT)
    assert (request_.received, request_.by_keyboard) == (True, True)
    assert capfd.readouterr().err.count("Ctrl-C again to stop at once") == 1
    monkeypatch.setattr(stop_request, "INSIST_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_are_restored() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest().listening() as request:
        assert StopRequest.of_process() is request
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    assert StopRequest.of_process() is not request
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("later", "ends"), [(False, -signal.SIGTERM), (True, 0)])
def test_a_signal_to_a_forked_child_is_its_own(request_: StopRequest, later: bool, ends: int) -> None:
    if later:
        request_.begin_first_step()
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ends
    time.sleep(0.01)
    assert not request_.received


@pytest.mark.distributed
def test_a_rank_that_waits_for_an_interrupted_one_ends_too() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with started(RANK, "0", port) as waiting, started(RANK, "1", port) as interrupted:
        for process in (waiting, interrupted):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()
        interrupted.send_signal(signal.SIGTERM)
        for process in (interrupted, waiting):
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 75, errors
            assert "Interrupted: stopped by SIGTERM before the first step" in errors


def test_a_main_thread_that_does_not_come_back_is_ended() -> None:
    with started(STUCK) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        asleep = 0
        while asleep < 5:  # in a row: the second lock
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.count("\n")) == (75, 1), errors


def test_an_interruption_that_is_swallowed_is_repeated() -> None:
    with started(SWALLOWED) as process:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.count("\n")) == (75, 1), errors

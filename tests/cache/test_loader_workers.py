"""Workers of torch's loaders end with the process that loads, however it ends, and see what it sees."""

import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import fsspec
import pytest
from torch.utils.data import DataLoader

from threetowers.cache.processes.liveness import process_exists
from threetowers.cache.processes.loader_workers import loading, worker_beginning
from threetowers.cache.processes.worker_processes import server_context

ROOT = Path(__file__).parents[2]
STARTED = """
import multiprocessing, os, signal, sys, time
from torch.utils.data import DataLoader
from threetowers.cache.processes.loader_workers import loading, worker_beginning
from threetowers.cache.processes.worker_processes import server_context

def numbers():
    context = server_context() if sys.argv[1] == "forkserver" else multiprocessing.get_context("fork")
    options = {"num_workers": 2, "multiprocessing_context": context, "worker_init_fn": worker_beginning()}
    with loading(DataLoader(range(1000), **options)) as loaded:
        for number in loaded:
            if number == 2 and sys.argv[2] == "fails":
                raise OverflowError(number)
            yield number

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # in its forks, too, as in those of the server
numbers = numbers()
next(numbers)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""
ENDS = {
    "returns": "",  # with a generator that is still open
    "fails": "list(numbers)",  # with a traceback that refers to the loader
    "killed": "time.sleep(600)",
}


@pytest.mark.distributed
@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
@pytest.mark.parametrize("end", ENDS)
def test_workers_end_with_the_process_that_loads(end: str, start_method: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", STARTED + ENDS[end], start_method, end]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        if end == "killed":
            process.kill()
        try:
            process.wait(timeout=120)
        finally:
            process.kill()
    assert process.returncode == {"returns": 0, "fails": 1, "killed": -9}[end]
    until = time.monotonic() + 60
    while (left := [pid for pid in workers if process_exists(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, 9)
    assert not left


class Surroundings:
    """One sample: what a worker finds in its environment and in the configuration of storages."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[str | dict[str, object] | None]:
        return [os.environ.get("TOWERS_NEW"), os.environ.get("TOWERS_OLD"), fsspec.config.conf.get("towers", {})]


def test_workers_see_what_changed_since_their_server_started(monkeypatch: pytest.MonkeyPatch) -> None:
    forkserver._forkserver._stop()  # one that another test may have started
    monkeypatch.setenv("TOWERS_OLD", "old")
    context = server_context()
    monkeypatch.setenv("TOWERS_NEW", "new")
    monkeypatch.delenv("TOWERS_OLD")
    monkeypatch.setitem(fsspec.config.conf, "towers", {"key": "k"})
    loader = DataLoader(
        Surroundings(),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        multiprocessing_context=context,
        worker_init_fn=worker_beginning(),
    )
    with loading(loader) as found:
        assert list(found) == [["new", None, {"key": "k"}]]


def test_without_workers_nothing_has_to_end() -> None:
    with loading(DataLoader(range(3), batch_size=None)) as found:  # type: ignore[arg-type]
        assert list(found) == [0, 1, 2]

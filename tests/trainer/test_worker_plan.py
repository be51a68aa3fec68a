"""Workers make parts of batches: the batches stay the same, and what waits in shared memory is bounded."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.trainer.loading import load_batches, loader_of, open_run, same
from threetowers.cache.processes import worker_processes
from threetowers.cache.processes.world import World
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data import worker_plan
from threetowers.trainer.data.worker_plan import WorkerPlan, plan_workers, sample_bytes

SAMPLE_BYTES = 3 * 32**2 + 8 * 8 + 8  # of the `clip` run: an image, tokens, a group
# Workers are forked in older Pythons alone: newer ones warn of it beside threads.
START_METHODS = ["forkserver"] if sys.version_info >= (3, 12) else ["fork", "forkserver"]


def plan_of(tree: dict[str, Any], ranks: int = 1, local_ranks: int = 1, **data: Any) -> WorkerPlan:
    run = tree | {"data": tree["data"] | data}
    return plan_workers(parse(run), open_run(run), World(0, ranks, 0, local_ranks))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # as many workers as it takes, on any machine
@pytest.mark.parametrize("access", ["random", "sequential"])
def test_parts_do_not_change_the_batches(clip: dict[str, Any], access: str) -> None:
    clip["data"] |= {"access": access, "num_streams": 6, "shuffle_buffer": 12}
    samples = open_run(clip)
    whole = load_batches(clip, stop=5)
    for workers, parts, ahead in ((2, 2, 3), (2, 6, 1), (3, 6, 2)):
        plan = WorkerPlan(workers, parts, ahead, part_bytes=0)
        assert all(same(a, b) for a, b in zip(loader_of(clip, samples, stop=5, plan=plan), whole, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("access", ["random", "sequential"])
def test_workers_of_a_server_give_the_same_batches(
    three: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    """As beside a GPU. They do not run the main script again, and a SIGTERM to all processes does not end them."""
    three["data"] |= {"access": access, "num_streams": 2, "shuffle_buffer": 12}
    samples = open_run(three)
    whole = load_batches(three, stop=9)
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("raise SystemExit(3)\n")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(worker_processes, "start_method", lambda: "forkserver")
    forkserver._forkserver._stop()  # one that another test may have started in its own way
    before = children()
    found = []
    for batch in loader_of(three, samples, stop=9, plan=WorkerPlan(2, 2, 1, part_bytes=0)):
        if not found:
            server = forkserver._forkserver._forkserver_pid
            workers = children(server)
            assert len(workers) == 2
            for process in {server, *workers}:
                os.kill(process, signal.SIGTERM)
        found.append(batch)
    assert all(same(a, b) for a, b in zip(found, whole, strict=True))
    assert script.__file__.endswith("script.py")
    assert children() - before <= {server, resource_tracker._resource_tracker._pid}


def shared_memory(processes: set[int]) -> dict[int, int]:
    """Return the size of each piece of torch's shared memory that any of these processes has open, by its number."""
    sizes = {}
    for process in processes:
        for file in Path(f"/proc/{process}/fd").iterdir():
            try:
                if os.readlink(file).startswith("/dev/shm/torch"):
                    sizes[file.stat().st_ino] = file.stat().st_size
            except FileNotFoundError:  # closed meanwhile
                pass
    return sizes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("method", START_METHODS)
def test_what_waits_is_what_the_plan_says(clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Measure what the workers of a loader hold open once they have made all they may make ahead."""
    monkeypatch.setattr(worker_processes, "start_method", lambda: method)
    others = shared_memory({os.getpid()})
    samples = open_run(clip)
    plan = WorkerPlan(3, 3, 2, part_bytes=4 * SAMPLE_BYTES)
    batches = iter(loader_of(clip, samples, stop=30, plan=plan))

    def shared_bytes() -> int:
        workers = {process.pid for process in multiprocessing.active_children() if process.pid is not None}
        sizes = shared_memory({os.getpid()} | workers)
        return sum(size for number, size in sizes.items() if number not in others)

    for _ in range(2):
        next(batches)
        found = 0
        for _ in range(60):
            found = shared_bytes()
            if found >= plan.shared_bytes - plan.part_bytes:
                break
            time.sleep(0.05)
        time.sleep(0.2)  # more would come now
        found = shared_bytes()
        assert plan.shared_bytes - plan.part_bytes <= found <= plan.shared_bytes
    del batches


def children(process: int | None = None) -> set[int]:
    process = process or os.getpid()
    return {int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()}


def test_bytes_of_a_sample_are_those_of_its_tensors(three: dict[str, Any]) -> None:
    three["towers"]["third"]["on_missing_row"] = "mask"
    (batch,) = load_batches(three, stop=1)
    tensors = [*batch.inputs.values(), *batch.present.values(), batch.groups_b]
    assert sum(tensor.nbytes for tensor in tensors) == len(batch) * sample_bytes(parse(three), open_run(three))


TWICE = 2 * 2 * 4 * SAMPLE_BYTES  # half of it is for two ranks; a part of a third of the batch has four samples


@pytest.mark.parametrize(
    ("free", "parts", "ahead"),
    [
        (None, 3, 4),  # no such memory on this system
        (10**9, 3, 4),
        (13 * TWICE, 3, 4),  # three workers with four parts each, and one that is copied
        (13 * TWICE - 1, 3, 3),
        (4 * TWICE, 3, 1),
        (4 * TWICE - 1, 6, 1),  # then in smaller parts
        (TWICE, 12, 1),  # single samples
    ],
)
def test_parts_that_wait_fit_into_half_of_the_shared_memory(
    clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch, free: int | None, parts: int, ahead: int
) -> None:
    monkeypatch.setattr(worker_plan, "_free_bytes", lambda: free)
    plan = plan_of(clip, local_ranks=2, workers=3)
    assert (plan.workers, plan.parts, plan.ahead) == (3, parts, ahead)
    assert free is None or plan.shared_bytes <= free / 2
    assert ("enlarge it" in plan.line()) == (ahead < 4)


def test_too_little_shared_memory_is_refused(clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_plan, "_free_bytes", lambda: 4 * SAMPLE_BYTES)
    with pytest.raises(ConfigError, match=r"data\.workers: 3 on each of 8 ranks .* 0\.1 MB at least.*0\.0 MB are free"):
        plan_of(clip, ranks=1, local_ranks=8, workers=3)
    assert plan_of(clip, local_ranks=8, workers=0).line() == "workers: none, the training process reads and decodes"


def test_workers_by_default(clip: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a CPU; beside a GPU, the cores of the rank but one."""
    del clip["data"]["workers"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert plan_of(clip).workers == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plan_of(clip, ranks=2, local_ranks=8).workers == 7
    assert plan_of(clip).workers == 16
    assert plan_of(clip, ranks=3, access="sequential", num_streams=12).workers == 4  # no more than streams of a rank
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert plan_of(clip).workers == 1

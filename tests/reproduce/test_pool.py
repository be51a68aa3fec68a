"""The pool: all tasks run, and a failure is raised."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from reproduce import pool
from reproduce.folder import read_json, write_json
from reproduce.pool import Task, run_tasks


def work(folder: Path, number: int) -> None:
    if number < 0:
        raise ValueError(f"{number} is less than nothing")
    write_json(folder / f"{number}.json", os.getpid())


def fail(folder: Path) -> None:
    write_json(folder / "failing.json", 0)
    raise ValueError("as it should")


def outlast(folder: Path) -> None:
    while not (folder / "failing.json").exists():
        time.sleep(0.05)
    time.sleep(2)
    write_json(folder / "outlasted.json", 0)


def test_all_is_done_by_processes_that_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "TASKS_A_PROCESS", 2)
    run_tasks([Task(str(n), work, (tmp_path, n)) for n in range(3)], 1, "task")
    first, second, third = (read_json(tmp_path / f"{n}.json") for n in range(3))
    assert first == second != third


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failure_ends_it(tmp_path: Path, workers: int) -> None:
    tasks = [Task(str(n), work, (tmp_path, n)) for n in (0, -1)]
    with pytest.raises(ValueError, match="-1 is less than nothing"):
        run_tasks(tasks, workers, "task")
    assert (tmp_path / "0.json").exists()


def test_after_a_failure_what_is_under_way_is_finished_and_no_more_begun(tmp_path: Path) -> None:
    tasks = [Task("fails", fail, (tmp_path,)), Task("outlasts", outlast, (tmp_path,)), Task("1", work, (tmp_path, 1))]
    with pytest.raises(ValueError, match="as it should"):
        run_tasks(tasks, 2, "task")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["failing.json", "outlasted.json"]


def test_nothing_to_do_starts_nothing() -> None:
    run_tasks([], 2, "task")


def beat(folder: Path) -> None:
    while True:
        write_json(folder / "beat.json", time.time())
        time.sleep(0.05)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    arguments = ([Task("beats", beat, (tmp_path,))], 1, "task")
    parent = multiprocessing.get_context("spawn").Process(target=run_tasks, args=arguments)
    parent.start()
    while not (tmp_path / "beat.json").exists():
        assert parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while time.time() - read_json(tmp_path / "beat.json") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.time() - read_json(tmp_path / "beat.json") >= 2

"""The folder of a run: who may train in it, and which changes of the schedule a run that goes on may make."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from threetowers.cache.processes.liveness import process_start
from threetowers.cache.storage.lease import LeaseOwner
from threetowers.cache.storage.local import LocalStorage
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.run import run_lease
from threetowers.trainer.run.run_folder import RunFolder
from threetowers.trainer.run.run_lease import RunInUse, local_run_lease

SAMPLES = 24  # of an epoch: two steps


def leave_lease(folder: RunFolder, owner: LeaseOwner) -> None:
    """Write another process's lease on a folder."""
    LocalStorage(folder.path / ".lease").put("owner.json", owner.content, owner="t")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(run_lease, "SETTLE_SECONDS", 0.02)


def test_a_folder_is_leased_until_the_end_and_nothing_is_left(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with local_run_lease(folder.path) as lease:
        assert lease.still_held()
        assert json.loads((folder.path / ".lease" / "owner.json").read_text())["pid"] == os.getpid()
    assert not folder.path.exists()
    with local_run_lease(folder.path):
        folder.summary.touch()
    assert list(folder.path.iterdir()) == [folder.summary]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    parent = os.getppid()
    other = LeaseOwner(pid=parent, start=process_start(parent) or "")
    leave_lease(folder, other)
    expected = f"{folder.path}: process {parent} on {other.host} has been training this run since {other.since}. Wait"
    with pytest.raises(RunInUse, match=re.escape(expected)), local_run_lease(folder.path):
        pass
    assert list(folder.path.rglob("*.json")) == [folder.path / ".lease" / "owner.json"]


@pytest.mark.parametrize("how", ["ended", "its id is another's now"])
def test_the_folder_of_a_process_that_has_ended_is_free_at_once(how: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    start = process_start(os.getppid()) or ""
    ended = int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)
    pid = ended if how == "ended" else os.getppid()
    leave_lease(folder, LeaseOwner(pid=pid, start=f"{start.rpartition('/')[0]}/1"))
    with local_run_lease(folder.path) as lease:
        assert lease.still_held()


def test_a_silent_process_of_another_machine_is_waited_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    leave_lease(folder, LeaseOwner(host="elsewhere"))
    with local_run_lease(folder.path, timeout=0.2) as lease:
        assert lease.still_held()


def test_a_living_process_of_another_machine_is_not_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    other = LeaseOwner(host="elsewhere")
    leave_lease(folder, other)
    beat = threading.Timer(0.1, leave_lease, (folder, other))
    beat.start()
    with (
        pytest.raises(RunInUse, match="on elsewhere has been training this run"),
        local_run_lease(folder.path, timeout=60),
    ):
        pass
    beat.join()


def test_a_lost_lease_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    """Also where the heartbeat had no time: the process was frozen as a whole."""
    folder = RunFolder(tmp_path / "run")
    with local_run_lease(folder.path, timeout=60) as lease:
        leave_lease(folder, LeaseOwner(host="elsewhere"))
        assert lease.still_held()  # by local state: the last look was a moment ago
        lease._confirmed_at -= 31
        assert not lease.still_held()
        lease.refresh()
    assert b"elsewhere" in (folder.path / ".lease" / "owner.json").read_bytes()


def run_of(clip: dict[str, Any], **changes: Any) -> RunFolder:
    """The folder of a run that has begun."""
    folder = RunFolder(Path(clip["output_dir"]))
    folder.create(parse(clip | changes), {}, {})
    return folder


CONSTANT = {"optim": {"schedule": "constant", "warmup": {"steps": 2}}}
RSQRT = {"optim": {"schedule": "rsqrt", "warmup": {"steps": 2}}}
SHARE = {"optim": {"schedule": "constant", "warmup": 0.5}}
COOLED = {"optim": {"schedule": "constant", "warmup": 0.0, "cooldown": {"steps": 2}}}
COSINE = {"optim": {"warmup": {"steps": 2}}}
NINE = {"duration": {"steps": 9}}


@pytest.mark.parametrize(
    ("before", "taken", "after"),
    [
        (CONSTANT, 6, NINE),
        (CONSTANT, 6, {"duration": {"epochs": 4.5}}),
        (CONSTANT, 3, {"duration": {"steps": 4}}),  # shorter, not yet there
        (RSQRT, 6, NINE),
        (SHARE, 6, NINE | {"optim": {"schedule": "constant", "warmup": {"steps": 3}}}),
        (CONSTANT, 6, NINE | {"optim": CONSTANT["optim"] | {"cooldown": {"steps": 3}}}),  # a cooldown is appended
        (COOLED, 4, NINE),  # from a checkpoint before the cooldown
        (COSINE, 0, NINE),  # no step was taken
        (COSINE, 2, NINE),  # still warming up
    ],
)
def test_a_run_may_go_on_where_its_steps_keep_their_learning_rates(
    before: dict[str, Any], taken: int, after: dict[str, Any], clip: dict[str, Any]
) -> None:
    folder = run_of(clip, **before)
    config = parse(clip | before | after)
    assert {change.key.partition(".")[0] for change in folder.check(config)} <= {"duration", "optim"}
    folder.check_schedule(config, SAMPLES, taken or None)


@pytest.mark.parametrize(
    ("before", "taken", "after", "message"),
    [
        (COSINE, 6, NINE, "step 4 had the learning rate .* a cosine is laid out .* towers.NAME.init="),
        (SHARE, 6, NINE, r"step 1 had the learning rate 0.000333\d and .*: 'optim.warmup=\{steps: 3\}'"),
        (COOLED, 6, NINE, "the cooldown began after step 4: to go on from before it, remove the later checkpoints"),
        (
            CONSTANT,
            6,
            {"duration": {"steps": 7}, "optim": CONSTANT["optim"] | {"cooldown": {"steps": 3}}},
            "step 6 had the learning rate 0.001 .* let a cooldown begin after step 6",
        ),
        (CONSTANT, 6, {"duration": {"steps": 5}}, "6 steps were taken already, and the run would now have 5"),
        (CONSTANT, 6, {"optim": CONSTANT["optim"] | {"lr": 0.1}}, "config:\n  optim.lr: 0.001 -> 0.1"),
    ],
)
def test_other_changes_of_the_schedule_are_refused(
    before: dict[str, Any], taken: int, after: dict[str, Any], message: str, clip: dict[str, Any]
) -> None:
    folder = run_of(clip, **before)
    config = parse(clip | before | after)

    def check() -> None:
        folder.check(config)
        folder.check_schedule(config, SAMPLES, taken or None)

    with pytest.raises(ConfigError, match="(?s)holds a run with another .*" + message):
        check()


def test_a_finished_run_without_checkpoints_does_not_begin_again(clip: dict[str, Any]) -> None:
    folder = run_of(clip, **CONSTANT)
    assert folder.finished_steps() is None
    folder.weights.touch()
    folder.summary.write_text('{"steps": 6}')
    assert folder.finished_steps() == 6
    folder.check_schedule(parse(clip | CONSTANT), SAMPLES, None)
    with pytest.raises(ConfigError, match="finished and has no checkpoint to go on from"):
        folder.check_schedule(parse(clip | CONSTANT | NINE), SAMPLES, None)
    left = folder.path / ".model.safetensors.host.1.2.partial"
    left.touch()
    folder.remove_results()
    assert not any(path.exists() for path in (folder.weights, folder.summary, left))


def test_owners_are_told_apart() -> None:
    own = LeaseOwner()
    assert not own.is_dead(own)
    assert own.is_dead(LeaseOwner())  # what this process did before
    assert not own.is_dead(dataclasses.replace(own, token="t", start="another-boot/1/2"))  # cannot be looked at
    assert not own.is_dead(dataclasses.replace(own, token="t", host="elsewhere"))

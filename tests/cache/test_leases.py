"""Leases that dead workers leave behind."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from threetowers.cache.builder.leases import LEASES, Leases
from threetowers.cache.storage import lease
from threetowers.cache.storage.lease import LeaseOwner
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import open_storage


def test_stale_leases_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ended = int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)
    dead, alive = dataclasses.replace(LeaseOwner(), pid=ended), LeaseOwner()
    killed, living = Leases(storage, dead, timeout=60), Leases(storage, alive, timeout=60)
    assert killed.acquire(1)
    assert killed.acquire(2)
    assert living.acquire(3)
    # Killed between asking the storage for its time and removing the probe.
    probe = f"{LEASES}/clock.{dead.token}"
    storage.put(probe, json.dumps(dataclasses.asdict(dead)).encode(), owner="clock")
    Leases(storage, LeaseOwner(token="another"), timeout=60).remove_stale({1})
    assert storage.listdir(LEASES) == ["2.json", "3.json"]  # 2 is not finished: its next worker takes it over


def test_a_lease_that_is_released_during_a_heartbeat_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(tmp_path)
    leases = Leases(storage, LeaseOwner())
    assert leases.acquire(1)
    releasing = threading.Thread(target=leases.release, args=(1,))
    real = storage.put

    def put(name: str, data: bytes, owner: str) -> None:
        releasing.start()
        releasing.join(timeout=0.05)  # long enough to be over, if nothing holds it up
        real(name, data, owner)

    monkeypatch.setattr(storage, "put", put)
    leases.refresh()
    releasing.join()
    assert storage.listdir(LEASES) == []


def test_of_two_that_need_the_same_the_second_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.01)
    storage = LocalStorage(tmp_path / ".lease")
    other = lease.Lease(storage, "x.json", LeaseOwner(host="elsewhere"), 60, lease.StorageClock(storage, "clock"))
    assert other.acquire()
    threading.Timer(0.1, other.release).start()
    with lease.one_at_a_time(tmp_path, "x"):
        assert not other.held
        assert not other.acquire()
        with lease.one_at_a_time(tmp_path, "y"):
            pass
        assert storage.listdir() == ["x.json"]
    assert list(tmp_path.iterdir()) == []

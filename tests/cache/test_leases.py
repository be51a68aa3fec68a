"""Claims that dead workers leave behind."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from threetowers.cache.builder.leases import CLAIMS, Claims, Worker
from threetowers.cache.storage.storage import open_storage


def test_what_the_dead_leave_is_swept_and_what_the_living_hold_is_not(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ended = int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)
    dead, alive = dataclasses.replace(Worker(), pid=ended), Worker()
    killed, living = Claims(storage, dead, stale_seconds=60), Claims(storage, alive, stale_seconds=60)
    assert killed.take(1)
    assert killed.take(2)
    assert living.take(3)
    # Killed between asking the place for its time and tidying up.
    probe = f"{CLAIMS}/clock.{dead.token}"
    storage.put(probe, json.dumps(dataclasses.asdict(dead)).encode(), owner="clock")
    Claims(storage, Worker(token="another"), stale_seconds=60).sweep({1})
    assert storage.listdir(CLAIMS) == ["2.json", "3.json"]  # 2 is not finished: whoever builds it takes it over

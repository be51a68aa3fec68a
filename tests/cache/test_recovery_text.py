"""A build of captions that is interrupted at any time, or shared by workers, gives the bytes of an undisturbed one."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache.caches import without_times
from tests.cache.caption_tars import captioned
from tests.cache.text_encoders import PROCESS_ENV
from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.done_record import DoneRecord, read_done_record
from threetowers.cache.format.manifest import read_manifest
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.storage.storage import open_storage

N_TARS = 24
SIDES = ["image", "text"]
OPTIONS: dict[str, Any] = {"encoder": "test:pair", "of": SIDES, "batch_size": 5, "threads": 1, "device": "cpu"}

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pattern(
    tmp_path_factory: pytest.TempPathFactory,
    pack: Callable[..., Path],
    encode: Callable[..., bytes],
    draw: Callable[..., Any],
) -> str:
    root = tmp_path_factory.mktemp("captioned")
    for i in range(N_TARS):
        rows = captioned(8 + i % 5, i, lambda number: encode(draw(number, size=(20, 24))))
        pack(root / f"{i:02}.tar", [(sample.key, sample.members) for sample in rows])
    return str(root / "*.tar")


@pytest.fixture(scope="module")
def undisturbed(pattern: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    build_caches(BuildConfig(tars=[pattern], output_dir=[out / side for side in SIDES], **OPTIONS))
    return out


def records(folder: Path) -> list[DoneRecord]:
    storage = open_storage(folder)
    manifest = read_manifest(storage)
    return [
        without_times(read_done_record(storage, manifest, entry))
        for entry in read_table(storage).entries
        if (folder / f"done/{entry.id}.json").exists()
    ]


def finish(pattern: str, out: Path, undisturbed: Path) -> None:
    """Run the build to its end, and compare every byte."""
    build_caches(BuildConfig(tars=[pattern], output_dir=[out / side for side in SIDES], **OPTIONS))
    for side in SIDES:
        ours, theirs = open_storage(out / side), open_storage(undisturbed / side)
        assert ours.walk() == theirs.walk()
        for name in theirs.walk():
            if not name.startswith("done/"):
                assert ours.read(name) == theirs.read(name), f"{side}: {name}"
        assert records(out / side) == records(undisturbed / side)


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=PROCESS_ENV | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(pattern: str, out: Path) -> list[str]:
    flags = ["--encoder", "test:pair", "--of", *SIDES, "--batch-size", "5", "--threads", "1", "--device", "cpu"]
    return ["threetowers", "cache", "build", "--tars", pattern, "--output-dir", *(str(out / s) for s in SIDES), *flags]


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(kills: int, pattern: str, undisturbed: Path, tmp_path: Path) -> None:
    script = start(["tests.cache.forked_workers", pattern, str(tmp_path), "test:pair", str(kills), "1", *SIDES])
    output, errors = script.communicate(timeout=280)
    assert script.returncode == 0, errors
    assert f"killed {kills} builds" in output
    for out in tmp_path.iterdir():
        finish(pattern, out, undisturbed)


def test_sigterm_abandons_the_tar_and_exits_with_143(pattern: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    worker = start(command(pattern, out))
    while not (out / "text/done").is_dir() and worker.poll() is None:
        time.sleep(0.002)
    worker.send_signal(signal.SIGTERM)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 143, errors
    assert "Traceback" not in errors
    assert not open_storage(out / "text").listdir("leases")
    assert 0 < len(records(out / "text")) < N_TARS
    finish(pattern, out, undisturbed)


def test_two_workers_share_the_tars(pattern: str, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    workers = [start(command(pattern, out), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    ends = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ends
    for side in SIDES:
        built = [
            int(line.split(": ")[2].split(" tars built")[0])
            for output, _ in ends
            for line in output.splitlines()
            if f"/{side}: " in line
        ]
        assert sum(built) == N_TARS
    finish(pattern, out, undisturbed)

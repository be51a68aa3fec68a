"""Processes that decode give what threads give, leave nothing behind, and end with the process that they work for."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.cache.caches import without_times
from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.builder.decode_workers import DecodeThreads, DecodeWorkers
from threetowers.cache.builder.decoding import Decoder, PixelFormat
from threetowers.cache.format.views import Pixels, Views, as_pixels
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.images import BadImage

MARK = "TEST_OF_DECODE_WORKERS"


def quarter(image: Any) -> Pixels:
    return as_pixels(image.crop((0, 0, 8, 6)))


FORMATS = [
    PixelFormat(Views("crops:3", 1, 0.5, "randaugment:2:9"), quarter, (10, 7), "bicubic", None),
    PixelFormat(Views("center+flip"), quarter, (6, 8), "bicubic", None),
]


@pytest.fixture
def pattern(tmp_path: Path, pack: Callable[..., Path], samples: Callable[..., Any]) -> str:
    for i in range(4):
        rows = samples(5 + i, i)
        rows[i] = (rows[i][0], {"png": rows[i][1]["png"][:60]})  # an image that cannot be decoded
        pack(tmp_path / "tars" / f"{i}.tar", rows)
    return str(tmp_path / "tars" / "*.tar")


def same(found: Path, expected: Path) -> None:
    ours, theirs = EmbeddingCache.open(found), EmbeddingCache.open(expected)
    for tar_id in range(4):
        np.testing.assert_array_equal(ours.tar(tar_id), theirs.tar(tar_id))
        assert without_times(ours.record(tar_id)) == without_times(theirs.record(tar_id))
        assert ours.record(tar_id).counts == {"undecodable": 1}


def test_workers_come_from_the_server_of_all_workers(
    samples: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has SIGTERM blocked, as a training's data workers may come from it later; none runs the main script again."""
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    Path(script.__file__).write_text("raise SystemExit(3)\n")
    monkeypatch.setitem(sys.modules, "__main__", script)
    forkserver._forkserver._stop()  # one that another test may have started in its own way
    with DecodeWorkers(Decoder(FORMATS, max_pixels=10_000), 1) as workers:
        status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()
        ((_, members),) = samples(1, 1)
        assert workers.submit((0,), "a", members["png"]).result().image_hash
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    assert blocked >> (signal.SIGTERM - 1) & 1


def test_processes_give_what_threads_give(samples: Callable[..., Any]) -> None:
    decoder = Decoder(FORMATS, max_pixels=10_000)
    with DecodeWorkers(decoder, 2) as workers, DecodeThreads(decoder, 1) as threads:
        files = [members["png"] for _, members in samples(6, 1)] + [b"not an image"]
        for formats in ((0, 1), (1,)):
            pairs = [
                [pool.submit(formats, str(i), file) for i, file in enumerate(files)] for pool in (workers, threads)
            ]
            for ours, theirs in ((a.result(), b.result()) for a, b in zip(*pairs, strict=True)):
                assert ours.image_hash == theirs.image_hash
                if isinstance(theirs.views, BadImage):
                    assert isinstance(ours.views, BadImage)
                    assert (str(ours.views), ours.views.defect) == (str(theirs.views), theirs.views.defect)
                    continue
                assert not isinstance(ours.views, BadImage)
                assert ours.views.keys() == theirs.views.keys() == set(formats)
                for form in formats:
                    our_pixels, our_params = ours.views[form]
                    pixels, params = theirs.views[form]
                    np.testing.assert_array_equal(our_pixels, pixels)
                    np.testing.assert_array_equal(our_params, params)
        with pytest.raises(TypeError):  # a fault of the program is raised as it is, and the process goes on
            workers.submit((0,), "key", None).result()  # type: ignore[arg-type]
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        for process in processes:
            process.kill()
        with pytest.raises(RuntimeError, match=r"ended with exit code -9: .*use fewer \(--workers\)"):
            workers.submit((0,), "key", files[0]).result()
    assert not multiprocessing.active_children()


def processes_of(mark: str) -> list[int]:
    """The running processes that were started with this mark in their environment, directly or not."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_build_leaves_no_process_and_can_be_continued(
    number: int, pattern: str, tiny_encoder: Callable[..., str], tmp_path: Path
) -> None:
    out, reference = tmp_path / "cache", tmp_path / "reference"
    options: dict[str, Any] = {"encoder": tiny_encoder("test_vit@64")}
    flags = ["--encoder", options["encoder"], "--batch-size", "2"]
    command = ["threetowers", "cache", "build", "--tars", pattern, "--output-dir", str(out), *flags, "--workers", "2"]
    build = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | {MARK: str(out), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not list(out.glob("done/*.json")) and build.poll() is None:
        time.sleep(0.002)
    workers = set(processes_of(str(out))) - {build.pid}
    for pid in {build.pid} if number == signal.SIGKILL else {build.pid, *workers}:  # as a scheduler does
        os.kill(pid, number)
    _, errors = build.communicate(timeout=60)
    assert build.returncode == (-9 if number == signal.SIGKILL else 143), errors
    assert "Traceback" not in errors
    assert len(workers) >= 3, "the server of the forks, and two that decode"
    until = time.monotonic() + 30
    while processes_of(str(out)) and time.monotonic() < until:
        time.sleep(0.02)
    assert not processes_of(str(out))
    assert len(list(out.glob("done/*.json"))) < 4, "the end came before the signal"
    build_caches(BuildConfig(tars=[pattern], output_dir=out, **options, batch_size=2))
    build_caches(BuildConfig(tars=[pattern], output_dir=reference, **options, batch_size=2))
    same(out, reference)

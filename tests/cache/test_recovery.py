"""A build interrupted at any time leaves complete files, and run again gives the bytes of an undisturbed one."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cache.caches import without_times
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import WriteError
from threetowers.cache.verify.verify import verify

TinyEncoder = Callable[..., str]
N_TARS = 4
SCRIPT = """
import sys
from pathlib import Path
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
report = build_cache(BuildConfig(tars=[sys.argv[1]], output_dir=Path(sys.argv[2]), encoder=sys.argv[3], batch_size=5))
print("built", report.tars_built, "kept", report.tars_kept)
"""


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory, pack: Callable[..., Path], samples: Callable[..., Any]) -> str:
    root = tmp_path_factory.mktemp("packed")
    for i in range(N_TARS):
        pack(root / f"{i}.tar", samples(8 + i, i))
    return str(root / "*.tar")


@pytest.fixture(scope="module")
def options(tiny_encoder: TinyEncoder) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64"), "batch_size": 5}


@pytest.fixture(scope="module")
def undisturbed(pattern: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    return out


def same(folder: Path, reference: Path) -> None:
    """The same files with the same bytes; done records but for time and host; nothing left staged."""
    names = {path.relative_to(root) for root in (folder, reference) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names - {Path("done") / f"{i}.json" for i in range(N_TARS)}):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    ours, theirs = EmbeddingCache.open(folder), EmbeddingCache.open(reference)
    for tar_id in range(N_TARS):
        assert without_times(ours.record(tar_id)) == without_times(theirs.record(tar_id))
    report = verify(folder)
    assert report.ok, report.text()
    assert not report.warnings, report.text()


def finished_are_whole(folder: Path, reference: Path) -> int:
    """Every tar with a done record has its final bytes; returns how many there are."""
    if not (folder / "manifest.json").exists():
        with pytest.raises(ManifestError, match="no cache here"):
            EmbeddingCache.open(folder)
        return 0
    if not (folder / "tars/0.json").exists():
        with pytest.raises(ManifestError, match="a cache without tars"):
            EmbeddingCache.open(folder)
        return 0
    opened, finished = EmbeddingCache.open(folder), 0
    for tar_id in range(N_TARS):
        if (folder / "done" / f"{tar_id}.json").exists():
            assert (opened.tar(tar_id) == EmbeddingCache.open(reference).tar(tar_id)).all()
            finished += 1
        else:
            with pytest.raises(ManifestError, match="incomplete"):
                opened.tar(tar_id)
    return finished


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_kill_9_at_several_moments(pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    moments: tuple[Callable[[], bool], ...] = (
        lambda: (out / "manifest.json").exists(),
        lambda: (out / "store.zarr/emb/c").is_dir(),
        lambda: len(list(out.glob("done/*.json"))) >= 2,
    )
    finished = []
    for reached in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, pattern, str(out), options["encoder"]],
            env=environment(),
            stderr=subprocess.PIPE,
        )
        while not reached() and process.poll() is None:
            time.sleep(0.0005)
        os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        assert b"Traceback" not in errors, errors.decode()
        finished.append(finished_are_whole(out, undisturbed))
    assert finished[0] < N_TARS, "the first kill should come before the end"
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    same(out, undisturbed)


class Killed(BaseException):
    """Stands for the end of the process: nothing below may clean up after it."""


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(0, 5 + 5 * N_TARS, 3))
def test_stop_around_every_kind_of_rename(
    step: int,
    after: bool,
    pattern: str,
    options: dict[str, Any],
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    real, unlink, calls, killed = os.replace, Path.unlink, iter(range(10_000)), threading.Event()

    def replace(source: Path, target: Path) -> None:
        if next(calls) == step:
            if after:
                real(source, target)
            killed.set()
            raise Killed
        real(source, target)

    out = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", lambda self, **how: None if killed.is_set() else unlink(self, **how))
        with pytest.raises(Killed):
            build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    finished_are_whole(out, undisturbed)
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    same(out, undisturbed)


def test_two_processes_under_torchrun_write_the_same_bytes(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "script.py"), pattern, str(tmp_path / "cache"), options["encoder"]]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    built = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert sum(built) == N_TARS
    assert len(built) == 2
    same(tmp_path / "cache", undisturbed)


def test_a_full_disk_gives_one_message_and_no_partial_files(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (undisturbed / "store.zarr/emb/c/3/0").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(
            WriteError, match=r"cannot write .*/store\.zarr/emb/c/3/0 \(\d+ bytes\): File too large\. Make room"
        ):
            build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finished_are_whole(out, undisturbed) == 3
    assert not (out / "store.zarr/emb/c/3/0").exists()
    assert not list((out / "tmp").iterdir())
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    same(out, undisturbed)


def test_a_folder_that_cannot_be_created_is_named(pattern: str, options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(WriteError, match=f"cannot write {out}/manifest.json"):
            build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))


def test_a_put_replaces_the_old_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("deep/x", b"old", owner="t")

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError, match=r"deep/x \(3 bytes\): Input/output error"):
        storage.put("deep/x", b"new", owner="t")
    assert storage.read("deep/x") == b"old"
    assert not list((tmp_path / "tmp").iterdir())

"""Several workers and several caches: shared tars, one decode, tars added later; workers that die, freeze or end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from threetowers.cache.builder.build import CacheSpec, build, build_all
from threetowers.cache.builder.leases import Claims, Worker
from threetowers.cache.builder.opening import Terms
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import WriteError, open_storage
from threetowers.cache.verify.verify import verify

Weights = Callable[..., str]
N_TARS = 12
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory, pack: Callable[..., Path], samples: Callable[..., Any]) -> str:
    root = tmp_path_factory.mktemp("packed")
    for i in range(N_TARS):
        pack(root / f"{i:02}.tar", samples(3 + i % 4, i))
    return str(root / "*.tar")


@pytest.fixture(scope="module")
def options(weights: Weights) -> dict[str, Any]:
    return {"backbone": "test_vit", "weights": weights("test_vit"), "image_size": 64, "batch_size": 5, "threads": 1}


@pytest.fixture(scope="module")
def undisturbed(pattern: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    build([pattern], out, **options)
    return out


def same(found: str | Path, expected: Path) -> None:
    """The same objects with the same bytes; done records but for time and host; nothing left behind."""
    storage, reference = open_storage(found), open_storage(expected)
    names = reference.walk()
    assert storage.walk() == names
    for name in names:
        if not name.startswith("done/"):
            assert storage.read(name) == reference.read(name), name
    ours, theirs = EmbeddingCache.open(storage), EmbeddingCache.open(reference)
    for entry in theirs.tars:
        assert ours.record(entry.id).undated() == theirs.record(entry.id).undated()


def start(*arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(pattern: str, out: Path, options: dict[str, Any], *more: str) -> list[str]:
    flags = (("tars", pattern), ("out", str(out)), ("backbone", "test_vit"), ("weights", options["weights"]))
    given = [part for name, value in flags for part in (f"--{name}", value)]
    return ["threetowers", "cache", "build", *given, "--image-size", "64", "--batch-size", "5", "--threads", "1", *more]


def test_a_bucket_holds_what_a_folder_would(
    pattern: str, options: dict[str, Any], undisturbed: Path, bucket: str
) -> None:
    tars, out = open_storage(f"{bucket}/tars"), f"{bucket}/caches/a"
    for path in sorted(Path(pattern).parent.glob("*.tar")):
        tars.put(path.name, path.read_bytes(), owner="t")
    urls = [f"{bucket}/tars/{{00..05}}.tar", f"{bucket}/tars/0[6-9].tar", f"{bucket}/tars/1*.tar"]
    assert build(urls, out, **options).tars_built == N_TARS
    storage = open_storage(out)
    storage.delete("done/3.json")
    storage.put("store.zarr/emb/c/5/0", b"torn", owner="t")
    again = build(urls, out, **options)
    assert (again.tars_built, again.tars_kept) == (2, N_TARS - 2)
    ours, theirs = EmbeddingCache.open(out), EmbeddingCache.open(undisturbed)
    for entry in theirs.tars:
        np.testing.assert_array_equal(ours.tar(entry.id), theirs.tar(entry.id))
        assert ours.record(entry.id).files == theirs.record(entry.id).files
    assert not storage.listdir("claims")
    report = verify(out, urls)
    assert report.ok, report.text()


def test_two_caches_are_built_from_one_decode(
    pattern: str, options: dict[str, Any], undisturbed: Path, weights: Weights, tmp_path: Path, monkeypatch: Any
) -> None:
    from threetowers.cache.builder import pipeline

    decoded = []
    real = pipeline.decode_rgb
    monkeypatch.setattr(pipeline, "decode_rgb", lambda data, **how: decoded.append(1) or real(data, **how))
    resnet = {"backbone": "test_resnet", "weights": weights("test_resnet"), "image_size": 48}
    specs = [
        CacheSpec(tmp_path / "vit", "test_vit", options["weights"], 64, Terms(slot=6)),
        CacheSpec(tmp_path / "resnet", **resnet, terms=Terms(views=Views("center+flip"), slot=6)),
    ]
    half = [str(path) for path in sorted(Path(pattern).parent.glob("*.tar"))[::2]]
    first = build_all(half, specs[:1], batch_size=5, threads=1)
    assert [report.tars_built for report in first] == [N_TARS // 2]
    decoded.clear()
    both = build_all(half, specs, batch_size=5, threads=1)  # the second backbone is added later
    assert [(report.tars_built, report.tars_kept) for report in both] == [(0, N_TARS // 2), (N_TARS // 2, 0)]
    assert len(decoded) == len(EmbeddingCache.open(tmp_path / "vit"))
    all_tars = sorted(half + [str(path) for path in sorted(Path(pattern).parent.glob("*.tar"))[1::2]])
    decoded.clear()
    appended = build_all(all_tars, specs, batch_size=5, threads=1)  # and so are tars
    assert [report.tars_built for report in appended] == [N_TARS // 2] * 2
    vit, alone = EmbeddingCache.open(tmp_path / "vit"), EmbeddingCache.open(undisturbed)
    assert len(decoded) + sum(entry.n_samples for entry in vit.tars[: N_TARS // 2]) == len(alone)
    numbers = {entry.fingerprint: entry.id for entry in vit.tars}
    for entry in alone.tars:
        np.testing.assert_array_equal(vit.tar(numbers[entry.fingerprint]), alone.tar(entry.id))
    build(half, tmp_path / "one", **resnet, slot=6, views=Views("center+flip"), batch_size=5, threads=1)
    one, two = EmbeddingCache.open(tmp_path / "one"), EmbeddingCache.open(tmp_path / "resnet")
    for entry in one.tars:
        for view in range(2):
            np.testing.assert_array_equal(one.tar(entry.id, view=view), two.tar(entry.id, view=view))
    assert verify(tmp_path / "vit", all_tars).ok
    assert verify(tmp_path / "resnet", all_tars).ok


def test_places_must_differ(pattern: str, options: dict[str, Any], tmp_path: Path) -> None:
    specs = [CacheSpec(tmp_path / "a", "test_vit", options["weights"])] * 2
    for some in (specs, []):
        with pytest.raises(ValueError, match="expected different places"):
            build_all([pattern], some)


@pytest.mark.distributed
def test_a_late_worker_of_a_rank_that_is_there_helps(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    env = {"RANK": "0", "WORLD_SIZE": "3"}  # ranks 1 and 2 never come
    workers = [start(*command(pattern, out, options), env=env) for _ in range(2)]
    ends = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ends
    built = [int(output.split(": ")[2].split(" tars built")[0]) for output, _ in ends]
    assert sum(built) == N_TARS
    same(out, undisturbed)


@pytest.mark.distributed
def test_sigterm_drops_the_tar_and_exits_as_launchers_expect(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    worker = start(*command(pattern, out, options))
    while not (out / "done").is_dir() and worker.poll() is None:
        time.sleep(0.005)
    worker.send_signal(signal.SIGTERM)
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 143, errors
    assert "Traceback" not in errors
    assert not open_storage(out).listdir("claims")
    assert len(list((out / "done").iterdir())) < N_TARS
    build([pattern], out, **options)
    same(out, undisturbed)


@pytest.mark.distributed
def test_a_frozen_worker_loses_its_tar_and_leaves_it_alone_when_it_wakes(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    frozen = start(*command(pattern, out, options, "--stale-seconds", "2"))
    try:
        while len(list(out.glob("done/*.json"))) < 2 or not list(out.glob("claims/*.json")):
            time.sleep(0.002)
            assert frozen.poll() is None, frozen.communicate()
        frozen.send_signal(signal.SIGSTOP)
        report = build([pattern], out, **options, stale_seconds=2)
        assert report.tars_built + report.tars_kept >= N_TARS - 1
        same_rows = [path.read_bytes() for path in sorted(out.glob("store.zarr/emb/c/*/0"))]
    finally:
        frozen.send_signal(signal.SIGCONT)
        _, errors = frozen.communicate(timeout=60)
    assert frozen.returncode == 0, errors
    assert same_rows == [path.read_bytes() for path in sorted(out.glob("store.zarr/emb/c/*/0"))]
    same(out, undisturbed)


@pytest.mark.distributed
@pytest.mark.parametrize("kills", [50, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(
    kills: int, pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    script = start("tests.cache.forked_workers", pattern, str(tmp_path), options["weights"], str(kills), "1")
    output, errors = script.communicate(timeout=280)
    assert script.returncode == 0, errors
    assert f"killed {kills} builds" in output
    for out in tmp_path.iterdir():
        build([pattern], out, **options)
        same(out, undisturbed)


def test_a_store_turned_read_only_is_one_message(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    build([pattern], out, **options)
    (out / "done" / "4.json").unlink()
    code = f"""
import os
from pathlib import Path
from threetowers.cache.builder.build import build
from threetowers.cache.storage.storage import WriteError
from threetowers.cache.read.embedding_cache import EmbeddingCache
try:
    build({pattern!r}.split(), Path({str(out)!r}), **{options!r})
except WriteError as error:
    print("refused:", error)
print("still read:", EmbeddingCache.open({str(out)!r}).tar(0).shape)
"""
    writable = [path for path in (out, *out.rglob("*")) if path.is_dir()]
    for path in writable:
        path.chmod(0o555)
    root = os.geteuid() == 0  # whom permissions do not bind
    try:
        unshare = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            'mount --bind -o ro "$1" "$1" && exec "$2" -c "$3"',
            "sh",
            str(out),
        ]
        reader = [sys.executable, "-c", code] if not root else [*unshare, sys.executable, code]
        result = subprocess.run(reader, capture_output=True, text=True, check=False, timeout=100)
    finally:
        for path in writable:
            path.chmod(0o755)
    if "mount" in result.stderr or "unshare" in result.stderr:
        pytest.skip(f"root without the right to mount: {result.stderr.strip()}")
    assert "refused: cannot write" in result.stdout, result.stderr
    assert "Make room or choose another folder" in result.stdout
    assert "still read: (3, 64)" in result.stdout
    build([pattern], out, **options)
    same(out, undisturbed)


def test_claims_keep_workers_apart(tmp_path: Path) -> None:
    storage, now = LocalStorage(tmp_path), time.time()
    a, b = Worker("a", 1, "a"), Worker("b", 1, "b")
    one, two = Claims(storage, a, 100, now=lambda: now), Claims(storage, b, 100, now=lambda: now + 5000)
    assert one.take(7)
    assert not two.take(7), "clocks of workers may differ, that of the place counts"
    assert one.holds(7)
    old = time.time() - 101
    os.utime(tmp_path / "claims/7.json", (old, old))
    one.refresh()
    assert not two.take(7)
    os.utime(tmp_path / "claims/7.json", (old, old))
    assert two.take(7)
    one.refresh()
    assert not one.has(7)
    assert not one.holds(7)
    one.release(7)
    assert two.holds(7), "nobody gives up the claim of another"
    two.release_all()
    assert storage.listdir("claims") == []
    with pytest.raises(WriteError):
        Claims(LocalStorage(tmp_path / "claims.txt" / "x"), a).take(1) if (
            tmp_path / "claims.txt"
        ).touch() is None else 0


def test_a_claim_of_a_process_that_ended_is_free_at_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert Claims(storage, Worker(pid=child.pid)).take(1)
    assert Claims(storage, Worker(host="elsewhere", pid=child.pid)).take(2)
    mine = Claims(storage, Worker())
    assert mine.take(1)
    assert not mine.take(2)

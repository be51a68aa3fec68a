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

from tests.cache.caches import without_times
from threetowers.cache.builder.build import build_cache, build_caches
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.builder.leases import Leases
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.lease import LeaseOwner
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import WriteError, open_storage
from threetowers.cache.verify.verify import verify

TinyEncoder = Callable[..., str]
N_TARS = 12
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory, pack: Callable[..., Path], samples: Callable[..., Any]) -> str:
    root = tmp_path_factory.mktemp("packed")
    for i in range(N_TARS):
        pack(root / f"{i:02}.tar", samples(3 + i % 4, i))
    return str(root / "*.tar")


@pytest.fixture(scope="module")
def options(tiny_encoder: TinyEncoder) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64"), "batch_size": 5, "threads": 1}


@pytest.fixture(scope="module")
def undisturbed(pattern: str, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
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
        assert without_times(ours.record(entry.id)) == without_times(theirs.record(entry.id))


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
    flags = (("tars", pattern), ("output-dir", str(out)), ("encoder", options["encoder"]))
    given = [part for name, value in flags for part in (f"--{name}", value)]
    return ["threetowers", "cache", "build", *given, "--batch-size", "5", "--threads", "1", *more]


def test_a_cache_in_a_bucket_equals_one_in_a_folder(
    pattern: str, options: dict[str, Any], undisturbed: Path, bucket: str
) -> None:
    tars, out = open_storage(f"{bucket}/tars"), f"{bucket}/caches/a"
    for path in sorted(Path(pattern).parent.glob("*.tar")):
        tars.put(path.name, path.read_bytes(), owner="t")
    urls = [f"{bucket}/tars/{{00..05}}.tar", f"{bucket}/tars/0[6-9].tar", f"{bucket}/tars/1*.tar"]
    assert build_cache(BuildConfig(tars=urls, output_dir=out, **options)).tars_built == N_TARS
    storage = open_storage(out)
    storage.delete("done/3.json")
    storage.put("store.zarr/emb/c/5/0", b"torn", owner="t")
    again = build_cache(BuildConfig(tars=urls, output_dir=out, **options))
    assert (again.tars_built, again.tars_kept) == (2, N_TARS - 2)
    ours, theirs = EmbeddingCache.open(out), EmbeddingCache.open(undisturbed)
    for entry in theirs.tars:
        np.testing.assert_array_equal(ours.tar(entry.id), theirs.tar(entry.id))
        assert ours.record(entry.id).files == theirs.record(entry.id).files
    assert not storage.listdir("leases")
    report = verify(out, urls)
    assert report.ok, report.text()


def test_two_caches_are_built_from_one_decode(
    pattern: str,
    options: dict[str, Any],
    undisturbed: Path,
    tiny_encoder: TinyEncoder,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    from threetowers.cache.builder import decoding

    decoded = []
    real = decoding.decode_rgb
    monkeypatch.setattr(decoding, "decode_rgb", lambda data, **how: decoded.append(1) or real(data, **how))
    resnet = {"encoder": tiny_encoder("test_resnet@48")}
    shared = {"views": Views("center+flip"), "samples_per_tar": 6, "batch_size": 5, "threads": 1}
    teachers = {
        "output_dir": [tmp_path / "vit", tmp_path / "resnet"],
        "encoder": [options["encoder"], resnet["encoder"]],
    }
    only_vit = {name: values[0] for name, values in teachers.items()}
    half = [str(path) for path in sorted(Path(pattern).parent.glob("*.tar"))[::2]]
    first = build_caches(BuildConfig(tars=half, **only_vit, **shared))
    assert [report.tars_built for report in first] == [N_TARS // 2]
    decoded.clear()
    both = build_caches(BuildConfig(tars=half, **teachers, **shared))  # the second encoder is added later
    assert [(report.tars_built, report.tars_kept) for report in both] == [(0, N_TARS // 2), (N_TARS // 2, 0)]
    assert len(decoded) == len(EmbeddingCache.open(tmp_path / "vit"))
    all_tars = sorted(half + [str(path) for path in sorted(Path(pattern).parent.glob("*.tar"))[1::2]])
    decoded.clear()
    appended = build_caches(BuildConfig(tars=all_tars, **teachers, **shared))  # and so are tars
    assert [report.tars_built for report in appended] == [N_TARS // 2] * 2
    vit, alone = EmbeddingCache.open(tmp_path / "vit"), EmbeddingCache.open(undisturbed)
    assert len(decoded) + sum(entry.n_samples for entry in vit.tars[: N_TARS // 2]) == len(alone)
    numbers = {entry.fingerprint: entry.id for entry in vit.tars}
    for entry in alone.tars:
        np.testing.assert_array_equal(vit.tar(numbers[entry.fingerprint]), alone.tar(entry.id))
    build_cache(BuildConfig(tars=half, output_dir=tmp_path / "one", **resnet, **shared))
    one, two = EmbeddingCache.open(tmp_path / "one"), EmbeddingCache.open(tmp_path / "resnet")
    for entry in one.tars:
        for view in range(2):
            np.testing.assert_array_equal(one.tar(entry.id, view=view), two.tar(entry.id, view=view))
    assert verify(tmp_path / "vit", all_tars).ok
    assert verify(tmp_path / "resnet", all_tars).ok


@pytest.mark.parametrize(
    ("outputs", "encoders", "message"),
    [
        (["a", "a"], ["timm:test_vit"] * 2, "expected different folders"),
        (["a"], ["timm:test_vit", "timm:test_resnet"], "1 --output-dir for 2 caches .* expected one output for each"),
        ([], [], "0 --encoder, 1 --of, 1 --feature: expected one of each"),
    ],
)
def test_outputs_and_encoders_that_do_not_match_are_refused(
    outputs: list[str], encoders: list[str], message: str, pattern: str, tmp_path: Path
) -> None:
    folders = [tmp_path / output for output in outputs]
    with pytest.raises(ValueError, match=message):
        build_caches(BuildConfig(tars=[pattern], output_dir=folders, encoder=encoders))


@pytest.mark.distributed
def test_a_second_worker_of_the_same_rank_helps(
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
def test_sigterm_abandons_the_tar_and_exits_with_143(
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
    assert not open_storage(out).listdir("leases")
    assert len(list((out / "done").iterdir())) < N_TARS
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    same(out, undisturbed)


@pytest.mark.distributed
def test_a_frozen_worker_loses_its_lease_and_abandons_the_tar(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    frozen = start(*command(pattern, out, options, "--lease-timeout", "2"))
    try:
        while len(list(out.glob("done/*.json"))) < 2 or not list(out.glob("leases/*.json")):
            time.sleep(0.002)
            assert frozen.poll() is None, frozen.communicate()
        frozen.send_signal(signal.SIGSTOP)
        report = build_cache(BuildConfig(tars=[pattern], output_dir=out, **options, lease_timeout=2))
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
    script = start("tests.cache.forked_workers", pattern, str(tmp_path), options["encoder"], str(kills), "1", "image")
    output, errors = script.communicate(timeout=280)
    assert script.returncode == 0, errors
    assert f"killed {kills} builds" in output
    for out in tmp_path.glob("*/image"):
        build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
        same(out, undisturbed)


def test_a_store_that_becomes_read_only_gives_one_message(
    pattern: str, options: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    (out / "done" / "4.json").unlink()
    code = f"""
import os
from pathlib import Path
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.storage.storage import WriteError
from threetowers.cache.read.embedding_cache import EmbeddingCache
try:
    build_cache(BuildConfig(tars={pattern!r}.split(), output_dir=Path({str(out)!r}), **{options!r}))
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
    build_cache(BuildConfig(tars=[pattern], output_dir=out, **options))
    same(out, undisturbed)


def test_leases_keep_workers_apart(tmp_path: Path) -> None:
    storage, now = LocalStorage(tmp_path), time.time()
    a, b = LeaseOwner("a", 1, "a"), LeaseOwner("b", 1, "b")
    one, two = Leases(storage, a, 100, now=lambda: now), Leases(storage, b, 100, now=lambda: now + 5000)
    assert one.acquire(7)
    assert not two.acquire(7), "clocks of workers may differ, that of the storage counts"
    assert one.confirm(7)
    old = time.time() - 101
    os.utime(tmp_path / "leases/7.json", (old, old))
    one.refresh()
    assert not two.acquire(7)
    os.utime(tmp_path / "leases/7.json", (old, old))
    assert two.acquire(7)
    one.refresh()
    assert not one.held(7)
    assert not one.confirm(7)
    one.release(7)
    assert two.confirm(7), "a worker never releases the lease of another one"
    two.release_all()
    assert storage.listdir("leases") == []
    with pytest.raises(WriteError):
        Leases(LocalStorage(tmp_path / "leases.txt" / "x"), a).acquire(1) if (
            tmp_path / "leases.txt"
        ).touch() is None else 0


def test_the_lease_of_a_process_that_ended_is_free_at_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert Leases(storage, LeaseOwner(pid=child.pid)).acquire(1)
    assert Leases(storage, LeaseOwner(host="elsewhere", pid=child.pid)).acquire(2)
    mine = Leases(storage, LeaseOwner())
    assert mine.acquire(1)
    assert not mine.acquire(2)

"""Every storage behaves alike: a folder, a file system in memory, and a real S3 server on loopback."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from threetowers.cache.storage import local
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.object_file import open_object
from threetowers.cache.storage.remote import RemoteStorage
from threetowers.cache.storage.storage import Storage, StorageError, WriteError, open_storage, split_address


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "folder":
        yield open_storage(tmp_path / "cache")
    elif request.param == "s3":
        yield open_storage(
            f"{request.getfixturevalue('bucket')}/{request.node.name}".replace("[", "-").replace("]", "")
        )
    else:
        yield open_storage(f"memory://{tmp_path.name}/cache")
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_objects_are_written_read_listed_and_deleted(storage: Storage) -> None:
    assert storage.listdir() == storage.walk() == []
    assert storage.size("a/x") is None
    assert storage.modified("a/x") is None
    with pytest.raises(FileNotFoundError, match="a/x"):
        storage.read("a/x")
    storage.put("a/x", b"old", owner="t")
    storage.put("a/x", b"0123456789", owner="t")
    storage.put("a/b/y", b"", owner="t")
    assert storage.read("a/x") == b"0123456789"
    assert storage.read("a/x", 3, 6) == b"345"
    assert storage.read("a/x", 7) == b"789"
    assert (storage.size("a/x"), storage.size("a/b/y"), storage.size("a")) == (10, 0, None)
    assert isinstance(storage.modified("a/x"), float)
    assert storage.listdir("a") == ["b/", "x"]
    assert set(storage.listdir()) - {"tmp/"} == {"a/"}
    assert storage.walk("a") == ["b/y", "x"]
    storage.delete("a/x")
    storage.delete("a/x")
    assert storage.listdir("a") == ["b/"]


def test_exclusive_creation_succeeds_once(storage: Storage) -> None:
    start, made = threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        if storage.create_exclusive("claims/1", str(number).encode(), owner="t"):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if str(storage).startswith("memory:"):  # this one looks, then writes
        assert 1 <= len(made) <= 8
    else:
        assert len(made) == 1
        assert storage.read("claims/1") == str(made[0]).encode()
    assert not storage.create_exclusive("claims/1", b"late", owner="t")


def test_changes_by_others_are_seen(storage: Storage) -> None:
    other = open_storage(str(storage))
    assert storage.listdir("d") == []
    other.put("d/1", b"1", owner="t")
    assert storage.listdir("d") == ["1"]
    assert storage.size("d/1") == 1
    other.put("d/1", b"22", owner="t")
    other.put("d/2", b"2", owner="t")
    assert (storage.size("d/1"), storage.listdir("d"), storage.walk("d")) == (2, ["1", "2"], ["1", "2"])
    other.delete("d/1")
    assert (storage.size("d/1"), storage.listdir("d")) == (None, ["2"])


def test_storage_is_pickled_by_its_address(storage: Storage) -> None:
    storage.put("x", b"1", owner="t")
    again = pickle.loads(pickle.dumps(storage))
    assert again.read("x") == b"1"
    assert str(again) == str(storage)


def _read_into(storage: Storage, queue: Any) -> None:
    queue.put(storage.read("x"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_storage_survives_a_fork(storage: Storage) -> None:
    storage.put("x", b"forked", owner="t")
    assert storage.read("x") == b"forked"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_into, args=(storage, queue))
    child.start()
    assert queue.get(timeout=30) == b"forked"
    child.join()


def test_objects_are_read_as_files(storage: Storage) -> None:
    data = os.urandom(100_000)
    storage.put("deep/file", data, owner="t")
    with open_object(storage.uri("deep/file")) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        file.seek(500)
        assert file.read(99_000) == data[500:99_500]
    with pytest.raises(FileNotFoundError):
        open_object(storage.uri("deep/none"))
    there, name = split_address(storage.uri("deep/file"))
    assert there.read(name, 5, 8) == data[5:8]


def test_impossible_addresses_are_one_message(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(WriteError, match=r"cannot write s3://no-such-bucket-here/x: .*Check the address"):
        open_storage("s3://no-such-bucket-here").put("x", b"", owner="t")
    with pytest.raises(ValueError, match="nonsense://x: Protocol not known"):
        open_storage("nonsense://x")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/file/x"):
        LocalStorage(tmp_path / "file").create_exclusive("x", b"", owner="t")


def test_an_unreachable_server_is_named_by_its_address(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(StorageError, match=r"cannot read s3://gone/x: .*Check the address, the credentials"):
            RemoteStorage("s3://gone").read("x")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("operation", ["put", "create_exclusive"])
def test_a_write_survives_others_that_remove_its_partial_file(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that finish a tar remove its partial files, among them those of a worker that is still at it."""
    storage, others = LocalStorage(tmp_path), LocalStorage(tmp_path)
    removals = iter(range(3))
    real = local.write_synced

    def write_and_lose(path: Path, data: bytes) -> None:
        real(path, data)
        if next(removals, None) is not None:
            others.remove_partial("3")

    monkeypatch.setattr(local, "write_synced", write_and_lose)
    getattr(storage, operation)("done/3.json", b"whole", owner="3.done")
    assert storage.read("done/3.json") == b"whole"
    assert next(removals, None) is None
    assert storage.listdir("tmp") == []


def test_exclusive_creation_on_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(tmp_path)
    assert storage.create_exclusive("leases/1.json", b"first", owner="t")
    assert not storage.create_exclusive("leases/1.json", b"second", owner="t")
    monkeypatch.setattr(Path, "exists", lambda self: False)  # both looked before either wrote
    assert not storage.create_exclusive("leases/1.json", b"second", owner="t")
    assert storage.read("leases/1.json") == b"first"
    assert storage.listdir("tmp") == []

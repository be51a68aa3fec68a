"""Every place behaves alike: a folder, a filesystem in memory, and a real S3 server on loopback."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from threetowers.cache.place import (
    LocalPlace,
    Place,
    PlaceError,
    RemotePlace,
    WriteError,
    open_object,
    place_of,
    split_address,
)


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "folder":
        yield place_of(tmp_path / "cache")
    elif request.param == "s3":
        yield place_of(f"{request.getfixturevalue('bucket')}/{request.node.name}".replace("[", "-").replace("]", ""))
    else:
        yield place_of(f"memory://{tmp_path.name}/cache")
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_objects_are_written_read_listed_and_deleted(place: Place) -> None:
    assert place.names() == place.walk() == []
    assert place.size("a/x") is None
    assert place.modified("a/x") is None
    with pytest.raises(FileNotFoundError, match="a/x"):
        place.read("a/x")
    place.put("a/x", b"old", owner="t")
    place.put("a/x", b"0123456789", owner="t")
    place.put("a/b/y", b"", owner="t")
    assert place.read("a/x") == b"0123456789"
    assert place.read("a/x", 3, 6) == b"345"
    assert place.read("a/x", 7) == b"789"
    assert (place.size("a/x"), place.size("a/b/y"), place.size("a")) == (10, 0, None)
    assert isinstance(place.modified("a/x"), float)
    assert place.names("a") == ["b/", "x"]
    assert set(place.names()) - {"tmp/"} == {"a/"}
    assert place.walk("a") == ["b/y", "x"]
    place.delete("a/x")
    place.delete("a/x")
    assert place.names("a") == ["b/"]


def test_of_several_that_create_an_object_one_does(place: Place) -> None:
    start, made = threading.Barrier(8), []

    def create(number: int) -> None:
        start.wait()
        if place.put_new("claims/1", str(number).encode(), owner="t"):
            made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if str(place).startswith("memory:"):  # this one looks, then writes
        assert 1 <= len(made) <= 8
    else:
        assert len(made) == 1
        assert place.read("claims/1") == str(made[0]).encode()
    assert not place.put_new("claims/1", b"late", owner="t")


def test_a_place_is_seen_as_others_changed_it(place: Place) -> None:
    other = place_of(str(place))
    assert place.names("d") == []
    other.put("d/1", b"1", owner="t")
    assert place.names("d") == ["1"]
    assert place.size("d/1") == 1
    other.put("d/1", b"22", owner="t")
    other.put("d/2", b"2", owner="t")
    assert (place.size("d/1"), place.names("d"), place.walk("d")) == (2, ["1", "2"], ["1", "2"])
    other.delete("d/1")
    assert (place.size("d/1"), place.names("d")) == (None, ["2"])


def test_a_place_is_pickled_by_its_address(place: Place) -> None:
    place.put("x", b"1", owner="t")
    again = pickle.loads(pickle.dumps(place))
    assert again.read("x") == b"1"
    assert again.url == place.url


def _read_into(place: Place, queue: Any) -> None:
    queue.put(place.read("x"))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_place_survives_a_fork(place: Place) -> None:
    place.put("x", b"forked", owner="t")
    assert place.read("x") == b"forked"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_into, args=(place, queue))
    child.start()
    assert queue.get(timeout=30) == b"forked"
    child.join()


def test_objects_are_read_as_files(place: Place) -> None:
    data = os.urandom(100_000)
    place.put("deep/file", data, owner="t")
    with open_object(place.at("deep/file")) as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        file.seek(500)
        assert file.read(99_000) == data[500:99_500]
    with pytest.raises(FileNotFoundError):
        open_object(place.at("deep/none"))
    there, name = split_address(place.at("deep/file"))
    assert there.read(name, 5, 8) == data[5:8]


def test_what_cannot_be_is_one_message(tmp_path: Path, bucket: str) -> None:
    with pytest.raises(WriteError, match=r"cannot write s3://no-such-bucket-here/x: .*Check the address"):
        place_of("s3://no-such-bucket-here").put("x", b"", owner="t")
    with pytest.raises(ValueError, match="nonsense://x: Protocol not known"):
        place_of("nonsense://x")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}/file/x"):
        LocalPlace(tmp_path / "file").put_new("x", b"", owner="t")


def test_without_a_server_the_address_is_named(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        with pytest.raises(PlaceError, match=r"cannot read s3://gone/x: .*Check the address, the credentials"):
            RemotePlace("s3://gone").read("x")
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()

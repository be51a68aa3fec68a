"""Local files are replaced completely or not at all."""

import os
from pathlib import Path

import pytest

from threetowers.cache.storage.atomic import finish_partial, write_atomic


def test_text_and_bytes_replace_a_file_and_leave_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    write_atomic(path, "né\n")
    assert path.read_bytes() == "né\n".encode()
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_partial_file_gets_its_name_once_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "x.partial"
    partial.write_bytes(b"rows")
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda source, target: (steps.append("replace"), replace(source, target))[1])
    finish_partial(partial, tmp_path / "x")
    assert steps == ["fsync", "replace"]
    assert os.listdir(tmp_path) == ["x"]


def test_several_may_write_the_same_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes while this one has written its partial file: the file is that of one of them."""
    path = tmp_path / "x.json"
    real = os.fsync
    ids = iter([1, 2])
    monkeypatch.setattr(os, "getpid", lambda: 1)

    def write_another(descriptor: int) -> None:
        real(descriptor)
        if next(ids, None) == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 2)
                write_atomic(path, "theirs, which is longer")
            assert path.read_text() == "theirs, which is longer"

    monkeypatch.setattr(os, "fsync", write_another)
    write_atomic(path, "ours")
    assert path.read_text() == "ours"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*/x.json'"):
        write_atomic(tmp_path / "x.json", "")

"""Every way to damage a cache of text is found, with the tar named, by `verify` and, where it can, by the reader."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cache.caches import CaptionsBySource, make_text_cache
from threetowers.cache.format.done_record import done_record_name
from threetowers.cache.format.layout import STORE, RowStatus
from threetowers.cache.format.manifest import ManifestError, to_json
from threetowers.cache.format.store import read_tar_rows, write_tar_rows
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify

ARRAYS = ("emb", "scale", "caption_hash", "caption_source", "key_hash", "status", "row_end")
EQUAL_IN_ALL_TARS = ("caption_source", "status", "row_end")


def captions_of(tar: int) -> list[CaptionsBySource]:
    """Eleven samples with 0 to 4 captions, so that the files of all tars have the same sizes."""
    return [{"txt": [f"{tar} {k} {i}" for i in range(k % 5)]} if k % 5 else {} for k in range(11)]


def make(folder: Path, dtype: str) -> Path:
    make_text_cache(folder, [captions_of(tar) for tar in range(3)], 6, dtype)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has every array: only int8 rows have scales."""
    return make(tmp_path_factory.mktemp("original"), "int8")


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_intact_cache_passes(dtype: str, tmp_path: Path) -> None:
    report = verify(make(tmp_path, dtype))
    assert report.ok, report.text()
    assert not report.warnings
    assert (report.tars_intact, report.samples, report.ok_samples, report.rows) == (3, 33, 24, 60)
    assert report.counts == {"no_caption": 9}
    assert "captions   60 with an embedding" in report.text()
    assert report.as_dict()["of"] == "text"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 4
    path.write_bytes(data)


def swap(path: Path) -> None:
    other = Path(str(path).replace("c/1", "c/2"))
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
    "flipped": flip,
    "swapped": swap,
}


CASES = [(name, damage) for name in ARRAYS for damage in DAMAGE if damage != "swapped" or name not in EQUAL_IN_ALL_TARS]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_is_found_and_named(name: str, damage: str, cache: Path) -> None:
    path = cache / STORE / name / ("c/1/0" if name == "emb" else "c/1")
    DAMAGE[damage](path)
    report = verify(cache)
    assert any("1.tar (1)" in problem.text for problem in report.problems), report.text()
    assert report.tars_intact == (1 if damage == "swapped" else 2)
    opened = EmbeddingCache.open(cache)
    with pytest.raises(ManifestError, match=r"1\.tar \(1\)"):
        opened.caption_rows(1, 1, "1/1")
    assert len(opened.caption_rows(0, 4, "0/4")) == 4


def put(name: str, at: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def change(rows: dict[str, np.ndarray]) -> None:
        rows[name][at] = value

    return change


def drop_last_row(rows: dict[str, np.ndarray]) -> None:
    rows["row_end"][-1] -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("status", 1, RowStatus.NO_CAPTION), "captions without status ok"),
        (put("status", 0, RowStatus.OK), "a sample with status ok without captions"),
        (put("status", 0, 0), "a sample without a status"),
        (put("key_hash", 3, 7), "two samples with the same key"),
        (put("row_end", 4, 1), "runs that are not those of the done record's rows"),
        (drop_last_row, "runs that are not those of the done record's rows"),
        (put("caption_source", 2, 3), "a caption of an unknown source"),
        (put("caption_hash", 2, 9), "two embeddings of one caption"),
    ],
)
def test_inconsistent_rows_are_found(change: Any, message: str, cache: Path) -> None:
    rewrite(cache, 1, lambda rows: (put("key_hash", 4, 7)(rows), put("caption_hash", 5, 9)(rows), change(rows)))
    report = verify(cache)
    assert any("1.tar (1)" in problem.text and message in problem.text for problem in report.problems), report.text()
    assert report.tars_intact == 2


@pytest.mark.parametrize(("dtype", "name"), [("float16", "emb"), ("int8", "scale")])
def test_a_nonfinite_row_is_found(dtype: str, name: str, tmp_path: Path) -> None:
    cache = make(tmp_path, dtype)
    rewrite(cache, 1, put(name, 3, np.nan))
    assert any("a nonfinite row with status ok" in problem.text for problem in verify(cache).problems)


def rewrite(cache: Path, tar_id: int, change: Callable[[Any], object]) -> None:
    """Store other rows, with a record whose digests fit them: what a faulty writer would leave."""
    opened = EmbeddingCache.open(cache)
    storage, manifest, record = open_storage(cache), opened.manifest, opened.record(tar_id)
    stored = read_tar_rows(storage, manifest, opened.tars[tar_id], record)
    rows = {}
    for name, values in stored.items():
        on_samples = name in ("key_hash", "status", "row_end")
        rows[name] = values[: record.n_samples if on_samples else record.n_rows].copy()
    change(rows)
    files, sums = write_tar_rows(storage, manifest, tar_id, rows)
    (cache / done_record_name(tar_id)).write_bytes(to_json(dataclasses.replace(record, files=files, chunk_crc32c=sums)))


def test_fix_removes_what_is_bad(cache: Path) -> None:
    flip(cache / STORE / "caption_hash/c/2")
    report = verify(cache, fix=True)
    assert report.fixed == [2]
    assert not [path for path in (cache / STORE).rglob("*") if path.is_file() and "/c/2" in str(path)]
    assert not (cache / "done/2.json").exists()
    assert [problem.text for problem in verify(cache).problems] == [
        f"tar 2.tar (2): incomplete, {cache}/done/2.json is missing: run `threetowers cache build` again"
    ]

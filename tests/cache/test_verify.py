"""Every way to damage a cache is found, with the tar named, by `verify` and, where it can, by the reader."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from threetowers.cache import cli as command
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.done_record import FileSum, done_record_name
from threetowers.cache.format.manifest import ManifestError, to_json
from threetowers.cache.format.store import write_tar_rows
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify

Pack = Callable[..., Path]
MakeSamples = Callable[[int, int], list[tuple[str, dict[str, bytes]]]]
EMB, HASH, STATUS = "store.zarr/emb/c/1/0", "store.zarr/key_hash/c/1", "store.zarr/status/c/1"


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, pack: Pack, samples: MakeSamples) -> list[Path]:
    """Three tars of the same number of samples, so that their files have the same sizes."""
    root = tmp_path_factory.mktemp("twins")
    return [pack(root / f"{i}.tar", samples(19, i)) for i in range(3)]


@pytest.fixture(scope="module")
def original(twins: list[Path], tiny_encoder: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("original") / "cache"
    build_cache(BuildConfig(tars=twins, output_dir=out, encoder=tiny_encoder("test_vit@64")))
    return out


@pytest.fixture
def cache(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "cache")


def test_an_intact_cache_passes(cache: Path, twins: list[Path]) -> None:
    report = verify(cache, twins, check_contents=True)
    assert report.ok, report.text()
    assert not report.warnings
    assert (report.tars, report.tars_intact, report.tars_compared, report.samples, report.ok_samples) == (
        3,
        3,
        3,
        57,
        57,
    )
    assert report.statistics.duplicates()[0] == 0
    assert len(report.statistics.norms) == 57
    assert ": OK (depth values)" in report.text()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def swap(cache: Path, name: str) -> None:
    a, b = cache / name, cache / name.replace("c/1", "c/2")
    mine, other = a.read_bytes(), b.read_bytes()
    assert len(mine) == len(other)
    assert mine != other
    a.write_bytes(other)
    b.write_bytes(mine)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emb truncated": lambda c: (c / EMB).write_bytes((c / EMB).read_bytes()[:-1]),
    "emb emptied": lambda c: (c / EMB).write_bytes(b""),
    "emb zeroed": lambda c: zeroed(c / EMB),
    "emb deleted": lambda c: (c / EMB).unlink(),
    "emb flipped": lambda c: flip(c / EMB, 100),
    "emb index flipped": lambda c: flip(c / EMB, -6),
    "emb swapped": lambda c: swap(c, EMB),
    "hash truncated": lambda c: (c / HASH).write_bytes((c / HASH).read_bytes()[:-1]),
    "hash flipped": lambda c: flip(c / HASH, 9),
    "hash swapped": lambda c: swap(c, HASH),
    "status zeroed": lambda c: zeroed(c / STATUS),
    "status deleted": lambda c: (c / STATUS).unlink(),
    "record deleted": lambda c: (c / "done/1.json").unlink(),
    "record truncated": lambda c: (c / "done/1.json").write_text((c / "done/1.json").read_text()[:99]),
    "record swapped": lambda c: shutil.copy(c / "done/2.json", c / "done/1.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(name: str, cache: Path) -> None:
    DAMAGE[name](cache)
    report = verify(cache)
    assert not report.ok
    assert any("1.tar (1)" in problem.text or "done/1.json" in problem.text for problem in report.problems), (
        report.text()
    )
    assert report.tars_intact == (1 if "swapped" in name and "record" not in name else 2)
    with pytest.raises(ManifestError, match=r"1\.tar \(1\)|done/1\.json"):
        EmbeddingCache.open(cache).tar(1)


@pytest.mark.parametrize(
    ("name", "field", "value"), [("emb", "shape", [9, 9]), ("emb", "data_type", "float32"), ("status", "fill_value", 1)]
)
def test_changed_metadata_is_found(name: str, field: str, value: Any, cache: Path) -> None:
    path = cache / "store.zarr" / name / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert any(f"{name}/zarr.json" in problem.text or "damaged" in problem.text for problem in verify(cache).problems)
    path.unlink()
    assert any("missing or damaged" in problem.text for problem in verify(cache).problems)


def test_a_manifest_or_table_that_was_changed_is_refused(cache: Path) -> None:
    original = (cache / "tars/0.json").read_text()
    table = json.loads(original)
    swapped = table | {"entries": table["entries"][1::-1] + table["entries"][2:]}
    for text, message in (
        (json.dumps(swapped), "changed since it was written"),
        (json.dumps(table | {"root": "/elsewhere"}), "changed since it was written"),
        ("{}", "damaged, or of another version"),
    ):
        (cache / "tars/0.json").write_text(text)
        with pytest.raises(ManifestError, match=message):
            EmbeddingCache.open(cache)
    (cache / "tars/0.json").write_text(original)
    manifest = json.loads((cache / "manifest.json").read_text())
    old = {name: manifest[name] for name in manifest if name != "views"} | {"tars_digest": "", "format": 1}
    (cache / "manifest.json").write_text(json.dumps(old))
    with pytest.raises(ManifestError, match="format 1, this version reads format 4: remove it and run"):
        EmbeddingCache.open(cache)
    (cache / "manifest.json").write_text(json.dumps(manifest | {"dim": 65}))
    with pytest.raises(ManifestError, match=r"done/0\.json belongs to another tar or cache: manifest"):
        EmbeddingCache.open(cache).tar(0)


def rewrite(cache: Path, tar_id: int, change: Callable[[Any, Any, Any], None]) -> None:
    """Store other rows, with a record whose digests fit them: what a faulty writer would leave."""
    opened = EmbeddingCache.open(cache)
    group = zarr.open_group(cache / "store.zarr", mode="r")
    slot, n = opened.manifest.rows_per_tar, opened.tars[tar_id].n_samples
    rows = {name: np.array(array[tar_id * slot : tar_id * slot + n]) for name, array in group.arrays()}
    change(rows["emb"], rows["key_hash"], rows["status"])
    files, sums = write_tar_rows(open_storage(cache), opened.manifest, tar_id, rows)
    record = dataclasses.replace(opened.record(tar_id), files=files, chunk_crc32c=sums)
    (cache / done_record_name(tar_id)).write_bytes(to_json(record))


def put(array: Any, at: Any, value: Any) -> None:
    array[at] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda emb, keys, status: put(emb, 3, np.nan), "nonfinite row with status ok"),
        (lambda emb, keys, status: put(status, 3, 2), "an embedding in a row without status ok"),
        (lambda emb, keys, status: put(status, 3, 0), "a sample without a status"),
        (lambda emb, keys, status: put(status, 3, 99), "a sample without a status"),
        (lambda emb, keys, status: put(keys, 3, keys[4]), "two samples with the same key"),
    ],
)
def test_inconsistent_rows_are_found(change: Any, message: str, cache: Path) -> None:
    rewrite(cache, 1, change)
    report = verify(cache)
    assert any("1.tar (1)" in problem.text and message in problem.text for problem in report.problems), report.text()
    assert report.tars_intact == 2


def test_anomalous_rows_are_warned_of(cache: Path, twins: list[Path]) -> None:
    rewrite(cache, 0, lambda emb, keys, status: put(emb, slice(2, 5), 0))
    rewrite(cache, 1, lambda emb, keys, status: put(emb, 7, 1.5))
    rewrite(cache, 2, lambda emb, keys, status: put(emb, slice(None), emb[0]))
    report = verify(cache)
    assert report.ok
    assert report.statistics.duplicates()[0] == 2 + 18
    for expected in (
        "zero rows with status ok: 3 (0.tar (0): ordinal 2, 0.tar (0): ordinal 3, 0.tar (0): ordinal 4)",
        "constant rows with status ok: 1 (1.tar (1): ordinal 7)",
        "rows are all equal although their images differ: does the teacher work?: 1 (2.tar (2))",
        "rows equal the row of another image: 20 (tar 0 row",
    ):
        assert any(expected in warning for warning in report.warnings), report.text()
    assert "zero rows with status ok: 3 (0.tar (0): 'part/0000002' ordinal 2" in verify(cache, twins).text()


def test_tars_that_are_not_the_cached_ones_are_found(
    cache: Path, twins: list[Path], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    repacked = pack(tmp_path / "1.tar", samples(19, 1)[::-1])
    report = verify(cache, [twins[0], repacked])
    assert any("repacked or downloaded again" in problem.text for problem in report.problems)
    assert report.tars_compared == 1
    assert any("2 tars of the cache are not among --tars" in warning for warning in report.warnings)
    rewrite(cache, 0, lambda emb, keys, status: put(keys, [4, 5], keys[[5, 4]]))
    assert any(
        "0.tar (0): ordinal 4: the row is not of key 'part/0000004'" in p.text for p in verify(cache, twins).problems
    )
    patched = bytearray(twins[2].read_bytes())
    at = patched.rindex(b"IEND")
    patched[at - 20] ^= 1
    (tmp_path / "2.tar").write_bytes(patched)
    assert verify(cache, [tmp_path / "2.tar"]).tars_compared == 1
    report = verify(cache, [tmp_path / "2.tar"], check_contents=True)
    assert any("1 images are not those that were embedded: part/0200018" in problem.text for problem in report.problems)
    caption = twins[2].read_bytes().replace(b"picture 3", b"picture X")
    (tmp_path / "2.tar").write_bytes(caption)
    report = verify(cache, [tmp_path / "2.tar"], check_contents=True)
    assert any("its bytes have changed, its images are those that were embedded" in line for line in report.warnings)
    with pytest.raises(ValueError, match="name them"):
        verify(cache, check_contents=True)


@pytest.fixture(scope="module")
def file(weights: Callable[..., str]) -> str:
    return weights("test_vit")


def test_recomputed_rows_equal_stored_ones(
    cache: Path, twins: list[Path], file: str, weights: Callable[..., str]
) -> None:
    report = verify(cache, twins, depth="recompute", sample=20, weights=file)
    assert report.ok, report.text()
    assert report.recomputed is not None
    assert report.recomputed.rows == 20
    assert report.recomputed.min is not None
    assert report.recomputed.min > 0.99999
    rewrite(cache, 1, lambda emb, keys, status: put(emb, slice(None), emb[::-1].copy()))
    assert verify(cache, twins).ok, "rows in another order are intact, only recomputing them finds it"
    report = verify(cache, twins, depth="recompute", sample=20, weights=file, min_cosine=0.9999)
    assert report.problems
    assert all("1.tar (1): 'part/01" in p.text and "cosine with the recomputed row" in p.text for p in report.problems)
    assert {problem.tar_id for problem in report.problems} == {1}
    for how, message in (
        ({"weights": file, "tars": None}, "name them"),
        ({}, "came from 'test_vit-0-1.safetensors': give its path"),
        ({"weights": weights("test_vit", 1)}, "not the one of the cache: weights_digest: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(cache, **({"tars": twins, "depth": "recompute"} | how))


def test_fix_removes_what_is_bad_and_a_build_makes_it_again(
    cache: Path, original: Path, twins: list[Path], file: str, tmp_path: Path
) -> None:
    DAMAGE["emb flipped"](cache)
    (cache / "store.zarr/status/zarr.json").unlink()
    assert command.verify(str(cache), fix=True, json=tmp_path / "report.json") == 1
    told = json.loads((tmp_path / "report.json").read_text())
    assert (told["ok"], told["fixed"], told["tars"]["intact"]) == (False, [1], 2)
    assert [problem["tar_id"] for problem in told["problems"]] == [None, 1]
    assert not (cache / "done/1.json").exists()
    assert not (cache / EMB).exists()
    assert build_cache(BuildConfig(tars=twins, output_dir=cache, encoder=f"timm:test_vit@64:{file}")).tars_built == 1
    assert verify(cache, twins).ok
    assert all((cache / name).read_bytes() == (original / name).read_bytes() for name in (EMB, HASH, STATUS))


def test_unexpected_files_are_mentioned(cache: Path) -> None:
    (cache / "store.zarr/emb/c/7").mkdir()
    (cache / "store.zarr/emb/c/7/0").touch()
    (cache / "tmp/1.emb.0.host.9").touch()
    report = verify(cache)
    assert report.ok
    assert len(report.warnings) == 2
    assert "store.zarr/emb/c/7/0" in report.text()


def test_file_digests_tell_intact_shards_apart(cache: Path) -> None:
    sums = [FileSum.of((cache / STATUS.replace("c/1", f"c/{i}")).read_bytes()) for i in range(3)]
    assert sums[0] == sums[1]
    hashes = {FileSum.of((cache / HASH.replace("c/1", f"c/{i}")).read_bytes()).xxh3_128 for i in range(3)}
    assert len(hashes) == 3


def test_commands_print_and_give_exit_codes(
    cache: Path,
    twins: list[Path],
    tiny_encoder: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    pack: Pack,
    tmp_path: Path,
) -> None:
    assert command.info(str(cache)) == 0
    assert "tars      3 of 3 built" in capsys.readouterr().out
    assert command.verify(str(cache), list(map(str, twins))) == 0
    (cache / "done/1.json").unlink()
    assert command.info(str(cache)) == 1
    assert "not built: tar 1.tar (1): incomplete" in capsys.readouterr().out
    assert command.verify(str(cache)) == 1
    assert "DAMAGED" in capsys.readouterr().out
    bad = pack(tmp_path / "bad.tar", [("a", {"png": b"?"}), ("b", {"png": b"!"})])
    options = {"encoder": tiny_encoder("test_vit@64")}
    assert command.build(BuildConfig(tars=[str(bad)], output_dir=tmp_path / "bad", **options)) == 0
    printed = capsys.readouterr().out
    assert "2 samples: 0 embedded, 2 undecodable" in printed
    assert "bad.tar: a (ordinal 0): cannot be decoded (1 bytes)" in printed


def test_a_remote_cache_and_remote_tars_are_verified(cache: Path, twins: list[Path], file: str) -> None:
    here, there = open_storage(cache), open_storage(f"memory://{cache.parent.name}")
    for name in here.walk():
        there.put(f"cache/{name}", here.read(name), owner="t")
    for path in twins:
        there.put(path.name, path.read_bytes(), owner="t")
    where, tars = f"{there}/cache", [f"{there}/{path.name}" for path in twins]
    report = verify(where, tars, depth="recompute", check_contents=True, sample=5, weights=file)
    assert report.ok, report.text()
    assert report.tars_compared == 3
    there.put(f"cache/{EMB}", bytes(len(here.read(EMB))), owner="t")
    assert verify(where, fix=True).fixed == [1]
    assert there.size("cache/done/1.json") is None
    assert "1.tar (1): incomplete" in verify(where).text()
    assert verify(where, fix=True).fixed == [], "incomplete tars are left to their build"


def test_a_damaged_crop_or_scale_is_found(twins: list[Path], file: str, tmp_path: Path) -> None:
    views = Views("crops:2", 1, 0.5)
    build_cache(
        BuildConfig(tars=twins, output_dir=tmp_path, encoder=f"timm:test_vit@64:{file}", views=views, dtype="int8")
    )
    assert verify(tmp_path, twins).ok
    for name in ("view_params_1/c/1/0", "scale/c/1", "scale_1/c/1", "emb_1/c/1/0", "image_hash/c/1"):
        path = tmp_path / "store.zarr" / name
        original = path.read_bytes()
        flip(path, 5)
        assert any(
            f"1.tar (1): store.zarr/{name} is not the file" in problem.text for problem in verify(tmp_path).problems
        )
        path.write_bytes(original)
    opened = EmbeddingCache.open(tmp_path)
    group = zarr.open_group(tmp_path / "store.zarr", mode="r")
    slot = opened.manifest.rows_per_tar
    rows = {name: np.array(array[slot : slot + 19]) for name, array in group.arrays()}
    for name, at, value, message in (
        ("view_params_1", (3, 2), 1.5, "a crop that is not inside its image"),
        ("scale_1", 3, np.nan, "a nonfinite row with status ok"),
    ):
        changed = {other: array.copy() for other, array in rows.items()}
        changed[name][at] = value
        files, sums = write_tar_rows(open_storage(tmp_path), opened.manifest, 1, changed)
        record = dataclasses.replace(opened.record(1), files=files, chunk_crc32c=sums)
        (tmp_path / done_record_name(1)).write_bytes(to_json(record))
        assert any(message in problem.text for problem in verify(tmp_path).problems)

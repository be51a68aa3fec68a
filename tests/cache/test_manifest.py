"""What a cache promises: fields that bind, a tar table that only grows, and terms that are kept to."""

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threetowers.cache.builder.build import build
from threetowers.cache.builder.row_buffer import PrecisionError
from threetowers.cache.format.dtypes import PRECISIONS
from threetowers.cache.format.layout import arrays, slot_and_chunk, slot_files, stored_bytes
from threetowers.cache.format.manifest import (
    Manifest,
    ManifestError,
    Preprocessing,
    mismatch,
    notes,
    read_manifest,
    teacher_mismatch,
    to_json,
)
from threetowers.cache.format.store import write_slot
from threetowers.cache.format.tar_table import Segment, TarEntry, TarTable, common_root, extend, read_table
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.tar_index import Sample, SampleList, TarIndex, index_tar

Pack = Callable[..., Path]
MakeSamples = Callable[[int, int], list[tuple[str, dict[str, bytes]]]]
TRANSFORM = Preprocessing((8, 8), "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)


def manifest_of(tier: str = "float16", views: Views | None = None, dim: int = 5, slot: int = 12) -> Manifest:
    return Manifest("b", "w", "d", TRANSFORM, dim, tier, slot, 4, {"torch": "1"}, views or Views())  # type: ignore[arg-type]


def tar(location: str, fingerprint: str, n: int = 3) -> TarIndex:
    """An index with so many samples, none of which is looked at."""
    return TarIndex(location, 512 * n, fingerprint, SampleList([Sample("k", {})] * n), 0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weights_digest": "e"}, "weights_digest: expected d, found e"),
        ({"views": Views("crops:3", 1, 0.5)}, "views.policy: expected center, found crops:3"),
        ({"dtype": "int8"}, "dtype: expected float16, found int8"),
        ({"compute": "bfloat16"}, "compute: expected float32, found bfloat16"),
        (
            {"preprocessing": dataclasses.replace(TRANSFORM, decode="pillow-draft")},
            "preprocessing.decode: expected pillow, found pillow-draft",
        ),
    ],
)
def test_what_binds(change: dict[str, Any], line: str) -> None:
    one = manifest_of()
    other = dataclasses.replace(one, **change)
    assert line in mismatch(one, other)
    assert one.digest != other.digest
    assert bool(teacher_mismatch(one, other)) == (next(iter(change)) in ("weights_digest", "preprocessing"))
    assert not mismatch(one, dataclasses.replace(one, versions={"torch": "2"}))
    assert notes(one, dataclasses.replace(one, versions={"torch": "2"})) == ["versions.torch: expected 1, found 2"]


def test_a_manifest_of_other_words_is_refused(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.put("manifest.json", to_json(manifest_of()), owner="t")
    assert read_manifest(storage) == manifest_of()
    manifest = json.loads(to_json(manifest_of()))
    for change in ({"views": {"policy": "spiral"}}, {"dtype": "int4"}, {"pickle": "x"}, {"dim": "many"}):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ManifestError, match="damaged, or of another version"):
            read_manifest(storage)


@settings(max_examples=60, deadline=None)
@given(
    tier=st.sampled_from(list(PRECISIONS)),
    policy=st.sampled_from(["center", "center+flip", "crops:3"]),
    dim=st.integers(1, 40),
    largest=st.integers(1, 60),
    data=st.data(),
)
def test_bytes_are_known_before_they_are_written(
    tier: str, policy: str, dim: int, largest: int, data: st.DataObject
) -> None:
    slot, chunk_rows = slot_and_chunk(PRECISIONS[tier].row_bytes(dim), largest)
    manifest = dataclasses.replace(manifest_of(tier, Views(policy), dim), slot=slot, chunk_rows=chunk_rows)
    n = data.draw(st.integers(1, largest))
    rows = {spec.name: np.zeros((n, *spec.row), spec.dtype) for spec in arrays(manifest).values()}
    storage = open_storage(f"memory://bytes-{data.draw(st.uuids())}")
    files, sums = write_slot(storage, manifest, 0, rows)
    assert sum(file.size for file in files.values()) == stored_bytes(manifest, n)
    assert set(files) == set(slot_files(manifest, 0))
    assert all(len(crcs) == -(-n // chunk_rows) for crcs in sums.values())
    assert len(sums) == manifest.views.count


def test_a_large_slot_costs_little_beside_its_rows() -> None:
    for dim in (768, 1024, 2048):
        slot, chunk_rows = slot_and_chunk(2 * dim, 10_000)
        manifest = dataclasses.replace(manifest_of(dim=dim), slot=slot, chunk_rows=chunk_rows)
        assert stored_bytes(manifest, 10_000) <= 1.03 * 10_000 * dim * 2


def test_a_table_only_grows(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    first = extend(storage, [tar("/d/x/a.tar", "A"), tar("/d/y/b.tar", "B")], slot=5)
    assert [(e.id, e.path) for e in first.entries] == [(0, "x/a.tar"), (1, "y/b.tar")]
    assert extend(storage, [tar("/d/y/b.tar", "B")], slot=5) == first
    assert not (tmp_path / "tars/1.json").exists()
    second = extend(storage, [tar("/d/y/b.tar", "B"), tar("s3://bucket/c.tar", "C"), tar("/d/x/d.tar", "D")], slot=5)
    assert second.entries[:2] == first.entries
    assert [(e.id, e.path) for e in second.entries[2:]] == [(2, "s3://bucket/c.tar"), (3, "/d/x/d.tar")]
    assert read_table(storage) == second
    assert [second.at(where).id for where in ("/d/x/a.tar", "s3://bucket/c.tar", "/d/x/d.tar")] == [0, 2, 3]  # type: ignore[union-attr]
    assert second.at("/d/x/z.tar") is None
    with pytest.raises(ManifestError, match=r"holds 6 samples, a slot of this cache 5 rows.*--slot"):
        extend(storage, [tar("/d/e.tar", "E", 6)], slot=5)
    with pytest.raises(ManifestError, match="copies of each other"):
        extend(storage, [tar("/d/e.tar", "E"), tar("/d/f.tar", "E")], slot=5)
    assert read_table(storage) == second


def test_a_tar_packed_again_is_refused_where_it_lies_and_where_it_was_moved_to(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    extend(storage, [tar("/d/x/0.tar", "A"), tar("/d/y/0.tar", "B")], slot=5)
    with pytest.raises(
        ManifestError, match=r"/d/y/0\.tar: packed or downloaded again.*expected fingerprint B, found Z"
    ):
        extend(storage, [tar("/d/y/0.tar", "Z")], slot=5)
    with pytest.raises(ManifestError, match=r"/new/y/0\.tar: packed or downloaded again"):
        extend(storage, [tar("/new/x/0.tar", "A"), tar("/new/y/0.tar", "Z")], slot=5)
    table = extend(storage, [tar("/other/x/0.tar", "Z")], slot=5)  # another data set that numbers its tars alike
    assert table.entries[2].fingerprint == "Z"
    assert table.namesakes(["/more/0.tar", "/d/x/0.tar", "/more/1.tar"]) == ["/more/0.tar"]


@pytest.mark.parametrize("damage", ["edited", "gap", "foreign", "order"])
def test_a_table_that_was_edited_or_copied_in_part_is_refused(damage: str, tmp_path: Path) -> None:
    storage, other = open_storage(tmp_path / "a"), open_storage(tmp_path / "b")
    for number in range(3):
        extend(storage, [tar(f"/d/{number}.tar", f"A{number}")], slot=5)
        extend(other, [tar(f"/e/{number}.tar", f"B{number}")], slot=5)
    folder = tmp_path / "a" / "tars"
    if damage == "edited":
        (folder / "1.json").write_text((folder / "1.json").read_text().replace("A1", "A9"))
    elif damage == "gap":
        (folder / "1.json").unlink()
    elif damage == "foreign":
        shutil.copy(tmp_path / "b" / "tars" / "1.json", folder / "1.json")
    else:
        one, two = (folder / "1.json").read_bytes(), (folder / "2.json").read_bytes()
        (folder / "1.json").write_bytes(two)
        (folder / "2.json").write_bytes(one)
    with pytest.raises(ManifestError, match=r"tars/1\.json(: changed since it was written| is missing)"):
        read_table(storage)


def add(folder: str, worker: int) -> None:
    for number in range(4):
        extend(open_storage(folder), [tar(f"/w{worker}/{number}.tar", f"{worker}-{number}")], slot=5)


@pytest.mark.distributed
def test_builds_that_add_tars_at_the_same_time_all_keep_theirs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add, args=(str(tmp_path), i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    table = read_table(open_storage(tmp_path))
    assert [entry.id for entry in table.entries] == list(range(16))
    assert {entry.fingerprint for entry in table.entries} == {f"{i}-{j}" for i in range(4) for j in range(4)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=4))
def test_a_root_holds_all(parts: list[list[str]]) -> None:
    locations = ["/" + "/".join(part) + ".tar" for part in parts]
    root = common_root(locations)
    assert all(location.startswith(root + "/") for location in locations)
    deeper = {location.removeprefix(root + "/").partition("/")[::2] for location in locations}
    assert len(deeper) == len({*locations})
    assert len({name for name, rest in deeper}) > 1 or any(not rest for _, rest in deeper)


def test_a_table_without_tars_or_with_a_digest_of_another(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="a cache without tars"):
        read_table(open_storage(tmp_path))
    assert read_table(open_storage(tmp_path), empty=True) == TarTable(())
    sealed = Segment("/d", "", (TarEntry(0, "a", 1, 1, "A"),)).sealed()
    assert sealed.sealed() == sealed
    assert dataclasses.replace(sealed, root="/e").sealed() != sealed


@pytest.fixture(scope="module")
def options(weights: Callable[..., str]) -> dict[str, Any]:
    return {"backbone": "test_vit", "weights": weights("test_vit"), "image_size": 64}


def test_tars_are_added_to_a_built_cache(
    tars: list[Path], options: dict[str, Any], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    build(tars[1:2], out, **options, slot=24)
    before = EmbeddingCache.open(out)
    row, manifest = before.tar(0), before.manifest
    report = build(tars, out, **options)
    assert (report.tars_built, report.tars_kept) == (2, 1)
    after = EmbeddingCache.open(out)
    assert after.manifest == manifest
    assert np.array_equal(after.tar(0), row)
    assert [after.tar_id(index_tar(path)) for path in tars] == [1, 0, 2]
    assert verify(out, tars).ok
    with pytest.raises(ManifestError, match=r"copy\.tar and .*1\.tar are copies of each other"):
        build([tars[1], shutil.copy(tars[1], tmp_path / "copy.tar")], out, **options)
    large = pack(tmp_path / "large.tar", samples(25, 8))
    with pytest.raises(ManifestError, match=r"large\.tar: holds 25 samples, a slot of this cache 24 rows"):
        build([large], out, **options)
    with pytest.raises(ManifestError, match="slot: expected 24, found 100"):
        build(tars, out, **options, slot=100)
    with pytest.raises(ManifestError, match=r"views\.policy: expected center, found center\+flip"):
        build(tars, out, **options, views=Views("center+flip"))


def test_a_tar_packed_again_in_its_place_stops_a_build(
    options: dict[str, Any], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    path = pack(tmp_path / "0.tar", samples(9, 0))
    build([path], tmp_path / "cache", **options)
    pack(path, samples(9, 0)[::-1])
    (tmp_path / "cache/done/0.json").unlink()
    with pytest.raises(ValueError, match=r"0\.tar: (packed or downloaded again|changed while)"):
        build([path], tmp_path / "cache", **options)
    assert not verify(tmp_path / "cache").ok


def test_a_tier_that_is_too_coarse_stops_a_build(tars: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        PrecisionError,
        match=r"sample 'part/.*stored as int8 its cosine with itself is 0\.9999\d+, expected at least 0\.99999\. Of "
        r"dtype, these would do for it: float16 \(1\.000000\), float32 \(1\.000000\), bfloat16 \(0\.99999\d\);",
    ):
        build(tars[1:2], tmp_path / "int8", **options, dtype="int8", min_cosine=0.99999)
    assert not (tmp_path / "int8" / "done").exists()


@pytest.mark.parametrize("tier", ["bfloat16", "int8"])
def test_output_that_is_not_finite_has_no_row_in_any_tier(
    tier: str, tars: list[Path], options: dict[str, Any], weights: Callable[..., str], tmp_path: Path
) -> None:
    nowhere = options | {"weights": weights("test_vit", scale=float("nan"))}
    assert build(tars[1:2], tmp_path / "nan", **nowhere, dtype=tier).counts == {"non_finite": 7}
    assert np.isnan(EmbeddingCache.open(tmp_path / "nan").tar(0)).all()
    assert verify(tmp_path / "nan", tars[1:2]).ok
    large = options | {"weights": weights("test_vit", scale=1e6)}  # overflows float16
    assert build(tars[1:2], tmp_path / "large", **large, dtype=tier).ok == 7
    assert verify(tmp_path / "large", tars[1:2], depth="meaning", weights=large["weights"]).ok

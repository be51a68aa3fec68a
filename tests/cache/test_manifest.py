"""The manifest and the tar table: which fields must agree, and a table that only grows."""

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

from tests.cache.caches import TRANSFORM, image_manifest, text_manifest
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.dtypes import STORAGE_DTYPES
from threetowers.cache.format.layout import arrays, stored_bytes, tar_files
from threetowers.cache.format.manifest import (
    CaptionSources,
    Manifest,
    ManifestError,
    incompatibilities,
    informative_differences,
    read_manifest,
    teacher_mismatch,
    to_json,
)
from threetowers.cache.format.row_buffer import RoundingError
from threetowers.cache.format.store import write_tar_rows
from threetowers.cache.format.tar_table import TableSegment, TarEntry, TarTable, common_root, extend, read_table
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.local import LocalStorage
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar

Pack = Callable[..., Path]
MakeSamples = Callable[[int, int], list[tuple[str, dict[str, bytes]]]]


def manifest_of() -> Manifest:
    return dataclasses.replace(image_manifest(5, 12), rows_per_tar=12, samples_per_tar=12, chunk_rows=4)


def tar(location: str, fingerprint: str, n: int = 3) -> TarIndex:
    """An index with so many samples, none of which is looked at."""
    return TarIndex(location, 512 * n, fingerprint, SampleList([("k", {})] * n), {})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"weights_digest": "e"}, "weights_digest: expected d, found e"),
        ({"views": Views("crops:3", 1, 0.5)}, "views.policy: expected center, found crops:3"),
        ({"dtype": "int8"}, "dtype: expected float16, found int8"),
        ({"precision": "bfloat16"}, "precision: expected float32, found bfloat16"),
        (
            {"preprocessing": dataclasses.replace(TRANSFORM, decode="pillow-draft")},
            "preprocessing.decode: expected pillow, found pillow-draft",
        ),
    ],
)
def test_which_fields_must_agree(change: dict[str, Any], line: str) -> None:
    one = manifest_of()
    other = dataclasses.replace(one, **change)
    assert line in incompatibilities(one, other)
    assert one.digest != other.digest
    assert bool(teacher_mismatch(one, other)) == (next(iter(change)) in ("weights_digest", "preprocessing"))
    assert not incompatibilities(one, dataclasses.replace(one, versions={"torch": "2"}))
    assert informative_differences(one, dataclasses.replace(one, versions={"torch": "2"})) == [
        "versions.torch: expected 1, found 2"
    ]


def test_a_manifest_says_how_its_side_was_embedded_and_no_more() -> None:
    image = image_manifest(5, 12)
    text = text_manifest(5, 12, 30)
    for manifest, change, found in (
        (image, {"text": text.text}, "'preprocessing', 'text'"),
        (text, {"captions": None}, "'text'"),
        (image, {"of": "text"}, "'preprocessing'"),
    ):
        with pytest.raises(ValueError, match=rf"or text and captions \(text\), found \[{found}\]"):
            dataclasses.replace(manifest, **change)


def test_the_sources_of_captions_are_numbered() -> None:
    assert CaptionSources().names == ("txt", "json.captions", "json.caption")
    assert not CaptionSources().caption_format.sources
    named = CaptionSources(("json.alt", "txt"), caption_per_line=True)
    assert named.names == tuple(named.caption_format.sources) == ("json.alt", "txt")
    assert named.caption_format.caption_per_line
    for sources in (("txt", "txt"), ("json",), tuple(f"json.{i}" for i in range(257))):
        with pytest.raises(ValueError, match="expected"):
            CaptionSources(sources)


def test_a_manifest_with_unknown_fields_or_values_is_refused(tmp_path: Path) -> None:
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
    tier=st.sampled_from(list(STORAGE_DTYPES)),
    policy=st.sampled_from(["center", "center+flip", "crops:3", "text"]),
    dim=st.integers(1, 40),
    largest=st.integers(1, 60),
    data=st.data(),
)
def test_bytes_are_known_before_they_are_written(
    tier: str, policy: str, dim: int, largest: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, largest))
    if policy == "text":
        captions = data.draw(st.integers(1, 8 * largest))
        manifest = text_manifest(dim, largest, captions, tier)
        n_rows = data.draw(st.integers(0, manifest.rows_per_tar))
    else:
        manifest = image_manifest(dim, largest, tier, Views(policy, *((1, 0.5) if policy == "crops:3" else ())))
        n_rows = n
    rows = {}
    for spec in arrays(manifest).values():
        rows[spec.name] = np.zeros((spec.length(n, n_rows), *spec.row), spec.dtype)
    storage = open_storage(f"memory://bytes-{data.draw(st.uuids())}")
    files, sums = write_tar_rows(storage, manifest, 0, rows)
    assert sum(file.size for file in files.values()) == stored_bytes(manifest, n, n_rows)
    assert set(files) == set(tar_files(manifest, 0))
    assert all(len(crcs) == -(-n_rows // manifest.chunk_rows) for crcs in sums.values())
    assert len(sums) == (3 + (tier == "int8") if policy == "text" else manifest.views.count)


def test_rows_of_large_tars_have_little_overhead() -> None:
    for dim in (768, 1024, 2048):
        manifest = image_manifest(dim, 10_000)
        assert stored_bytes(manifest, 10_000, 10_000) <= 1.03 * 10_000 * dim * 2


@pytest.mark.parametrize("dim", [384, 512, 768, 1024, 4096])
def test_runs_of_large_tars_have_little_overhead(dim: int) -> None:
    """10,000 samples of 1 to 8 captions, in tars of a tenth more or fewer captions than those that were counted."""
    manifest = text_manifest(dim, 10_000, 45_000)
    for captions in range(40_500, 49_500, 17):
        assert stored_bytes(manifest, 10_000, captions) <= 1.05 * captions * dim * 2
    one_each = text_manifest(dim, 10_000, 10_000)
    assert stored_bytes(one_each, 10_000, 9_985) <= 1.05 * 9_985 * dim * 2
    assert manifest.rows_per_tar >= 4 * 45_000


def test_a_table_only_grows(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    first = extend(storage, [tar("/d/x/a.tar", "A"), tar("/d/y/b.tar", "B")], samples_per_tar=5)
    assert [(e.id, e.path) for e in first.entries] == [(0, "x/a.tar"), (1, "y/b.tar")]
    assert extend(storage, [tar("/d/y/b.tar", "B")], samples_per_tar=5) == first
    assert not (tmp_path / "tars/1.json").exists()
    second = extend(
        storage, [tar("/d/y/b.tar", "B"), tar("s3://bucket/c.tar", "C"), tar("/d/x/d.tar", "D")], samples_per_tar=5
    )
    assert second.entries[:2] == first.entries
    assert [(e.id, e.path) for e in second.entries[2:]] == [(2, "s3://bucket/c.tar"), (3, "/d/x/d.tar")]
    assert read_table(storage) == second
    assert [second.at(where).id for where in ("/d/x/a.tar", "s3://bucket/c.tar", "/d/x/d.tar")] == [0, 2, 3]  # type: ignore[union-attr]
    assert second.at("/d/x/z.tar") is None
    with pytest.raises(ManifestError, match=r"6 samples, expected at most 5.*--samples-per-tar"):
        extend(storage, [tar("/d/e.tar", "E", 6)], samples_per_tar=5)
    with pytest.raises(ManifestError, match="copies of each other"):
        extend(storage, [tar("/d/e.tar", "E"), tar("/d/f.tar", "E")], samples_per_tar=5)
    assert read_table(storage) == second


def test_a_repacked_tar_is_refused_in_its_old_and_its_new_folder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    extend(storage, [tar("/d/x/0.tar", "A"), tar("/d/y/0.tar", "B")], samples_per_tar=5)
    with pytest.raises(
        ManifestError, match=r"/d/y/0\.tar: repacked or downloaded again.*expected fingerprint B, found Z"
    ):
        extend(storage, [tar("/d/y/0.tar", "Z")], samples_per_tar=5)
    with pytest.raises(ManifestError, match=r"/new/y/0\.tar: repacked or downloaded again"):
        extend(storage, [tar("/new/x/0.tar", "A"), tar("/new/y/0.tar", "Z")], samples_per_tar=5)
    table = extend(
        storage, [tar("/other/x/0.tar", "Z")], samples_per_tar=5
    )  # another data set that numbers its tars alike
    assert table.entries[2].fingerprint == "Z"
    assert table.duplicate_names(["/more/0.tar", "/d/x/0.tar", "/more/1.tar"]) == ["/more/0.tar"]


@pytest.mark.parametrize("damage", ["edited", "gap", "foreign", "order"])
def test_a_table_that_was_edited_or_copied_in_part_is_refused(damage: str, tmp_path: Path) -> None:
    storage, other = open_storage(tmp_path / "a"), open_storage(tmp_path / "b")
    for number in range(3):
        extend(storage, [tar(f"/d/{number}.tar", f"A{number}")], samples_per_tar=5)
        extend(other, [tar(f"/e/{number}.tar", f"B{number}")], samples_per_tar=5)
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
        extend(open_storage(folder), [tar(f"/w{worker}/{number}.tar", f"{worker}-{number}")], samples_per_tar=5)


@pytest.mark.distributed
def test_concurrent_builds_all_add_their_tars(tmp_path: Path) -> None:
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


class GrowsWhenRead(LocalStorage):
    """A storage to which another process adds a segment right after a reader found that there is no further one."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            return super().read(name, start, stop)
        except FileNotFoundError:
            extend(LocalStorage(self.folder), [tar(f"/late/{name}.tar", name)], samples_per_tar=5)
            raise


@pytest.mark.parametrize("segments", [0, 1])
def test_a_table_to_which_another_process_adds_tars_is_read(segments: int, tmp_path: Path) -> None:
    for number in range(segments):
        extend(LocalStorage(tmp_path), [tar(f"/d/{number}.tar", f"A{number}")], samples_per_tar=5)
    before = read_table(GrowsWhenRead(tmp_path), allow_empty=True)
    assert [entry.fingerprint for entry in before.entries] == [f"A{number}" for number in range(segments)]
    assert len(read_table(LocalStorage(tmp_path)).segments) == segments + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_common_root_contains_all_locations(parts: list[list[str]]) -> None:
    locations = ["/" + "/".join(part) + ".tar" for part in parts]
    root = common_root(locations)
    assert all(location.startswith(root + "/") for location in locations)
    deeper = {location.removeprefix(root + "/").partition("/")[::2] for location in locations}
    assert len(deeper) == len({*locations})
    assert len({name for name, rest in deeper}) > 1 or any(not rest for _, rest in deeper)


def test_an_empty_table_is_refused_and_digests_cover_the_segment(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="a cache without tars"):
        read_table(open_storage(tmp_path))
    assert read_table(open_storage(tmp_path), allow_empty=True) == TarTable(())
    segment = TableSegment("/d", "", (TarEntry(0, "a", 1, 1, "A"),)).with_digest()
    assert segment.with_digest() == segment
    assert dataclasses.replace(segment, root="/e").with_digest() != segment


@pytest.fixture(scope="module")
def options(tiny_encoder: Callable[..., str]) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64")}


def test_tars_are_added_to_a_built_cache(
    tars: list[Path], options: dict[str, Any], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    build_cache(BuildConfig(tars=tars[1:2], output_dir=out, **options, samples_per_tar=24))
    before = EmbeddingCache.open(out)
    row, manifest = before.tar(0), before.manifest
    report = build_cache(BuildConfig(tars=tars, output_dir=out, **options))
    assert (report.tars_built, report.tars_kept) == (2, 1)
    after = EmbeddingCache.open(out)
    assert after.manifest == manifest
    assert np.array_equal(after.tar(0), row)
    assert [after.table.find(index_tar(path)).id for path in tars] == [1, 0, 2]
    assert verify(out, tars).ok
    with pytest.raises(ManifestError, match=r"copy\.tar and .*1\.tar are copies of each other"):
        build_cache(BuildConfig(tars=[tars[1], shutil.copy(tars[1], tmp_path / "copy.tar")], output_dir=out, **options))
    large = pack(tmp_path / "large.tar", samples(25, 8))
    with pytest.raises(ManifestError, match=r"large\.tar: 25 samples, expected at most 24"):
        build_cache(BuildConfig(tars=[large], output_dir=out, **options))
    with pytest.raises(ManifestError, match="samples_per_tar: expected 24, found 100"):
        build_cache(BuildConfig(tars=tars, output_dir=out, **options, samples_per_tar=100))
    with pytest.raises(ManifestError, match=r"views\.policy: expected center, found center\+flip"):
        build_cache(BuildConfig(tars=tars, output_dir=out, **options, views=Views("center+flip")))


def test_a_tar_repacked_in_place_stops_a_build(
    options: dict[str, Any], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    path = pack(tmp_path / "0.tar", samples(9, 0))
    build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "cache", **options))
    pack(path, samples(9, 0)[::-1])
    (tmp_path / "cache/done/0.json").unlink()
    with pytest.raises(ValueError, match=r"0\.tar: (repacked or downloaded again|changed during)"):
        build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "cache", **options))
    assert not verify(tmp_path / "cache").ok


def test_a_dtype_that_is_too_coarse_stops_a_build(tars: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        RoundingError,
        match=r"sample 'part/.*stored as int8 its cosine with itself is 0\.9999\d+, expected at least 0\.99999\. "
        r"Choose another --dtype, sufficient here: float16 \(1\.000000\), float32 \(1\.000000\), "
        r"bfloat16 \(0\.99999\d\);",
    ):
        build_cache(
            BuildConfig(tars=tars[1:2], output_dir=tmp_path / "int8", **options, dtype="int8", min_cosine=0.99999)
        )
    assert not (tmp_path / "int8" / "done").exists()


@pytest.mark.parametrize("tier", ["bfloat16", "int8"])
def test_nonfinite_output_has_no_row_in_any_dtype(
    tier: str,
    tars: list[Path],
    options: dict[str, Any],
    tiny_encoder: Callable[..., str],
    weights: Callable[..., str],
    tmp_path: Path,
) -> None:
    nowhere = options | {"encoder": tiny_encoder("test_vit@64", scale=3e38)}  # finite weights, infinite output
    assert build_cache(BuildConfig(tars=tars[1:2], output_dir=tmp_path / "nan", **nowhere, dtype=tier)).counts == {
        "non_finite": 7
    }
    assert np.isnan(EmbeddingCache.open(tmp_path / "nan").tar(0)).all()
    assert verify(tmp_path / "nan", tars[1:2]).ok
    large = options | {"encoder": tiny_encoder("test_vit@64", scale=1e6)}  # overflows float16
    assert build_cache(BuildConfig(tars=tars[1:2], output_dir=tmp_path / "large", **large, dtype=tier)).ok == 7
    assert verify(tmp_path / "large", tars[1:2], depth="recompute", weights=weights("test_vit", scale=1e6)).ok

"""Remapped rows follow their key and image into other tars, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from threetowers.cache import cli as command
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError, read_manifest
from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.remap.remap import remap
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.tar_index import index_tar, key_hash

Pack = Callable[..., Path]
Provenance = list[tuple[str, dict[str, bytes]]]


@pytest.fixture(scope="module")
def made(samples: Callable[[int, int], Provenance]) -> Provenance:
    """Thirty samples, one of them not decodable."""
    rows = samples(19, 0) + samples(11, 1)
    rows[4] = (rows[4][0], {"png": b"not an image"})
    return rows


@pytest.fixture(scope="module")
def options(tiny_encoder: Callable[..., str]) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64")}


@pytest.fixture(scope="module")
def old(made: Provenance, options: dict[str, Any], pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("old")
    tars = [pack(root / "0.tar", made[:19]), pack(root / "1.tar", made[19:])]
    build_cache(
        BuildConfig(tars=tars, output_dir=root / "cache", **options, dtype="int8", views=Views("crops:2", 3, 0.4))
    )
    return root / "cache"


def rows_by_key(cache: Path) -> dict[int, dict[str, bytes]]:
    """What any Zarr reader finds, by hash of the key."""
    group = zarr.open_group(cache / "store.zarr", mode="r")
    arrays = {name: np.asarray(array[:]) for name, array in group.arrays()}
    at = np.flatnonzero(arrays["status"])
    return {int(arrays["key_hash"][i]): {name: array[i].tobytes() for name, array in arrays.items()} for i in at}


@pytest.mark.parametrize("seed", range(3))
def test_rows_follow_their_samples_into_any_sharding(
    seed: int,
    made: Provenance,
    old: Path,
    options: dict[str, Any],
    weights: Callable[..., str],
    pack: Pack,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(30)[: 30 - 5 * seed]
    cuts = np.sort(rng.choice(np.arange(1, len(order)), 2, replace=False))
    tars = [pack(tmp_path / f"{i}.tar", [made[j] for j in part]) for i, part in enumerate(np.split(order, cuts))]
    report = remap(old, tmp_path / "new", tars)
    assert (report.tars, report.kept, report.samples, report.missing, report.changed) == (3, 0, len(order), 0, 0)
    source, taken = rows_by_key(old), rows_by_key(tmp_path / "new")
    assert taken == {key_hash(made[j][0]): source[key_hash(made[j][0])] for j in order}
    found = verify(
        tmp_path / "new", tars, depth="recompute", check_contents=True, sample=9, weights=weights("test_vit")
    )
    assert found.ok, found.text()
    assert found.counts == ({"undecodable": 1} if 4 in order else {})
    assert EmbeddingCache.open(tmp_path / "new").record(0).source == "remap"
    (tmp_path / "new/done/1.json").unlink()
    again = remap(old, tmp_path / "new", tars)
    assert (again.tars, again.kept) == (1, 2)
    assert rows_by_key(tmp_path / "new") == taken
    view = Views("crops:2", 3, 0.4)
    assert (
        build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "new", **options, dtype="int8", views=view)).tars_built
        == 0
    )


def test_a_sample_without_a_row_is_refused_filtered_or_left_to_a_build(
    made: Provenance,
    old: Path,
    options: dict[str, Any],
    weights: Callable[..., str],
    pack: Pack,
    encode: Any,
    draw: Any,
    tmp_path: Path,
) -> None:
    changed = (made[1][0], {"png": encode(draw(77))})
    tars = [
        pack(tmp_path / "0.tar", [made[0], changed, made[2]]),
        pack(tmp_path / "1.tar", [made[7], ("new", {"png": encode(draw(78))})]),
        pack(tmp_path / "2.tar", made[20:24]),
    ]
    with pytest.raises(ManifestError, match=r"1 samples have no row of their key in .*, 1 have one of another image"):
        remap(old, tmp_path / "refused", tars)
    assert not (tmp_path / "refused").exists()
    report = remap(old, tmp_path / "filtered", tars, missing="filtered")
    assert (report.tars, report.samples, report.missing, report.changed) == (3, 7, 1, 1)
    assert any("0.tar: 'part/0000001': its row is of another image" in name for name in report.names)
    opened = EmbeddingCache.open(tmp_path / "filtered")
    assert opened.status(0).tolist() == [RowStatus.OK, RowStatus.FILTERED, RowStatus.OK]
    assert opened.status(1).tolist() == [RowStatus.OK, RowStatus.FILTERED]
    assert opened.record(1).bad[0].reason == "remapped: no row of this key"
    assert verify(tmp_path / "filtered", tars, check_contents=True).ok
    report = remap(old, tmp_path / "left", tars, missing="build")
    assert report.left == tuple(map(str, tars[:2]))
    view = Views("crops:2", 3, 0.4)
    assert (
        build_cache(
            BuildConfig(tars=tars, output_dir=tmp_path / "left", **options, dtype="int8", views=view)
        ).tars_built
        == 2
    )
    assert verify(tmp_path / "left", tars, depth="recompute", weights=weights("test_vit")).ok


def test_nonfinite_samples_are_counted_as_such_and_stay_so(
    made: Provenance, tiny_encoder: Callable[..., str], pack: Pack, tmp_path: Path
) -> None:
    tars = [pack(tmp_path / f"{i}.tar", samples) for i, samples in enumerate((made[:9], made[8:4:-1]))]
    embedded = BuildConfig(tars=tars[:1], output_dir=tmp_path / "finite", encoder=tiny_encoder("test_vit@64"))
    build_cache(embedded)
    largest = np.abs(EmbeddingCache.open(tmp_path / "finite").tar(0).reshape(9, -1)).max(axis=1)
    scale = 65520 / float(np.nanmedian(largest[5:]))  # of the four samples that are carried over two overflow float16
    build_cache(
        BuildConfig(tars=tars[:1], output_dir=tmp_path / "old", encoder=tiny_encoder("test_vit@64", scale=scale))
    )
    before = EmbeddingCache.open(tmp_path / "old").status(0)[:4:-1].tolist()
    assert before.count(RowStatus.NON_FINITE) == 2
    report = remap(tmp_path / "old", tmp_path / "new", tars[1:])
    assert (report.samples, report.missing, report.changed, report.nonfinite) == (2, 0, 0, 2)
    assert EmbeddingCache.open(tmp_path / "new").status(0).tolist() == before


def test_one_key_of_two_images_is_told_apart_by_the_image(
    made: Provenance, options: dict[str, Any], pack: Pack, tmp_path: Path
) -> None:
    same = [("same", made[0][1]), ("same", made[1][1])]
    tars = [pack(tmp_path / f"{i}.tar", [sample]) for i, sample in enumerate(same)]
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "old", **options))
    moved = [pack(tmp_path / "b.tar", [same[1], made[2]]), pack(tmp_path / "a.tar", [same[0]])]
    with pytest.raises(ManifestError, match="1 samples have no row of their key"):
        remap(tmp_path / "old", tmp_path / "new", moved)
    remap(tmp_path / "old", tmp_path / "new", moved, missing="filtered")
    before, after = EmbeddingCache.open(tmp_path / "old"), EmbeddingCache.open(tmp_path / "new")
    for tar, old_id in ((moved[0], 1), (moved[1], 0)):
        new_id = after.table.find(index_tar(tar)).id
        assert np.array_equal(after.row(new_id, 0, "same"), before.row(old_id, 0, "same"))


def test_incomplete_caches_and_foreign_folders_are_refused(
    made: Provenance, old: Path, pack: Pack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = pack(tmp_path / "0.tar", made[:3])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ManifestError, match="neither a cache nor empty"):
        remap(old, tmp_path / "other", [tar])
    assert command.remap(str(old), str(tmp_path / "new"), [str(tar)]) == 0
    assert "1 tars written, 0 already finished; 3 samples" in capsys.readouterr().out
    manifest = read_manifest(open_storage(tmp_path / "new"))
    assert manifest.rows_per_tar < read_manifest(open_storage(old)).rows_per_tar
    (tmp_path / "new" / "done" / "0.json").unlink()
    with pytest.raises(ManifestError, match=r"0\.tar \(0\): incomplete"):
        remap(tmp_path / "new", tmp_path / "newer", [tar])

"""Caches of augmented views: what is stored shows the teacher what it saw, however the cache was built."""

import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cache.slow_image_ops import slow_op
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.live import embed, live_teacher
from threetowers.cache.format.done_record import done_record_name
from threetowers.cache.format.dtypes import cosines
from threetowers.cache.format.image_ops import OPS
from threetowers.cache.format.layout import params_name
from threetowers.cache.format.manifest import ManifestError, to_json
from threetowers.cache.format.store import read_tar_rows, write_tar_rows
from threetowers.cache.format.views import Views, render_view
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.remap.remap import remap
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.verify.verify import verify
from threetowers.cache.webdataset.tar_index import index_tar, key_hash, read_member

VIEWS = Views("crops:3", seed=2, scale=0.4, augment="randaugment:2:14")
MODES = ("RGB", "L", "RGBA", "P", "LA", "RGB", "CMYK")
SIDE = 64

Built = tuple[Path, list[Path]]


@pytest.fixture(scope="module")
def options(weights: Callable[..., str]) -> dict[str, Any]:
    return {"encoder": f"timm:test_vit@{SIDE}:{weights('test_vit')}", "views": VIEWS, "batch_size": 4}


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    pack: Callable[..., Path],
    draw: Callable[..., Image.Image],
    encode: Callable[..., bytes],
    options: dict[str, Any],
) -> Built:
    """A cache of two tars of images of all modes and of odd sizes, and the tars."""
    root = tmp_path_factory.mktemp("augmented")
    tars = []
    for tar in range(2):
        samples = []
        for i, mode in enumerate(MODES):
            kind = "jpeg" if mode == "CMYK" else "png"
            image = draw(100 * tar + i, (31 + 17 * i, 90 - 11 * i)).convert(mode)
            samples.append((f"{tar}/{i}", {kind: encode(image, kind)}))
        tars.append(pack(root / f"{tar}.tar", samples))
    build_cache(BuildConfig(tars=tars, output_dir=root / "cache", **options))
    return root / "cache", tars


def slow_view(image: Image.Image, params: np.ndarray, side: int, interpolation: str) -> np.ndarray:
    """(3, side, side) pixels by the definitions of box, flip and operations alone."""
    left, top, right, bottom, flip = params[:5].tolist()
    box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    crop, large = (
        image.resize((size, size), getattr(Image.Resampling, kind.upper()), box)
        for size, kind in ((side, interpolation), (224, "bicubic"))
    )
    pixels, measured = (np.asarray(each, np.float64)[:, :: -1 if flip else 1] for each in (crop, large))
    for op_id, value in params[5:].reshape(-1, 2).tolist():
        name = OPS[int(op_id)].name
        pixels, measured = (slow_op(name, value, each, measured) for each in (pixels, measured))
    return pixels.round().astype(np.uint8).transpose(2, 0, 1)


def test_stored_rows_are_those_of_the_replayed_views(built: Built, options: dict[str, Any]) -> None:
    """Cosine of at least 0.9999, through the teacher, with the definitions applied slowly to what PIL decodes."""
    folder, tars = built
    cache = EmbeddingCache.open(folder)
    assert str(cache.manifest.views) == "crops:3, seed 2, scale 0.4, augment randaugment:2:14"
    side = live_teacher(cache.manifest, options["encoder"].partition(f"@{SIDE}:")[2]).side("image")
    interpolation = side.preprocessing.interpolation
    slow, fast, rows = [], [], []
    for tar_id, tar in enumerate(tars):
        index = index_tar(tar)
        for ordinal, sample in enumerate(index.samples):
            data = read_member(index, ordinal, next(iter(sample.members)))
            image = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGB")
            if "jpeg" in sample.members:
                image = Image.open(io.BytesIO(data)).convert("RGB")
            drawn = VIEWS.params(key_hash(sample.key), *image.size)
            for view in range(3):
                params = cache.view_params(tar_id, ordinal, view)
                assert np.array_equal(params, drawn[view])
                slow.append(slow_view(image, params, SIDE, interpolation))
                shown = render_view(image, params, (SIDE, SIDE), interpolation)
                fast.append(np.asarray(shown).transpose(2, 0, 1))
                rows.append(cache.row(tar_id, ordinal, sample.key, view))
    assert len(rows) == 2 * len(MODES) * 3
    assert np.abs(np.stack(slow).astype(int) - np.stack(fast).astype(int)).max() <= 3  # a byte of rounding, amplified
    for pixels in (fast, slow):
        assert cosines(np.stack(rows), embed(side, pixels)).min() >= 0.9999
    unchanged = [np.roll(pixels, 1, axis=0) for pixels in fast]  # channels swapped: the bound tells views apart
    assert cosines(np.stack(rows), embed(side, unchanged)).min() < 0.9999


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but done records, which hold times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "done"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_resumed_and_in_processes_the_bytes_are_the_same(built: Built, options: dict[str, Any], tmp_path: Path) -> None:
    folder, tars = built
    build_cache(BuildConfig(tars=tars[:1], output_dir=tmp_path / "resumed", **options))
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "resumed", **options))
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "processes", workers=2, **options))
    lost = tmp_path / "lost"
    shutil.copytree(folder, lost)
    (lost / "done/1.json").unlink()
    (lost / f"store.zarr/{params_name(2)}/c/1/0").write_bytes(b"torn")
    build_cache(BuildConfig(tars=tars, output_dir=lost, **options))
    expected = files(folder)
    assert any(name.startswith("store.zarr/view_params_2/c/1") for name in expected)
    for found in (lost, tmp_path / "processes"):
        assert files(found) == expected
    resumed = files(tmp_path / "resumed")
    assert {name: resumed[name] for name in expected if name.startswith("store.zarr/")} == {
        name: data for name, data in expected.items() if name.startswith("store.zarr/")
    }


def test_another_augmentation_is_another_cache(built: Built, options: dict[str, Any]) -> None:
    folder, tars = built
    other = options | {"views": dataclasses.replace(VIEWS, augment="none")}
    with pytest.raises(ManifestError, match=r"views\.augment: expected randaugment:2:14, found none"):
        build_cache(BuildConfig(tars=tars, output_dir=folder, **other))


def test_remapped_rows_keep_their_parameters(built: Built, pack: Callable[..., Path], tmp_path: Path) -> None:
    folder, tars = built
    index = index_tar(tars[1])
    samples = [
        (sample.key, {kind: read_member(index, ordinal, kind) for kind in sample.members})
        for ordinal, sample in enumerate(index.samples)
    ]
    tar = pack(tmp_path / "again.tar", samples[::-1])
    remap(folder, tmp_path / "cache", [tar])
    old, new = EmbeddingCache.open(folder), EmbeddingCache.open(tmp_path / "cache")
    assert new.manifest.views == VIEWS
    for ordinal in range(len(samples)):
        for view in range(3):
            moved = new.view_params(0, len(samples) - 1 - ordinal, view)
            assert np.array_equal(moved, old.view_params(1, ordinal, view))


def with_params(source: Path, folder: Path, at: tuple[int, int], params: list[float]) -> Path:
    """Copy a cache and write other operations of the sample and view `at` of tar 1 into it, with digests that agree."""
    shutil.copytree(source, folder)
    cache = EmbeddingCache.open(folder)
    record = cache.record(1)
    ordinal, view = at
    rows = read_tar_rows(open_storage(folder), cache.manifest, cache.tars[1], record)
    rows = {name: array[: record.n_samples].copy() for name, array in rows.items()}
    rows[params_name(view)][ordinal, 5:] = params
    sums, crcs = write_tar_rows(open_storage(folder), cache.manifest, 1, rows)
    changed = dataclasses.replace(record, files=sums, chunk_crc32c=crcs)
    (folder / done_record_name(1)).write_bytes(to_json(changed))
    return folder


def test_parameters_that_the_teacher_did_not_see_are_found_by_recomputing(
    built: Built, options: dict[str, Any], tmp_path: Path
) -> None:
    folder, tars = built
    weights = options["encoder"].partition(f"@{SIDE}:")[2]
    sound = verify(folder, tars, depth="recompute", sample=100, weights=weights)
    assert sound.ok, sound.text()
    wrong = with_params(folder, tmp_path / "wrong", (3, 1), [11, 0.0, 6, 0.1])  # inverted and dark
    assert verify(wrong, tars).ok
    report = verify(wrong, tars, depth="recompute", sample=100, weights=weights)
    assert "'1/3' (ordinal 3)" in report.text()
    assert len(report.problems) <= 3, "views of one sample, as far as they were drawn"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([14, 0, 0, 0], "operation 14, expected one of 0 to 13"),
        ([0, 0, 6, 5], r"operation 6 (brightness) with the value 5, which it does not have"),
        ([0, np.nan, 0, 0], "operation 0 (identity) with the value nan"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(
    built: Built, tmp_path: Path, params: list[float], message: str
) -> None:
    folder, _ = built
    wrong = with_params(folder, tmp_path / "wrong", (0, 2), params)
    assert message in verify(wrong).text()
    cache = EmbeddingCache.open(wrong)
    with pytest.raises(ManifestError) as error:
        cache.view_params(1, 5, 2)
    assert f"view_params_2 of tar 1.tar (1): {message}" in str(error.value)
    assert "use the version that built the cache, or build it again" in str(error.value)
    assert np.isfinite(cache.view_params(1, 5, 1)).all()

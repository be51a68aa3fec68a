"""A built cache has the live teacher's embeddings in the right rows, and refuses to become another cache."""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from tests.cache.caches import without_times
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.processes.world import World
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.images import BadImage, decode_rgb
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import index_tar, key_hash, read_member

Weights = Callable[..., str]
TinyEncoder = Callable[..., str]
Pack = Callable[..., Path]
MakeSamples = Callable[[int, int], list[tuple[str, dict[str, bytes]]]]


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the done records, which hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "done"
    }


@pytest.fixture(scope="module")
def options(tiny_encoder: TinyEncoder) -> dict[str, Any]:
    return {"encoder": tiny_encoder("test_vit@64"), "batch_size": 5}


@pytest.fixture(scope="module")
def cache(tars: list[Path], options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "cache"
    report = build_cache(BuildConfig(tars=tars, output_dir=out, **options))
    assert (report.tars_built, report.tars_kept, report.samples, report.ok) == (3, 0, 42, 42)
    return out


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_cached_equals_the_live_teacher(
    model: str, dtype: str, tars: list[Path], tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path, encoder=tiny_encoder(f"{model}@64"), dtype=dtype))
    opened = EmbeddingCache.open(tmp_path)
    teacher = load_frozen_encoder(tiny_encoder(f"{model}@64")).side("image")
    group = zarr.open_group(tmp_path / "store.zarr", mode="r")
    assert len(opened) == 42
    for path in tars:
        index = index_tar(path)
        tar_id = opened.table.find(index).id
        for ordinal, sample in enumerate(index.samples):
            image = decode_rgb(read_member(index, ordinal, "png"))
            live = teacher.embed(torch.from_numpy(np.ascontiguousarray(teacher.transform(image)))[None])[0].numpy()
            row = opened.row(tar_id, ordinal, sample.key)
            assert row.dtype == np.float32
            cosine = row @ live / np.linalg.norm(row) / np.linalg.norm(live)
            assert cosine >= 0.9999
            np.testing.assert_allclose(row, live, rtol=2e-3 if dtype == "float16" else 1e-4, atol=1e-4)
            at = tar_id * opened.manifest.rows_per_tar + ordinal
            assert np.array_equal(group["emb"][at].astype(np.float32), row)
            assert group["key_hash"][at] == key_hash(sample.key)
            assert group["status"][at] == RowStatus.OK


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_of_any_size_fill_every_row(
    batch_size: int, tars: list[Path], cache: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path, **{**options, "batch_size": batch_size, "threads": 3}))
    for tar_id in range(3):
        ours, theirs = EmbeddingCache.open(tmp_path).tar(tar_id), EmbeddingCache.open(cache).tar(tar_id)
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-3)


def test_bytes_depend_on_the_inputs_alone(
    tars: list[Path], cache: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    build_cache(BuildConfig(tars=tars, output_dir=tmp_path / "again", **options, threads=4))
    assert files(tmp_path / "again") == files(cache)
    records = [EmbeddingCache.open(folder).record(1) for folder in (cache, tmp_path / "again")]
    assert without_times(records[0]) == without_times(records[1])


def test_a_second_run_keeps_what_is_finished(
    tars: list[Path], cache: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(cache, tmp_path / "cache")
    (folder / "done" / "1.json").unlink()
    (folder / "store.zarr" / "emb" / "c" / "2" / "0").write_bytes(b"cut short")
    with pytest.raises(ManifestError, match=r"tar a/1\.tar \(1\): incomplete"):
        EmbeddingCache.open(folder).record(1)
    with pytest.raises(ManifestError, match=r"b/0\.tar.*expected \d+ bytes, found 9"):
        EmbeddingCache.open(folder).record(2)
    report = build_cache(BuildConfig(tars=tars, output_dir=folder, **options))
    assert (report.tars_built, report.tars_kept, report.samples) == (2, 1, 19)
    assert files(folder) == files(cache)


def test_moved_tars_are_recognised(tars: list[Path], cache: Path, options: dict[str, Any], tmp_path: Path) -> None:
    moved = Path(shutil.copy(tars[2], tmp_path / "elsewhere.tar"))
    assert EmbeddingCache.open(cache).table.find(index_tar(moved)).id == 2
    report = build_cache(BuildConfig(tars=[moved], output_dir=cache, **options))
    assert (report.tars_built, report.tars_kept) == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "test_vit@96"}, r"preprocessing\.input_size: expected \(64, 64\), found \(96, 96\)"),
        ({"dtype": "float32"}, "dtype: expected float16, found float32"),
        ({"model": "test_resnet@64"}, "encoder: expected timm:test_vit, found timm:test_resnet"),
        ({"seed": 1}, "weights_digest: expected [0-9a-f]{64}, found [0-9a-f]{64}"),
    ],
)
def test_another_manifest_is_refused(
    change: dict[str, Any],
    message: str,
    tars: list[Path],
    cache: Path,
    options: dict[str, Any],
    tiny_encoder: TinyEncoder,
) -> None:
    asked = {"model": "test_vit@64", "seed": 0} | change
    encoder = tiny_encoder(asked.pop("model"), seed=asked.pop("seed"))
    before = files(cache)
    with pytest.raises(ManifestError, match=message):
        build_cache(BuildConfig(tars=tars, output_dir=cache, **{**options, **asked, "encoder": encoder}))
    assert files(cache) == before


def test_another_file_with_the_same_weights_is_a_note(
    tars: list[Path], cache: Path, options: dict[str, Any], weights: Weights, tmp_path: Path
) -> None:
    copy = shutil.copy(weights("test_vit"), tmp_path / "renamed.safetensors")
    report = build_cache(BuildConfig(tars=tars, output_dir=cache, **{**options, "encoder": f"timm:test_vit@64:{copy}"}))
    assert report.differences == ("weights: expected file:test_vit-0-1.safetensors, found file:renamed.safetensors",)


def test_unknown_tars_are_refused(
    tars: list[Path], cache: Path, options: dict[str, Any], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    opened = EmbeddingCache.open(cache)
    with pytest.raises(ManifestError, match="not among the 3 tars of this cache"):
        opened.table.find(index_tar(pack(tmp_path / "new.tar", samples(3, 9))))
    with pytest.raises(ManifestError, match="repacked or downloaded again since"):
        opened.table.find(index_tar(pack(tmp_path / "b" / "0.tar", samples(12, 2), mtime=1_800_000_000)))
    with pytest.raises(ManifestError, match="copies of each other"):
        build_cache(
            BuildConfig(
                tars=[tars[1], shutil.copy(tars[1], tmp_path / "copy.tar")], output_dir=tmp_path / "out", **options
            )
        )


def test_bad_tars_stop_a_build_before_it_writes(tars: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tars[0].read_bytes()[:-11_000])
    with pytest.raises(BadTar, match=r"cut\.tar"):
        build_cache(BuildConfig(tars=[tars[1], cut], output_dir=tmp_path / "out", **options))
    with pytest.raises(ValueError, match="matches no file"):
        build_cache(BuildConfig(tars=[str(tmp_path / "*.tarr")], output_dir=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_foreign_folders_are_left_alone(tars: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ManifestError, match=r"neither a cache nor empty, found .'thesis\.tex'"):
        build_cache(BuildConfig(tars=[tars[1]], output_dir=tmp_path, **options))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_images_get_a_status_and_other_rows_stay_in_place(
    tars: list[Path], cache: Path, options: dict[str, Any], pack: Pack, samples: MakeSamples, tmp_path: Path
) -> None:
    rows = samples(23, 0)
    for ordinal, broken in ((0, b""), (4, b"not an image"), (11, rows[11][1]["png"][:60])):
        rows[ordinal] = (rows[ordinal][0], {"png": broken})
    path = pack(tmp_path / "x.tar", rows)
    report = build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "out", **options))
    assert (report.samples, report.ok, report.counts) == (23, 20, {"undecodable": 3})
    opened, reference = EmbeddingCache.open(tmp_path / "out"), EmbeddingCache.open(cache).tar(0)
    status = opened.status(0)
    assert np.flatnonzero(status == RowStatus.UNDECODABLE).tolist() == [0, 4, 11]
    assert (np.delete(status, [0, 4, 11]) == RowStatus.OK).all()
    found = opened.tar(0)
    assert np.isnan(found[[0, 4, 11]]).all()
    np.testing.assert_allclose(
        np.delete(found, [0, 4, 11], 0), np.delete(reference, [0, 4, 11], 0), rtol=2e-3, atol=1e-3
    )
    record = opened.record(0)
    assert [(bad.ordinal, bad.key, bad.status) for bad in record.bad] == [(i, rows[i][0], 2) for i in (0, 4, 11)]
    assert "cannot be decoded (12 bytes)" in record.bad[1].reason
    with pytest.raises(ManifestError, match=r"ordinal 4.*no embedding: undecodable"):
        opened.row(0, 4, rows[4][0])
    with pytest.raises(BadImage, match=r"x\.tar: sample 'part/0000000' \(ordinal 0\)"):
        build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "strict", **options, on_bad="error"))
    with pytest.raises(ManifestError, match="incomplete"):
        EmbeddingCache.open(tmp_path / "strict").tar(0)


def test_a_tar_of_bad_images_only(options: dict[str, Any], pack: Pack, tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [(str(i), {"jpg": b"?"}) for i in range(3)])
    assert build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "out", **options)).ok == 0
    opened = EmbeddingCache.open(tmp_path / "out")
    assert np.isnan(opened.tar(0)).all()
    with pytest.raises(ManifestError, match="no row has an embedding"):
        opened.moments()


def test_nonfinite_output_gets_a_status(
    options: dict[str, Any], tiny_encoder: TinyEncoder, pack: Pack, encode: Callable[..., bytes], tmp_path: Path
) -> None:
    images = [Image.new("RGB", (8, 8), (i * 20,) * 3) for i in range(9)]
    path = pack(tmp_path / "x.tar", [(str(i), {"png": encode(image)}) for i, image in enumerate(images)])
    teacher = load_frozen_encoder(options["encoder"]).side("image")
    x_b3HW = torch.stack([torch.from_numpy(np.ascontiguousarray(teacher.transform(image))) for image in images])
    middle = float(teacher.embed(x_b3HW).abs().amax(dim=1).sort().values[3:5].mean())
    large = options | {"encoder": tiny_encoder("test_vit@64", scale=65520 / middle)}  # 65520 rounds to infinity
    report = build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "half", **large))
    teacher = load_frozen_encoder(large["encoder"]).side("image")
    beyond = teacher.embed(x_b3HW).abs().amax(dim=1) >= 65520
    assert beyond.sum() == 5
    opened = EmbeddingCache.open(tmp_path / "half")
    assert report.counts == {"non_finite": int(beyond.sum())}
    assert ((opened.status(0) == RowStatus.NON_FINITE) == beyond.numpy()).all()
    assert (np.isnan(opened.tar(0)).all(axis=1) == beyond.numpy()).all()
    assert "overflows float16" in opened.record(0).bad[0].reason
    assert build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "single", **large, dtype="float32")).ok == 9
    nowhere = options | {"encoder": tiny_encoder("test_vit@64", scale=float("nan"))}
    with pytest.raises(ValueError, match="NaN or infinity"):
        build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "nan", **nowhere))


def test_options_out_of_range_are_refused(tars: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    for change in ({"batch_size": 0}, {"threads": 0}, {"dtype": "int4"}, {"on_bad": "ignore"}, {"samples_per_tar": 0}):
        with pytest.raises(ValueError, match="expected"):
            build_cache(BuildConfig(tars=[tars[0]], output_dir=tmp_path / "out", **(options | change)))


def test_ranks_come_from_the_launcher() -> None:
    assert World.from_env({}) == World(0, 1, 0, 1)
    assert World.from_env({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == World(
        3, 8, 1, 2
    )
    assert World.from_env({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}) == World(1, 4, 1, 1)
    assert World.from_env({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == World(0, 1, 0, 1)
    for env in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(ValueError, match="RANK="):
            World.from_env(env)


def test_local_ranks_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rank=6, size=8, local_rank=6, local_size=8)
    assert world.device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A GPU a rank; fewer GPUs than ranks; a scheduler that shows each rank its own
    for gpus, expected in ((8, 6), (4, 2), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert world.device == torch.device("cuda", expected)


def test_cores_are_shared_by_the_ranks_unless_each_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)))
    world = World(rank=9, size=16, local_rank=1, local_size=8)
    assert world.cores({}) == 12
    assert World(rank=0, size=200, local_rank=0, local_size=200).cores({}) == 1
    task = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_CPUS_PER_TASK": "10"}
    assert world.cores(task) == 10
    assert (
        world.cores(task | {"SLURM_STEP_NUM_TASKS": "2"}) == 12
    )  # one task a machine, in which torchrun started ranks
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))  # bound to the cores of the task
    assert world.cores(task) == 8


def test_a_timeout_names_what_the_rank_waited_for(
    tars: list[Path], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        TimeoutError, match=r"rank 1 waited 0 s for rank 0 to index the tars and to write .*manifest\.json"
    ):
        build_cache(BuildConfig(tars=[tars[0]], output_dir=tmp_path / "out", **options, wait_seconds=0))


def test_done_records_describe_the_stored_rows(cache: Path) -> None:
    opened = EmbeddingCache.open(cache)
    for tar_id in range(3):
        record, rows = opened.record(tar_id), opened.tar(tar_id).astype(np.float64)
        norms = np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(dataclasses.astuple(record.norms), [norms.min(), norms.mean(), norms.max()])
        assert record.sum == pytest.approx(rows.sum())
        assert record.max_abs == np.abs(rows).max()

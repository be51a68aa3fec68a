"""Rows of a cache in training: samples without one, views, and caches that are still being built."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import samples_of, write_tar
from tests.trainer.loading import loader_of, open_run
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.live import embed, view_pixels
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.views import Views, as_pixels, render_view
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar, read_member
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data import epoch_snapshot
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.data.epoch_snapshot import EpochSnapshots
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.joins.sample_members import SampleMembers
from threetowers.trainer.data.loader import TrainingSampleReader
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.streaming import StreamSegment, read_segment
from threetowers.trainer.data.transforms import center_crop

CROPS = Views("crops:3", seed=4, scale=0.4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher whose features overflow float16 on bright images: a residual network with large last gains."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def built(tars: list[Path], weights: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """built(views): a cache of the small tars."""
    folder = tmp_path_factory.mktemp("views")

    def make(views: Views) -> Path:
        out = folder / views.policy
        build_cache(BuildConfig(tars=tars, output_dir=out, encoder=f"timm:test_resnet@64:{weights}", views=views))
        return out

    return make


@pytest.fixture
def gap(tmp_path: Path, weights: str) -> Callable[..., tuple[Path, Path]]:
    """gap(views): a tar whose samples 3 and 6 have no embedding, though 3 has an image; and its cache."""

    def make(views: Views = CROPS) -> tuple[Path, Path]:
        samples = samples_of(0, 12)
        samples[6][1]["png"] = b"no image"
        tar, out = write_tar(tmp_path / "gap.tar", samples), tmp_path / "gap"
        build_cache(BuildConfig(tars=[tar], output_dir=out, encoder=f"timm:test_resnet@64:{weights}", views=views))
        leave_out(out, 3)
        return tar, out

    return make


def leave_out(folder: Path, ordinal: int) -> None:
    """Build the tar again as it would be with a filter that drops one sample."""
    from threetowers.cache.format.done_record import done_record_name
    from threetowers.cache.format.image_row_buffer import ImageRowBuffer
    from threetowers.cache.format.layout import RowStatus, arrays
    from threetowers.cache.format.manifest import to_json
    from threetowers.cache.format.row_buffer import Provenance
    from threetowers.cache.read.shard_rows import read_column
    from threetowers.cache.storage.storage import open_storage

    opened = EmbeddingCache.open(folder)
    index = index_tar(Path(opened.table.root) / opened.tars[0].path)
    rows = ImageRowBuffer(index, opened.manifest)
    for name in arrays(opened.manifest):
        view = 0 if name == "emb" else int(name.rpartition("_")[2]) if name.startswith("emb") else None
        column = partial(read_column, opened.storage, opened.manifest, opened.record(0))
        rows.arrays[name][:] = opened.shard_rows(0, view).rows_nD if view is not None else column(name)
    rows.reject(ordinal, RowStatus.FILTERED, "for the test")
    record = rows.write(open_storage(folder), opened.tars[0], "", Provenance("teacher", 1, "cpu", 0.0))
    open_storage(folder).put(done_record_name(0), to_json(record), owner="test")


def with_cache(tree: dict[str, Any], tar: Path, cache: Path, **third: Any) -> dict[str, Any]:
    towers = tree["towers"] | {"third": {"kind": "cache", "path": str(cache), **third}}
    return tree | {"towers": towers, "data": tree["data"] | {"tars": [str(tar)]}, "global_batch_size": 6}


def load(tree: dict[str, Any], stop: int) -> tuple[SampleSet, list[Batch]]:
    samples = open_run(tree)
    return samples, list(loader_of(tree, samples, stop=stop))


def test_error_names_the_first_sample_and_the_config_key(three: dict[str, Any], gap: Any) -> None:
    with pytest.raises(BadSample, match=r"'s0003': the cache of tower 'third' .*\(2 such.*third\.on_missing_row: skip"):
        load(with_cache(three, *gap()), 1)


def test_skip_leaves_samples_without_a_row_out(three: dict[str, Any], gap: Any) -> None:
    samples, (batch,) = load(with_cache(three, *gap(), on_missing_row="skip"), 1)
    assert samples.epoch_indices(0).tolist() == [i for i in range(12) if i not in (3, 6)]
    assert samples.left_out == {"no embedding in 'third'": 2}
    assert len(samples) == 10
    assert batch.present == {}


def test_mask_keeps_samples_without_a_row_for_the_other_terms(three: dict[str, Any], gap: Any) -> None:
    tree = with_cache(three, *gap(), on_missing_row="mask")
    tree["data"]["on_bad"] = "skip"  # the image of sample 6 cannot be decoded for the image tower either
    samples, found = load(tree, 4)
    assert samples.without_row == {"left out of the terms with 'third'": 2}
    for epoch in range(2):
        one, two = found[2 * epoch : 2 * epoch + 2]
        assert len(one) + len(two) == 11
        assert sorted(len(batch.bad) for batch in (one, two)) == [0, 1]
        assert sum(int((~batch.present["third"]).sum()) for batch in (one, two)) == 1
        for batch in (one, two):
            missing = ~batch.present["third"]
            assert batch.inputs["third"].shape == (len(batch), samples.caches["third"].cache.dim)
            assert (batch.inputs["third"][missing] == 0).all()
            assert (batch.inputs["third"][~missing] != 0).any(1).all()
            assert batch.inputs["image"].shape == (len(batch), 3, 32, 32)


@pytest.mark.parametrize("views", [Views("center+flip"), CROPS])
def test_live_computes_the_rows_that_the_cache_lacks(
    three: dict[str, Any], gap: Any, weights: str, views: Views
) -> None:
    tar, cache = gap(views)
    tree = with_cache(three, tar, cache, on_missing_row="live", weights=weights)
    tree["data"]["on_bad"] = "skip"
    whole = cache.parent / "whole"  # what the build would have given
    build_cache(BuildConfig(tars=[tar], output_dir=whole, encoder=f"timm:test_resnet@64:{weights}", views=views))
    samples, _ = load(tree, 1)
    join, index = samples.caches["third"], index_tar(tar)
    assert samples.without_row == {"computed by the teacher of 'third'": 2}
    for view in range(views.count):
        visit = replace(samples.visit(0, 3), view=view)
        members = SampleMembers(index, 3, partial(read_member, index, 3), visit.captions, 10**6)
        row = join.with_fallback(None, 0, visit, members)
        assert row is not None
        expected = EmbeddingCache.open(whole).row(0, 3, "s0003", view)
        np.testing.assert_allclose(row, expected, rtol=2e-3, atol=2e-3)
    _, found = load(tree, 6)
    assert all(batch.present == {} for batch in found)
    assert sum(len(batch.bad) for batch in found) == 3  # sample 6, in each of three epochs: there is nothing to embed


def test_live_needs_the_teacher_of_the_cache(three: dict[str, Any], gap: Any, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    tar, cache = gap()
    with pytest.raises(ValueError, match=r"weights came from 'teacher\.safetensors': give its path"):
        load(with_cache(three, tar, cache, on_missing_row="live"), 1)
    other = tmp_path / "other.safetensors"
    torch.manual_seed(6)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), other)
    with pytest.raises(ManifestError, match="not the one of the cache: weights_digest: expected"):
        load(with_cache(three, tar, cache, on_missing_row="live", weights=str(other)), 1)


def test_the_image_tower_sees_the_crop_that_the_teacher_saw(
    three: dict[str, Any], tars: list[Path], built: Any, weights: str
) -> None:
    """The box that an epoch cuts for the image tower, through the teacher's own transform, gives the row."""
    cache = EmbeddingCache.open(built(CROPS))
    three["towers"]["third"]["path"] = str(cache.storage)
    three["data"]["tars"] = [str(tars[0])]
    encoder = load_frozen_encoder(f"timm:test_resnet@64:{weights}").side("image")
    index = index_tar(tars[0])
    rows = [cache.tar(0, view) for view in range(3)]
    _, found = load(three, 8)  # two batches of 12 in an epoch of 25
    for step, batch in enumerate(found):
        view = step // 2 % 3
        for shown, row in zip(batch.inputs["image"], batch.inputs["third"].numpy(), strict=True):
            (ordinal,) = np.flatnonzero((rows[view] == row).all(1)).tolist()
            image, params_P = read_image(index, ordinal, 10**6), cache.view_params(0, ordinal, view)
            assert shown.equal(torch.from_numpy(as_pixels(render_view(image, params_P, (32, 32), "bilinear"))))
            (seen,) = embed(encoder, [view_pixels(encoder, image, view, params_P)])
            assert np.linalg.norm(seen - row) < 1e-3 * np.linalg.norm(row)  # float16
            (mirrored,) = embed(encoder, [view_pixels(encoder, image.transpose(0), view, params_P)])
            assert np.linalg.norm(mirrored - row) > 1e-3 * np.linalg.norm(row)


def test_mirrored_epochs_read_the_mirrored_rows(three: dict[str, Any], tars: list[Path], built: Any) -> None:
    cache = EmbeddingCache.open(built(Views("center+flip")))
    three["towers"]["third"]["path"] = str(cache.storage)
    three["data"]["tars"] = [str(tars[0])]
    index = index_tar(tars[0])
    images = torch.stack([center_crop(read_image(index, i, 10**6), 32) for i in range(25)]).flatten(1)
    _, found = load(three, 8)
    for step, batch in enumerate(found):
        view = step // 2 % 2
        rows = cache.tar(0, view)
        for image, row in zip(batch.inputs["image"], batch.inputs["third"].numpy(), strict=True):
            shown = image.flip(-1) if view else image
            ordinals = torch.nonzero((images == shown.flatten()).all(1)).flatten().tolist()
            assert [(rows[i] == row).all() for i in ordinals] == [True]


def test_augmentation_that_the_cache_does_not_hold_is_refused(three: dict[str, Any], built: Any) -> None:
    three["towers"]["third"]["path"] = str(built(CROPS))
    three["data"]["crop_scale"] = 0.4
    with pytest.raises(ConfigError, match=r"data\.crop_scale: found 0\.4, but .* set crop_scale: 1\.0"):
        parse(three)


def test_caches_of_different_views_are_refused(three: dict[str, Any], built: Any) -> None:
    three["towers"]["third"]["path"] = str(built(CROPS))
    three["towers"]["other"] = {"kind": "cache", "path": str(built(Views()))}
    three["heads"]["h_o"] = {"of": "other"}
    three["terms"]["image-other"] = {"x": "f_h", "y": "h_o"}
    with pytest.raises(ConfigError, match=r"caches of different views: third: .*crops:3.*other: .*center"):
        load(three, 1)


@pytest.fixture
def growing(tmp_path: Path, weights: str) -> tuple[list[Path], Path, Callable[[int], None]]:
    """Four tars of 8 samples, the folder of a cache of them with none built, and a function that finishes one."""
    tars = [write_tar(tmp_path / f"{i}.tar", samples_of(8 * i, 8)) for i in range(4)]
    out = tmp_path / "growing"
    build_cache(BuildConfig(tars=tars, output_dir=out, encoder=f"timm:test_resnet@64:{weights}"))
    (out / "done").rename(tmp_path / "held")
    (out / "done").mkdir()
    return tars, out, lambda i: Path(shutil.copy(tmp_path / f"held/{i}.json", out / "done")) and None


def test_epochs_visit_the_tars_that_were_built_when_they_began(
    three: dict[str, Any], growing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, cache, finish = growing
    monkeypatch.setattr(epoch_snapshot, "POLL_SECONDS", 0.01)
    three["data"] |= {"tars": [str(tar) for tar in tars], "on_incomplete_cache": "skip"}
    three["towers"]["third"]["path"] = str(cache)
    tree = three | {"global_batch_size": 8}
    with pytest.raises(ManifestError, match="incomplete"):
        open_run(three | {"data": three["data"] | {"on_incomplete_cache": "error"}})
    finish(2)
    samples = open_run(tree)
    assert (len(samples), samples.total) == (32, 32)
    assert samples.epoch_indices(0).tolist() == list(range(16, 24))
    moments = samples.moments("third")
    finish(0)
    assert samples.epoch_indices(0).tolist() == list(range(16, 24))
    assert samples.epoch_indices(1).tolist() == [*range(8), *range(16, 24)]
    finish(1)
    finish(3)
    again = open_run(tree)  # a resumed run
    assert again.epoch_indices(0).tolist() == list(range(16, 24))
    assert all((a == b).all() for a, b in zip(again.moments("third"), moments, strict=True))
    assert len(again.epoch_indices(1)) == 16
    assert len(again.epoch_indices(2)) == 32
    file = Path(three["output_dir"]) / "epoch-snapshots.jsonl"
    recorded = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(record["epoch"], record["built"], record["total"]) for record in recorded] == [
        (0, 1, 4),
        (1, 2, 4),
        (2, 4, 4),
    ]
    found = list(loader_of(tree, again, stop=7))  # 1 + 2 + 4 steps: epochs 0, 1, 2
    assert [len(batch) for batch in found] == [8] * 7
    fewer = three | {"data": three["data"] | {"tars": [str(tar) for tar in tars[1:]]}}
    with pytest.raises(ConfigError, match=r"epoch 1 was begun with 1 tars that data\.tars no longer names"):
        open_run(fewer | {"global_batch_size": 8}).epoch_indices(1)


def test_wait_waits_until_all_tars_are_built(
    three: dict[str, Any], growing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, cache, finish = growing
    todo, looks = [0, 1, 2, 3], []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        finish(todo.pop())

    monkeypatch.setattr("threetowers.trainer.data.epoch_snapshot.time.sleep", sleep)
    three["data"] |= {"tars": [str(tar) for tar in tars], "on_incomplete_cache": "wait"}
    three["towers"]["third"]["path"] = str(cache)
    samples = open_run(three)
    assert len(looks) == 4
    assert len(samples.epoch_indices(0)) == 32
    assert not (Path(three["output_dir"]) / "epoch-snapshots.jsonl").exists()


def check_snapshots(rank: int, store: str, folder: str, tars: list[Path], cache: Path) -> None:
    """Rank 1 finds more tars built than rank 0, whose tars count."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    join = ImageJoin(cache, [index_tar(tar) for tar in tars], allow_incomplete=True)
    if rank == 1:
        join.built = lambda: np.ones(4, np.bool_)  # type: ignore[method-assign]
    snapshots = EpochSnapshots(Path(folder) / "snapshots.jsonl", [join], 8)
    assert [snapshots.tar_numbers(epoch) for epoch in (0, 1, 0)] == [[1, 3], [1, 3], [1, 3]]
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_agree_on_the_tars_of_an_epoch(growing: Any, tmp_path: Path) -> None:
    tars, cache, finish = growing
    finish(3)
    finish(1)
    torch.multiprocessing.spawn(
        check_snapshots, args=(str(tmp_path / "store"), str(tmp_path / "run"), tars, cache), nprocs=2
    )


@pytest.mark.distributed
def test_a_masked_run_is_the_same_on_two_ranks(three: dict[str, Any], gap: Any, tmp_path: Path) -> None:
    """Two of twelve samples have no row; the loss does not depend on the ranks that they fall to."""
    tar, cache = gap(Views())
    tree = with_cache(three, tar, cache, on_missing_row="mask", standardize="none")
    tree["data"]["on_bad"] = "skip"
    outs = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        file = tmp_path / f"{ranks}.yaml"
        file.write_text(yaml.safe_dump(tree | {"output_dir": str(out), "duration": {"steps": 4}}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *launcher, "-m", "threetowers", "train", str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr[-5000:]
        assert "without a row: 2, left out of the terms with 'third'" in result.stdout + result.stderr
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        outs.append([[line["loss"], line["terms/image-third/loss"], line["terms/image-text/loss"]] for line in lines])
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-3)


@pytest.mark.parametrize("policy", ["skip", "mask", "live"])
@pytest.mark.parametrize("views", [Views("center+flip"), CROPS])
def test_sequential_and_random_access_give_equal_samples(
    three: dict[str, Any], gap: Any, weights: str, policy: str, views: Views
) -> None:
    """Compare images of the stored view, captions, rows, missing rows and groups, sample by sample."""
    tar, cache = gap(views)
    tree = with_cache(three, tar, cache, on_missing_row=policy, weights=weights)
    samples = open_run(tree)
    reader = TrainingSampleReader(parse(tree), samples)
    for epoch in range(views.count):
        segment = StreamSegment(epoch, samples.epoch_indices(epoch), 0)
        streamed = list(read_segment(samples, segment, 4, np.random.default_rng(epoch), read_ahead=8))
        assert sorted(found.visit.index for found in streamed) == segment.indices.tolist()
        for found in streamed:
            members, rows = found.members.__getitem__, found.rows.__getitem__
            try:
                expected = reader.read(epoch, found.visit.index)
            except BadSample as error:
                message = str(error).partition(" 0x")[0]  # Pillow names a buffer
                with pytest.raises(BadSample, match=re.escape(message)):
                    reader.prepare(found.visit, members, rows)
                continue
            sample = reader.prepare(found.visit, members, rows)
            assert isinstance(sample.image, torch.Tensor)
            assert isinstance(expected.image, torch.Tensor)
            assert sample.image.equal(expected.image)
            assert (sample.captions, sample.group) == (expected.captions, expected.group)
            for row, other in zip(sample.rows.values(), expected.rows.values(), strict=True):
                assert (row is None) == (other is None)
                assert row is None or (row == other).all()


def test_streams_visit_the_tars_that_were_built_when_their_epoch_began(
    three: dict[str, Any], growing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars, cache, finish = growing
    monkeypatch.setattr(epoch_snapshot, "POLL_SECONDS", 0.01)
    three["data"] |= {"tars": [str(tar) for tar in tars], "on_incomplete_cache": "skip", "group_field": None}
    three["data"] |= {"access": "sequential", "num_streams": 2, "shuffle_buffer": 6, "workers": 1}
    three["towers"]["third"]["path"] = str(cache)
    tree = three | {"global_batch_size": 8}
    finish(2)
    samples = open_run(tree)
    loader = loader_of(tree, samples, stop=7)
    samples.epoch_indices(0)
    for tar in (0, 1, 3):
        finish(tar)
    whole = [batch.groups_b for batch in loader]  # one step of tar 2, then epochs of 4 steps of all
    assert len(set(whole[0].tolist())) == 8
    assert len(set(torch.cat(whole[1:5]).tolist())) == 32
    again = loader_of(tree, open_run(tree), start=3, stop=7)
    for batch, expected in zip(again, whole[3:], strict=True):
        assert batch.groups_b.equal(expected)

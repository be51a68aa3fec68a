"""Mixtures of data sets in one run: their samples in each batch, their epochs, groups and caches; the kept index."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import samples_of, write_tar
from tests.trainer.loading import load_batches, loader_of, open_run
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data import tar_headers
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.data.joins.tar_groups import group_hash
from threetowers.trainer.data.mixture import batch_layout, samples_per_batch
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.tar_headers import index_datasets


@pytest.fixture
def other(tmp_path: Path) -> list[Path]:
    """Two tars of 9 and 13 samples that no cache holds, by fingerprint or by name."""
    return [write_tar(tmp_path / f"{i}.tar", samples_of(100 + 9 * i, 9 + 4 * i)) for i in range(2)]


def mix(tree: dict[str, Any], tars: list[Path], other: list[Path], **data: Any) -> dict[str, Any]:
    """Twice as many samples of `tars` (45) as of `other` (22): 8 and 4 of 12."""
    sets = {
        "main": {"tars": [str(tar) for tar in tars], "weight": 1.0},
        "other": {"tars": [str(tar) for tar in other], "weight": 0.5},
    }
    return tree | {"data": tree["data"] | {"tars": [], "datasets": sets} | data}


def load(tree: dict[str, Any], stop: int = 6) -> tuple[SampleSet, list[Batch]]:
    samples = open_run(tree)
    return samples, list(loader_of(tree, samples, stop=stop))


SEQUENTIAL = {"access": "sequential", "num_streams": 4, "shuffle_buffer": 20}


@pytest.mark.parametrize("access", [{}, SEQUENTIAL], ids=["random", "sequential"])
def test_each_data_set_has_its_part_of_every_batch_and_its_own_epochs(
    clip: dict[str, Any], tars: list[Path], other: list[Path], access: dict[str, Any]
) -> None:
    clip["data"]["group_field"] = None
    samples, found = load(mix(clip, tars, other, **access), stop=10)
    assert len(samples) == samples.total == 67
    (first, *_), (second, *_) = samples.components[0].tars, samples.components[1].tars
    assert (first, second) == (0, 2)
    of_main = {group_hash(f"{tar}:{i}") for tar, size in zip(tars, (25, 20), strict=True) for i in range(size)}
    main = [[c for c in batch.groups_b.tolist() if c in of_main] for batch in found]
    rest = [[c for c in batch.groups_b.tolist() if c not in of_main] for batch in found]
    assert {len(part) for part in main} == {8}
    for start in (0, 5):  # epochs of 5 full parts of 8, of 45
        assert len({c for part in main[start : start + 5] for c in part}) == 40
        assert len({c for part in rest[start : start + 5] for c in part}) == 20  # 5 full parts of 4, of 22
    for ranks, starts in ((2, (0, 3)), (4, (6,))):
        for start in starts:
            parts = [
                load_batches(mix(clip, tars, other, **access), rank, ranks, start, stop=10) for rank in range(ranks)
            ]
            for step, batch in enumerate(found[start:]):
                assert torch.cat([part[step].groups_b for part in parts]).equal(batch.groups_b)
                assert torch.cat([part[step].inputs["image"] for part in parts]).equal(batch.inputs["image"])


def test_each_data_set_can_have_its_own_group_field(clip: dict[str, Any], tars: list[Path], other: list[Path]) -> None:
    tree = mix(clip, tars, other)
    tree["data"] |= {"group_field": None}
    tree["data"]["datasets"]["other"]["group_field"] = "concept"
    _, found = load(tree, stop=5)
    counts = np.unique(np.concatenate([batch.groups_b.numpy() for batch in found]), return_counts=True)[1]
    assert len(counts) > 40  # each of the 40 of main its own, 20 combinations among the others at most
    tree["data"]["datasets"]["other"]["group_field"] = "kind"  # which no sample has: each is its own group
    _, (batch,) = load(tree, stop=1)
    assert batch.bad == ()
    assert len(set(batch.groups_b.tolist())) == 12
    assert batch.notes == ("group_field: no value",) * 4


def test_a_cache_of_one_data_set_lacks_the_rows_of_the_other(
    three: dict[str, Any], tars: list[Path], other: list[Path], tmp_path: Path
) -> None:
    """The tower's on_missing_row decides about all samples of a data set that the cache does not hold."""
    with pytest.raises(ManifestError, match=r"0\.tar: not among the 2 tars of this cache"):
        load(mix(three, tars, other))
    three["towers"]["third"]["on_missing_row"] = "mask"
    for access in ({}, SEQUENTIAL):
        samples, found = load(mix(three, tars, other, **access))
        assert samples.without_row == {"left out of the terms with 'third'": 22}
        for batch in found:
            present = batch.present["third"]
            assert int(present.sum()) == 8
            assert (batch.inputs["third"][~present] == 0).all()
            assert (batch.inputs["third"][present] != 0).any(1).all()
    three["towers"]["third"]["on_missing_row"] = "skip"
    with pytest.raises(
        ConfigError, match=r"data\.datasets\.other: a batch of 4 needs at least 4 samples, the tars hold 0"
    ):
        load(mix(three, tars, other))
    three["towers"]["third"]["on_missing_row"] = "mask"
    three["data"]["tars"] = [str(tar) for tar in other]  # the only set: a wrong path, no gap
    with pytest.raises(ManifestError, match="not among the 2 tars"):
        load(three)


def test_the_startup_page_and_the_metrics_report_the_mixture(
    clip: dict[str, Any], tars: list[Path], other: list[Path]
) -> None:
    samples, _ = load(mix(clip, tars, other), stop=0)
    assert samples.notes() == [
        "data set main: 8 of each batch of 12, from 45 usable samples in 2 tars",
        "data set other: 4 of each batch of 12, from 22 usable samples in 2 tars",
    ]
    assert samples.mixture_metrics(10) == {
        "datasets/main/samples": 80,
        "datasets/main/epoch": 2,
        "datasets/other/samples": 40,
        "datasets/other/epoch": 2,
    }
    assert load(clip, stop=0)[0].notes() == []


def test_weights_are_rounded_to_a_full_batch() -> None:
    assert samples_per_batch([1], 7) == [7]
    assert samples_per_batch([2, 1], 12) == [8, 4]
    assert samples_per_batch([1, 1, 1], 256) == [86, 85, 85]
    assert samples_per_batch([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    with pytest.raises(
        ValueError, match=r"number 2 has no sample in a global batch of 10, as its weight is 1 among \[1000, 1\]"
    ):
        samples_per_batch([1000, 1], 10)


def test_every_part_of_a_batch_has_about_the_same_mixture() -> None:
    for counts in ([12], [8, 4], [7, 3, 2], [1, 11], [86, 85, 85]):
        found, batch = batch_layout(counts), sum(counts)
        assert np.bincount(found).tolist() == counts
        for part in np.array_split(found, 4):
            for number, count in enumerate(counts):
                assert abs((part == number).sum() - count * len(part) / batch) < 2


def test_faulty_mixtures_are_refused(clip: dict[str, Any], tars: list[Path], other: list[Path]) -> None:
    tree = mix(clip, tars, other)
    with pytest.raises(ConfigError, match="tars and datasets are both given"):
        parse(tree | {"data": tree["data"] | {"tars": ["x.tar"]}})
    tree["data"]["datasets"]["other"]["tars"] = []
    with pytest.raises(ConfigError, match=r"data\.datasets\.other\.tars: expected at least one tar"):
        parse(tree)
    tree["data"]["datasets"]["other"]["weight"] = 0
    with pytest.raises(ConfigError, match=r"sets\.other\.weight"):
        parse(tree)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_kept_index_is_used_until_the_tar_changes(
    tars: list[Path], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = str(tmp_path / "index") if where == "folder" else f"memory://{tmp_path.name}/index"
    copies = [Path(shutil.copy(tar, tmp_path)) for tar in tars]
    patterns = {"": [str(tar) for tar in copies]}
    fresh = index_datasets(patterns, kept)
    opened: list[str] = []

    def spied(path: str, image_member: str | None) -> TarIndex:
        opened.append(path)
        return index_tar(path, image_member=image_member)

    monkeypatch.setattr(tar_headers, "index_tar", spied)
    again = index_datasets(patterns, kept)
    assert opened == []
    assert again.tar_numbers == {"": range(2)}
    for one, other in zip(fresh.tars, again.tars, strict=True):
        assert (one.location, one.size, one.fingerprint, one.ignored) == (
            other.location,
            other.size,
            other.fingerprint,
            other.ignored,
        )
        assert list(one.samples) == list(other.samples)
    write_tar(copies[1], samples_of(7, 5))  # packed again
    changed = index_datasets(patterns, kept)
    assert opened == [str(copies[1])]
    assert [sample.key for sample in changed.tars[1].samples] == [f"s{i:04d}" for i in range(7, 12)]
    storage = open_storage(kept)
    for name in storage.listdir():
        if name.endswith(".npz"):
            storage.put(name, storage.read(name)[:50], owner="test")
    assert len(index_datasets(patterns, kept).tars) == 2  # damaged: read again
    assert len(opened) == 3


def share_the_index(rank: int, store: str, patterns: dict[str, list[str]], bad: str) -> None:
    import torch.distributed as dist

    from threetowers.cache.webdataset.tar_headers import BadTar
    from threetowers.cache.webdataset.tar_index import index_tar
    from threetowers.cache.webdataset.tar_patterns import expand

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    alone = [index_tar(path) for part in patterns.values() for path in expand(part)]
    tars, ranges, _ = index_datasets(patterns)
    assert [(tar.location, tar.fingerprint) for tar in tars] == [(tar.location, tar.fingerprint) for tar in alone]
    assert [list(tar.samples) for tar in tars] == [list(tar.samples) for tar in alone]
    assert ranges == {"main": range(2), "other": range(2, 4)}
    with pytest.raises(BadTar, match="bad"):  # on both, though one of them reads it
        index_datasets({"bad": [*patterns["main"], bad]})
    with pytest.raises(ValueError, match="matches no file"):
        index_datasets({"none": ["nowhere-*.tar"]})
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_share_the_indexing(tars: list[Path], other: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    bad.write_bytes(tars[0].read_bytes()[:-20000])
    patterns = {"main": [str(tar) for tar in tars], "other": [str(tar) for tar in other]}
    torch.multiprocessing.spawn(share_the_index, args=(str(tmp_path / "store"), patterns, str(bad)), nprocs=2)

"""Batches of rows alone against the samples that are read one by one: the same rows, draws and bad samples."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_tar
from tests.trainer.loading import load_batches, loader_of, open_run, same
from tests.trainer.text_runs import build_images, build_text, captioned, run_of, sharelock, towers_of, write_tars
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.views import Views
from threetowers.cache.processes.world import World
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar
from threetowers.trainer.config import parse
from threetowers.trainer.data import loader
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.data.joins import tar_groups
from threetowers.trainer.data.joins.tar_groups import TarGroups
from threetowers.trainer.data.loader import TrainingSampleReader
from threetowers.trainer.data.row_batches import RowReader, is_rows_alone

VIEWS = Views("crops:2", seed=3, scale=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("row-batches")


@pytest.fixture(scope="module")
def own_tars(folder: Path) -> list[Path]:
    return write_tars(folder / "tars")


@pytest.fixture(scope="module")
def caches(folder: Path, own_tars: list[Path]) -> dict[str, Path]:
    """Caches of all sides: of views, of text with all rows, and of text with gaps and the sources in another order."""
    build_cache(
        BuildConfig(
            tars=[str(tar) for tar in own_tars],
            output_dir=folder / "views",
            encoder="test:pair",
            views=VIEWS,
            device="cpu",
        )
    )
    return {
        "image": folder / "views",
        "text": build_text(folder, own_tars),
        "text_gap": build_text(
            folder, own_tars, "gap", sources=("json.alt", "txt"), dtype="float32", left_out=(0, 3, 6, 19)
        ),
    }


@pytest.fixture
def both(clip: dict[str, Any], own_tars: list[Path], caches: dict[str, Path]) -> dict[str, Any]:
    """A run on three caches, one of which lacks some rows."""
    tree = sharelock(run_of(clip, own_tars), caches["image"], caches["text"])
    tree["towers"] |= towers_of(text_gap=caches["text_gap"])
    tree["towers"]["text_gap"]["on_missing_row"] = "mask"
    tree["heads"] |= {"t": {"of": "text_gap"}}
    tree["terms"] = tree["terms"] | {"third": {"x": "f", "y": "t"}}
    return tree


def assert_holds(batch: Batch, epochs: list[int], tree: dict[str, Any]) -> None:
    """Check the samples of a batch, which it names by their groups, against those that are read one by one."""
    samples = open_run(tree)
    reader = TrainingSampleReader(parse(tree), samples)
    assert len(batch) == len(epochs)
    for at, index in enumerate(batch.groups_b.tolist()):
        sample = reader.read(epochs[at], index)
        for tower, row in sample.rows.items():
            expected = np.zeros(samples.caches[tower].cache.dim) if row is None else row
            assert np.array_equal(batch.inputs[tower][at].numpy(), expected.reshape(-1)), (tower, index)
            if tower in batch.present:
                assert bool(batch.present[tower][at]) == (row is not None)


def test_random_access_gives_the_rows_of_single_samples(both: dict[str, Any]) -> None:
    """Visits of several epochs and tars, of which one is asked for twice."""
    samples = open_run(both)
    assert is_rows_alone(samples)
    rng = np.random.default_rng(0)
    addresses = [(int(epoch), int(index)) for epoch, index in rng.integers((4, 45), size=(90, 2))]
    batch = RowReader(samples).read([*addresses, addresses[0]])
    assert batch.groups_b.tolist() == [index for _, index in [*addresses, addresses[0]]]
    assert_holds(batch, [epoch for epoch, _ in [*addresses, addresses[0]]], both)
    assert 0 < int(batch.present["text_gap"].sum()) < 91


@pytest.mark.parametrize("streams", [1, 3, 4])
def test_sequential_access_gives_the_rows_of_single_samples(both: dict[str, Any], streams: int) -> None:
    both["data"] |= {"access": "sequential", "num_streams": streams, "shuffle_buffer": 16}
    found = load_batches(both, stop=9)
    for first in (0, 3, 6):
        epoch = found[first : first + 3]
        assert len({index for batch in epoch for index in batch.groups_b.tolist()}) == 36
        for batch in epoch:
            assert_holds(batch, [first // 3] * 12, both)


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_batches_are_those_of_the_loader_of_single_samples(
    both: dict[str, Any], access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples in the same order, also of a mixture whose parts draw from some of the sources."""
    tars = both["data"].pop("tars")
    both["data"] |= {
        "datasets": {
            "a": {"tars": tars[:1], "weight": 2, "captions": {"json.alt": 1.0}},
            "b": {"tars": tars[1:], "captions": {"json.alt": 1.0, "txt": 2.0}},
        },
        "access": access,
        "shuffle_buffer": 12,
        "on_bad": "skip",
    }
    found = load_batches(both, stop=7)
    monkeypatch.setattr(loader, "is_rows_alone", lambda samples: False)
    expected = load_batches(both, stop=7)
    assert any(batch.bad for batch in expected)
    for one, other in zip(found, expected, strict=True):
        assert sorted(one.bad) == sorted(other.bad)
        assert one.reasons == other.reasons
        for name, tensor in other.inputs.items():
            assert one.inputs[name].equal(tensor)
        for name, tensor in other.present.items():
            assert one.present[name].equal(tensor)
        assert len(one.groups_b.unique()) == len(other.groups_b.unique())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("access", "workers"), [("random", 2), ("sequential", 0), ("sequential", 2)])
def test_ranks_workers_and_resume_do_not_change_the_rows(both: dict[str, Any], access: str, workers: int) -> None:
    both["data"] |= {"access": access, "num_streams": 4, "shuffle_buffer": 16}
    whole = load_batches(both, stop=7)
    both["data"]["workers"] = workers
    parts = [load_batches(both, rank, 2, start=2, stop=7) for rank in range(2)]
    for step, batch in enumerate(whole[2:]):
        for name, tensor in batch.inputs.items():
            assert torch.cat([part[step].inputs[name] for part in parts]).equal(tensor), (step, name)


def test_remote_caches_give_the_rows_of_local_ones(both: dict[str, Any], caches: dict[str, Path], folder: Path) -> None:
    both["data"] |= {"access": "sequential", "num_streams": 2, "shuffle_buffer": 16}
    local = load_batches(both, stop=4)
    for name, path in caches.items():
        remote = f"memory://{folder.name}/{name}"
        for file in (file for file in path.rglob("*") if file.is_file()):
            open_storage(remote).put(file.relative_to(path).as_posix(), file.read_bytes(), owner="test")
        both["towers"][name]["path"] = remote
    for one, other in zip(load_batches(both, stop=4), local, strict=True):
        assert all(one.inputs[name].equal(tensor) for name, tensor in other.inputs.items())


def test_a_batch_without_a_usable_sample_is_empty(both: dict[str, Any]) -> None:
    both["data"]["captions"] = {"json.alt": 1.0}
    batch = RowReader(open_run(both)).read([(0, 0), (0, 3), (1, 30)])
    assert (len(batch), batch.inputs, len(batch.bad)) == (0, {}, 3)
    assert set(batch.reasons) == {"no caption"}
    with pytest.raises(BadSample, match="no caption in the cache"):
        TrainingSampleReader(parse(both), open_run(both)).read(0, 3)


def test_what_is_not_rows_alone_is_read_sample_by_sample(both: dict[str, Any]) -> None:
    both["towers"]["text_gap"]["on_missing_row"] = "live"
    for field in (None, "concept"):
        both["data"]["group_field"] = field
        samples = open_run(both)
        assert not is_rows_alone(samples)
        assert not samples.groups


@pytest.fixture(scope="module")
def grouped_tars(folder: Path) -> list[Path]:
    """Tars in which some samples have no group, or a bad one, or a json member that cannot be read."""
    samples = captioned(0, 45)
    for number, concept in ((3, ["red"]), (4, {"of": 1}), (8, None), (26, " "), (31, 7), (40, [])):
        fields = json.loads(samples[number][1]["json"]) | {"concept": concept}
        samples[number][1]["json"] = json.dumps(fields).encode()
    samples[12][1]["json"] = b"{"
    del samples[30][1]["json"]
    where = folder / "grouped"
    where.mkdir()
    return [write_tar(where / "a.tar", samples[:25]), write_tar(where / "b.tar", samples[25:])]


@pytest.fixture
def grouped(clip: dict[str, Any], grouped_tars: list[Path], tmp_path: Path) -> dict[str, Any]:
    """A run on rows alone, with groups, of which the tars are its own."""
    tars = [Path(shutil.copy(tar, tmp_path)) for tar in grouped_tars]
    text, images = build_text(tmp_path, tars), build_images(tmp_path, tars)
    tree = sharelock(run_of(clip, tars, {"json.alt": 3.0, "txt": 1.0}), images, text)
    tree["data"] |= {"group_field": "concept", "on_bad": "skip"}
    return tree


@pytest.mark.parametrize("access", ["random", "sequential"])
@pytest.mark.parametrize("captions", [{"json.alt": 3.0, "txt": 1.0}, {"json.alt": 1.0}])
def test_groups_are_those_of_single_samples_and_steps_open_no_tar(
    grouped: dict[str, Any], captions: dict[str, float], access: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups, bad samples and notes; without a caption, that is what a sample is bad for."""
    grouped["data"] |= {"access": access, "captions": captions, "num_streams": 4 if access == "sequential" else None}
    with monkeypatch.context() as patch:
        patch.setattr(loader, "is_rows_alone", lambda samples: False)
        expected = load_batches(grouped, stop=9)
    samples = open_run(grouped)
    assert is_rows_alone(samples)
    for tar in samples.tars:
        Path(tar.location).unlink()
    found = list(loader_of(grouped, samples, stop=9))
    for one, other in zip(found, expected, strict=True):
        assert same(one, other)
        assert one.reasons == other.reasons
        assert one.notes == other.notes
    reasons = Counter(reason for batch in found for reason in batch.reasons)
    assert reasons["group_field: a list or an object"] > 0
    assert ("no caption" in reasons) == (captions == {"json.alt": 1.0})
    notes = {note for batch in found for note in batch.notes}
    assert notes == {"group_field: no value"} | ({"json: not JSON"} if len(captions) > 1 else set())
    assert max(len(batch) - len(batch.groups_b.unique()) for batch in found) > 0


def test_groups_are_kept_with_the_index(
    grouped: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the tar or the field changes, or what is kept is damaged."""
    read: list[str] = []
    real = TarGroups.read

    def counted(tar: TarIndex, field: str) -> TarGroups:
        read.append(f"{tar.name} {field}")
        return real(tar, field)

    def open_again(field: str) -> tuple[list[str], dict[int, TarGroups]]:
        grouped["data"] |= {"index_dir": str(tmp_path / "index"), "group_field": field}
        read.clear()
        samples = open_run(grouped)
        return sorted(read), samples.groups

    monkeypatch.setattr(TarGroups, "read", counted)
    names, first = open_again("concept")
    assert names == ["a.tar concept", "b.tar concept"]
    names, again = open_again("concept")
    assert names == []
    for number in (0, 1):
        assert np.array_equal(again[number].hash_n, first[number].hash_n)
        assert np.array_equal(again[number].note_n, first[number].note_n)
        assert again[number].notes == first[number].notes
        assert again[number].bad == first[number].bad
    assert first[0].bad.keys() == {3, 4}
    assert open_again("alt")[0] == ["a.tar alt", "b.tar alt"]
    tar = Path(grouped["data"]["tars"][1])
    os.utime(tar, (1, 1))
    assert open_again("concept")[0] == ["b.tar concept"]
    for file in (tmp_path / "index").glob("*-groups.npz"):
        file.write_bytes(file.read_bytes()[:200])
    assert open_again("concept")[0] == ["a.tar concept", "b.tar concept"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_reading_of_groups(
    grouped_tars: list[Path], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = [index_tar(tar) for tar in [*grouped_tars, *grouped_tars]]
    fields = ["concept", None, "alt", "concept"]
    by_rank: list[Any] = []

    class GatheredError(Exception):
        pass

    def gather(compute: Callable[[], Any]) -> list[Any]:
        if len(by_rank) < ranks:
            by_rank.append(compute())
            raise GatheredError
        return by_rank

    monkeypatch.setattr(tar_groups, "gather_from_ranks", gather)
    for rank in range(ranks):
        monkeypatch.setattr(World, "from_process_group", partial(World, rank, ranks, 0, 1))
        with pytest.raises(GatheredError):
            tar_groups.read_groups(tars, fields)
    assert sum(map(len, by_rank)) == 3
    found = tar_groups.read_groups(tars, fields)
    assert found.keys() == {0, 2, 3}
    for number, groups in found.items():
        field = fields[number]
        assert field is not None
        expected = TarGroups.read(tars[number], field)
        assert np.array_equal(groups.hash_n, expected.hash_n)
        assert groups.bad == expected.bad


def test_samples_of_other_keys_are_refused(both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_run(both)
    monkeypatch.setattr(type(samples.tars[0].samples), "key", lambda self, ordinal: f"other{ordinal}")
    with pytest.raises(ManifestError, match="have other keys than those that were embedded"):
        RowReader(samples).read([(0, 3)])


def test_images_of_one_view(clip: dict[str, Any], own_tars: list[Path], folder: Path, caches: dict[str, Path]) -> None:
    tree = sharelock(run_of(clip, own_tars), build_images(folder, own_tars), caches["text"])
    assert_holds(RowReader(open_run(tree)).read([(3, 5), (3, 44)]), [3, 3], tree)

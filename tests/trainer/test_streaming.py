"""Sequential access: each sample once an epoch, the same on any layout of ranks and workers, resumed at any step."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from tests.conftest import samples_of, write_tar
from tests.trainer.launches import metric, run_jobs, write_config
from tests.trainer.loading import load_batches, loader_of, open_run
from threetowers.cache.processes.worker_processes import start_method
from threetowers.cache.webdataset.sample_stream import stream_samples
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data import streaming
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.data.joins.tar_groups import group_hash
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.streaming import (
    StreamSegment,
    default_streams,
    read_segment,
    shuffle_buffer_order,
    tar_order,
)

SIZES = (25, 7, 19, 1, 13, 31)  # 96 samples: 8 steps of 12


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, starts = tmp_path_factory.mktemp("uneven"), np.cumsum((0, *SIZES)).tolist()
    return [
        write_tar(folder / f"{i}.tar", samples_of(start, size))
        for i, (start, size) in enumerate(zip(starts, SIZES, strict=False))
    ]


@pytest.fixture
def streamed(clip: dict[str, Any], uneven: list[Path]) -> dict[str, Any]:
    """A CLIP run on the uneven tars, each sample its own group, read in four streams."""
    clip["data"] |= {
        "tars": [str(tar) for tar in uneven],
        "access": "sequential",
        "num_streams": 4,
        "shuffle_buffer": 24,
    }
    clip["data"]["group_field"] = None
    return clip


def groups(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.groups_b for batch in batches]).tolist()


def test_each_sample_is_visited_once_an_epoch(streamed: dict[str, Any]) -> None:
    found = load_batches(streamed, stop=24)
    epochs = [groups(found[i : i + 8]) for i in (0, 8, 16)]
    assert [len(set(epoch)) for epoch in epochs] == [96] * 3
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    streamed["global_batch_size"] = 28  # 3 steps of 28: 12 samples are left over, others in each epoch
    parts = [groups(load_batches(streamed, start=i, stop=i + 3)) for i in (0, 3)]
    assert [len(set(part)) for part in parts] == [84, 84]
    assert set(parts[0]) != set(parts[1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # as many workers as it takes, on any machine
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (4, 1)])
def test_ranks_workers_and_resume_do_not_change_the_samples(streamed: dict[str, Any], ranks: int, workers: int) -> None:
    whole = load_batches(streamed, stop=11)
    streamed["data"]["workers"] = workers
    for start in (0, 5, 9):  # 9: in the second epoch
        parts = [load_batches(streamed, rank, ranks, start, stop=11) for rank in range(ranks)]
        for step, batch in enumerate(whole[start:]):
            for name, tensor in batch.inputs.items():
                assert torch.cat([part[step].inputs[name] for part in parts]).equal(tensor), (start, step, name)
            assert torch.cat([part[step].groups_b for part in parts]).equal(batch.groups_b)


def test_streams_that_ranks_or_batch_do_not_divide_are_refused(streamed: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match="4 streams cannot be divided among 3 ranks; start a number of ranks that div"
    ):
        load_batches(streamed, 0, 3, stop=8)
    with pytest.raises(ConfigError, match=r"data\.num_streams: 5 does not divide global_batch_size 12"):
        parse(streamed | {"data": streamed["data"] | {"num_streams": 5}})


@pytest.mark.parametrize(
    ("batch", "tars", "expected"),
    [
        (12, 6, 12),
        (256, 7, 64),
        (4096, 1200, 512),
        (4096, 200, 128),
        (6144, 1200, 384),  # which 24 ranks divide, as they do the batch
        (16_384 + 1, 5000, 145),  # of 5 x 29 x 113
        (10_007, 5000, 1),  # a prime
        (1, 1, 1),
    ],
)
def test_streams_by_default(batch: int, tars: int, expected: int) -> None:
    assert default_streams(batch, tars) == expected
    assert batch % expected == 0


def test_streams_by_default_serve_all_ranks_that_divide_the_batch(streamed: dict[str, Any]) -> None:
    del streamed["data"]["num_streams"]
    whole = load_batches(streamed, stop=9)
    assert len(set(groups(whole[:8]))) == 96
    for ranks in (3, 12):
        parts = [load_batches(streamed, rank, ranks, stop=9) for rank in range(ranks)]
        for step, batch in enumerate(whole):
            assert torch.cat([part[step].groups_b for part in parts]).equal(batch.groups_b)


def test_the_order_is_that_of_a_plain_shuffle_buffer() -> None:
    """Compare with a buffer that really holds its samples, and bound how far a sample moves."""

    def slow(samples: int, buffer: int, rng: np.random.Generator) -> list[int]:
        arriving, held, order = iter(range(samples)), [], []
        slots = iter(rng.integers(0, buffer, max(0, samples - buffer)).tolist())
        for sample in arriving:
            if len(held) < buffer:
                held.append(sample)
            else:
                slot = next(slots)
                order.append(held[slot])
                held[slot] = sample
        return [*order, *(held[i] for i in rng.permutation(len(held)))]

    for samples, buffer in ((0, 3), (2, 5), (5, 5), (40, 1), (97, 10), (500, 64)):
        fast = shuffle_buffer_order(samples, buffer, np.random.default_rng(3))
        assert fast.tolist() == slow(samples, buffer, np.random.default_rng(3))
        assert sorted(fast.tolist()) == list(range(samples))
        assert (fast < np.arange(samples) + buffer).all()
    assert shuffle_buffer_order(40, 1, np.random.default_rng(0)).tolist() == list(range(40))


def test_tars_stay_whole_and_each_epoch_has_its_own_order_of_them() -> None:
    tars = np.repeat([3, 5, 8, 9], [4, 1, 6, 2])
    found = [tar_order(0, epoch, np.arange(100, 113), tars) for epoch in range(6)]
    for order in found:
        assert sorted(order.tolist()) == list(range(100, 113))
        runs = np.split(order, np.flatnonzero(np.diff(tars[order - 100])) + 1)
        assert len(runs) == 4
        assert all((np.diff(run) == 1).all() for run in runs)
    assert len({tuple(order) for order in found}) > 3


def test_undecoded_samples_in_memory_are_bounded_by_the_buffer(
    streamed: dict[str, Any], monkeypatch: pytest.MonkeyPatch, uneven: list[Path]
) -> None:
    """Samples read but not yielded are at most the buffer, those read ahead and two on their way."""
    arrived: list[int] = []
    read_tars = streaming._read_tars

    def counted(*arguments: Any) -> Any:
        for found in read_tars(*arguments):
            arrived.append(found.visit.index)
            yield found

    monkeypatch.setattr(streaming, "_read_tars", counted)
    samples = SampleSet([index_tar(tar) for tar in uneven], {})
    segment = StreamSegment(0, np.arange(90), 0)
    for given, _ in enumerate(read_segment(samples, segment, 10, np.random.default_rng(0), 3), start=1):
        assert len(arrived) - given <= 10 + 3 + 2
    assert arrived == list(range(90))


def test_a_resumed_stream_opens_no_tar_that_is_done(uneven: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    samples = SampleSet([index_tar(tar) for tar in uneven], {})
    rng = lambda: np.random.default_rng(5)  # noqa: E731
    whole = [found.visit.index for found in read_segment(samples, StreamSegment(0, np.arange(96), 0), 8, rng(), 64)]
    opened: list[tuple[str, int]] = []

    def spied(tar: Any, first: int, extensions: Any) -> Any:
        opened.append((tar.name, first))
        return stream_samples(tar, first, extensions)

    monkeypatch.setattr(streaming, "stream_samples", spied)
    rest = [found.visit.index for found in read_segment(samples, StreamSegment(0, np.arange(96), 70), 8, rng(), 64)]
    assert rest == whole[70:]
    first = min(rest)
    starts = np.cumsum((0, *SIZES)).tolist()
    begun = int(np.searchsorted(starts, first, "right")) - 1
    assert begun > 1
    assert opened[0] == (f"{begun}.tar", first - starts[begun])
    assert [name for name, _ in opened] == [f"{i}.tar" for i in range(begun, 6)]


def test_a_tar_is_read_from_any_sample_on(tmp_path: Path) -> None:
    samples = samples_of(0, 6)
    for number in (1, 4):  # names that need headers of their own, and members that are not read
        key, members = samples[number]
        samples[number] = "long/" + "x" * 180 + f"/{key}", members | {"npy": b"n" * 700}
    tar = index_tar(write_tar(tmp_path / "t.tar", samples))
    for first in range(6):
        found = list(stream_samples(tar, first))
        assert [ordinal for ordinal, _ in found] == list(range(first, 6))
        for ordinal, members in found:
            expected = {name: data for name, data in samples[ordinal][1].items() if name != "npy"}
            assert members == expected


def test_an_error_in_a_worker_names_the_changed_tar_without_a_traceback(
    streamed: dict[str, Any], uneven: list[Path], tmp_path: Path
) -> None:
    tars = [Path(shutil.copy(tar, tmp_path)) for tar in uneven]
    streamed["data"] |= {"tars": [str(tar) for tar in tars], "workers": 1}
    samples = open_run(streamed)
    write_tar(tars[5], samples_of(0, 31))
    with pytest.raises(BadTar, match=r"5\.tar: .*the tar has changed since it was indexed") as error:
        list(loader_of(streamed, samples, stop=8))
    assert "Traceback" not in str(error.value)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_bad_samples_are_named_under_sequential_access(streamed: dict[str, Any], tmp_path: Path) -> None:
    samples = samples_of(0, 12)
    samples[4][1]["png"] = samples[4][1]["png"][:60]
    streamed["data"] |= {"tars": [str(write_tar(tmp_path / "bad.tar", samples))], "workers": 4}
    (batch,) = load_batches(streamed, stop=1)
    assert len(batch) == len(batch.inputs["image"]) == 11
    assert ["bad.tar: sample 's0004': " in reason for reason in batch.bad] == [True]


@pytest.fixture(params=["memory", "file", "s3"])
def remote(request: pytest.FixtureRequest, uneven: list[Path], tmp_path: Path) -> Callable[[], str]:
    """put(): copy the uneven tars to another storage and return the pattern that names them."""

    def put() -> str:
        if request.param == "file":
            return f"file://{uneven[0].parent}/{{0..5}}.tar"
        root = f"memory://{tmp_path.name}"
        if request.param == "s3":
            root = f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
        for tar in uneven:
            with fsspec.open(f"{root}/{tar.name}", "wb") as file:
                file.write(tar.read_bytes())
        return f"{root}/*.tar"

    return put


def test_remote_tars_give_the_same_batches_as_local_ones(streamed: dict[str, Any], remote: Callable[[], str]) -> None:
    local = load_batches(streamed, stop=3)
    streamed["data"]["tars"] = [remote()]
    of_this_process = streamed["data"]["tars"][0].startswith("memory:") and start_method() == "forkserver"
    streamed["data"]["workers"] = 0 if of_this_process else 2
    assert open_run(streamed).total == 96
    streamed["data"]["access"] = "auto"
    assert open_run(streamed).sequential == (not streamed["data"]["tars"][0].startswith("file:"))
    streamed["data"]["access"] = "sequential"
    found = load_batches(streamed, start=1, stop=3)
    for batch, expected in zip(found, local[1:], strict=True):
        for name, tensor in expected.inputs.items():
            assert batch.inputs[name].equal(tensor)


def test_remote_tars_give_the_same_batches_under_random_access(
    streamed: dict[str, Any], uneven: list[Path], tmp_path: Path
) -> None:
    streamed["data"]["access"] = "random"
    local = load_batches(streamed, stop=2)
    for tar in uneven:
        with fsspec.open(f"memory://{tmp_path.name}/{tar.name}", "wb") as file:
            file.write(tar.read_bytes())
    streamed["data"]["tars"] = [f"memory://{tmp_path.name}/*.tar"]
    found = load_batches(streamed, stop=2)
    assert all(a.inputs["image"].equal(b.inputs["image"]) for a, b in zip(found, local, strict=True))


def test_sequential_access_joins_each_sample_with_its_row(three: dict[str, Any], tars: list[Path]) -> None:
    """Compare the rows with those of random access, sample by sample."""
    three["data"] |= {"access": "sequential", "num_streams": 2, "shuffle_buffer": 10, "group_field": None}
    samples = open_run(three)
    join, by_group = samples.caches["third"], {}
    for index in range(samples.total):
        number, ordinal = samples.address(index)
        tar = samples.tars[number]
        by_group[group_hash(f"{tar.location}:{ordinal}")] = join.row(number, ordinal)
    found = load_batches(three, stop=6)
    assert [len(set(groups(found[i : i + 3]))) for i in (0, 3)] == [36, 36]
    for batch in found:
        expected = np.stack([by_group[group] for group in batch.groups_b.tolist()])
        assert (batch.inputs["third"].numpy() == expected).all()


@pytest.mark.distributed
def test_a_mixture_under_sequential_access_resumes_on_other_ranks(
    three: dict[str, Any], tars: list[Path], tmp_path: Path
) -> None:
    """Two ranks with a worker each stop; one rank without workers resumes with the same samples."""
    sets = {"a": {"tars": [str(tars[0])], "weight": 2}, "b": {"tars": [str(tars[1])]}}
    three["data"] |= {
        "tars": [],
        "datasets": sets,
        "access": "sequential",
        "num_streams": 4,
        "shuffle_buffer": 12,
        "workers": 1,
    }
    alone = write_config(three, tmp_path, "alone", zero_stage=1)
    stopped = write_config(three, tmp_path, "stopped", zero_stage=1)
    three["data"]["workers"] = 0
    moved = write_config(three, tmp_path, "stopped one", zero_stage=1)
    run_jobs(2, [{"config": alone[0]}, {"config": stopped[0], "stop": 3}], tmp_path)
    (rest,) = run_jobs(1, [{"config": moved[0]}], tmp_path)
    assert (rest["start"], rest["end"]) == (4, "finished")
    for key in ("loss", "terms/image-third/loss"):
        np.testing.assert_allclose(metric(stopped[1], key), metric(alone[1], key), rtol=2e-4)
    assert metric(alone[1], "datasets/a/samples") == [8 * step for step in range(1, 7)]
    assert metric(alone[1], "datasets/b/epoch") == [step / 5 for step in range(1, 7)]

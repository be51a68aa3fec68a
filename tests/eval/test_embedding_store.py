"""Embeddings on disk: computed once, gone on with after a kill, of the right model and pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.runs import finished
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture, evaluation_set
from threetowers.eval.encoders.embedding_store import Kept
from threetowers.eval.encoders.encoder import Batched, LoadOptions, ModelInfo
from threetowers.eval.encoders.load import load_encoder


class Killed(Exception):
    pass


class Counting:
    """A tower that gives each picture its ordinal and can die on the way; it counts what it was asked for."""

    dim, sees_text, logit_scale = 3, True, 1.0
    facts = ModelInfo("counting", "d1", None, "float32", "none")

    def __init__(self, dies_after: int | None = None) -> None:
        self.dies_after, self.done = dies_after, 0

    def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture], raw: bool) -> Iterator[Floats]:
        for start in range(0, len(pictures), 4):
            batch = pictures[start : start + 4]
            if self.dies_after is not None and self.done + len(batch) > self.dies_after:
                raise Killed
            self.done += len(batch)
            yield np.array([[1 + p.tar, 1 + p.ordinal, 1] for p in batch], np.float32)

    def text_batches(self, captions: Sequence[str]) -> Iterator[Floats]:
        self.done += len(captions)
        yield np.array([[len(c), 1, 1] for c in captions], np.float32)


@pytest.fixture
def data(tars: list[Path]) -> EvaluationSet:
    return evaluation_set([index_tar(tar) for tar in tars], group_field="concept", part_field=None, max_captions=5)


@pytest.mark.parametrize("dies_after", [0, 3, 7, 20, 44])
def test_a_killed_embedding_goes_on_where_it_was(data: EvaluationSet, tmp_path: Path, dies_after: int) -> None:
    whole = Batched(Counting()).images(data, data.pictures)
    first = Counting(dies_after)
    with pytest.raises(Killed):
        Kept(Batched(first), tmp_path, block=8).images(data, data.pictures)
    second = Counting()
    found = Kept(Batched(second), tmp_path, block=8).images(data, data.pictures)
    np.testing.assert_array_equal(found, whole)
    assert second.done <= 45 - first.done + 8  # at most a block is computed twice
    assert second.done >= 45 - first.done
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_each_input_is_embedded_once_and_mapped(data: EvaluationSet, tmp_path: Path) -> None:
    tower = Counting()
    kept = Kept(Batched(tower), tmp_path)
    some = kept.images(data, data.pictures[5:9])  # the others are embedded with them
    whole = kept.images(data, data.pictures)
    assert tower.done == 45
    assert isinstance(whole, np.memmap)
    np.testing.assert_array_equal(some, whole[5:9])
    reversed_ = kept.images(data, data.pictures[::-1])
    np.testing.assert_array_equal(reversed_, whole[::-1])
    kept.features(data, data.pictures)
    assert tower.done == 90
    for _ in range(2):
        kept.texts(["a", "bb"])
    assert tower.done == 92
    kept.texts(["ab", "b"])  # other texts of the same letters
    assert tower.done == 94


def test_another_model_or_precision_is_another_file(clip: dict[str, Any], data: EvaluationSet, tmp_path: Path) -> None:
    path = finished(clip)
    found = [
        load_encoder(path, LoadOptions(precision=p, embeddings=tmp_path / "e", workers=0)).images(data, data.pictures)
        for p in ("float32", "bfloat16")  # type: ignore[arg-type]
    ]
    assert len(list((tmp_path / "e").iterdir())) == 2
    assert not np.array_equal(*found)


def test_embeddings_that_are_not_finite_are_refused(data: EvaluationSet, tmp_path: Path) -> None:
    class Broken(Counting):
        def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture], raw: bool) -> Iterator[Floats]:
            for batch in super().image_batches(data, pictures, raw):
                batch[-1, 0] = np.nan
                yield batch

    with pytest.raises(ValueError, match="counting gives NaN or infinity for 1 of 4 inputs of a batch, the first at"):
        Kept(Batched(Broken()), tmp_path).images(data, data.pictures)
    assert not list(tmp_path.glob("*.npy"))

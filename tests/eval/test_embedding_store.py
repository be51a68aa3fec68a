"""The embedding store: each input is embedded once, and an interrupted embedding is resumed."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.eval.runs import finished
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.image_set import EvalImage, ImageSet, read_images
from threetowers.eval.encoders.embedding_store import Embeddings, EmbeddingStore
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo
from threetowers.eval.encoders.load import load_encoder


class Killed(Exception):
    pass


class CountingEncoder(Encoder):
    """Embeds each image as its ordinal, counts its inputs, and can raise after some of them."""

    dim = 3
    info = ModelInfo("counting", "d1", None, "float32", "none", "f1")

    def __init__(self, folder: Path | None = None, dies_after: int | None = None, block_rows: int = 8) -> None:
        self.store = None if folder is None else EmbeddingStore(folder, block_rows)
        self.dies_after = dies_after
        self.done = 0

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        for start in range(0, len(images), 4):
            batch = images[start : start + 4]
            if self.dies_after is not None and self.done + len(batch) > self.dies_after:
                raise Killed
            self.done += len(batch)
            yield np.array([[1 + p.tar, 1 + p.ordinal, 1] for p in batch], np.float32)

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        self.done += len(captions)
        yield np.array([[len(c), 1, 1] for c in captions], np.float32)


@pytest.fixture
def data(tars: list[Path]) -> ImageSet:
    return read_images([index_tar(tar) for tar in tars])


@pytest.mark.parametrize("dies_after", [0, 3, 7, 20, 44])
def test_interrupted_embedding_is_resumed(data: ImageSet, tmp_path: Path, dies_after: int) -> None:
    expected = CountingEncoder().images(data, data.images)
    first = CountingEncoder(tmp_path, dies_after)
    with pytest.raises(Killed):
        first.images(data, data.images)
    second = CountingEncoder(tmp_path)
    found = second.images(data, data.images)
    np.testing.assert_array_equal(found, expected)
    assert second.done <= 45 - first.done + 8  # at most a block is computed twice
    assert second.done >= 45 - first.done
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_each_input_is_embedded_once_and_memory_mapped(data: ImageSet, tmp_path: Path) -> None:
    encoder = CountingEncoder(tmp_path)
    some = encoder.images(data, data.images[5:9])  # the others are embedded with them
    complete = encoder.images(data, data.images)
    assert encoder.done == 45
    assert isinstance(complete, np.memmap)
    np.testing.assert_array_equal(some, complete[5:9])
    reversed_ = encoder.images(data, data.images[::-1])
    np.testing.assert_array_equal(reversed_, complete[::-1])
    encoder.features(data, data.images)
    assert encoder.done == 90
    for _ in range(2):
        encoder.texts(["a", "bb"])
    assert encoder.done == 92
    encoder.texts(["ab", "b"])  # other texts of the same letters
    assert encoder.done == 94


def test_each_precision_has_its_own_file(clip: dict[str, Any], data: ImageSet, tmp_path: Path) -> None:
    path = finished(clip)
    found = [
        load_encoder(path, LoadOptions(precision=p, embeddings=tmp_path / "e", workers=0)).images(data, data.images)
        for p in ("float32", "bfloat16")  # type: ignore[arg-type]
    ]
    assert len(list((tmp_path / "e").iterdir())) == 2
    assert not np.array_equal(*found)


def test_nonfinite_embeddings_are_refused(data: ImageSet, tmp_path: Path) -> None:
    class BrokenEncoder(CountingEncoder):
        def raw_image_batches(
            self, data: ImageSet, images: Sequence[EvalImage], features: bool
        ) -> Iterator[Embeddings]:
            for batch in super().raw_image_batches(data, images, features):
                batch[-1, 0] = np.nan
                yield batch

    with pytest.raises(ValueError, match="counting gives NaN or infinity for 1 of 4 inputs of a batch, the first at"):
        BrokenEncoder(tmp_path).images(data, data.images)
    assert not list(tmp_path.glob("*.npy"))

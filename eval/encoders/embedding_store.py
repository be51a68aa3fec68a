"""Embeddings on disk: each input goes through a model once for all tasks, and an interruption costs one block."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.storage.atomic import finish_partial, write_atomic
from threetowers.cache.storage.lease import one_at_a_time
from threetowers.eval.datasets.image_set import EvalImage, ImageSet

logger = logging.getLogger(__name__)

Embeddings = npt.NDArray[np.float32]  # (n, width)

BLOCK_ROWS = 16_384  # an interruption costs at most so many inputs


class EmbeddingStore:
    """A folder of .npy files with embeddings, which are given back memory-mapped."""

    def __init__(self, folder: Path, block_rows: int = BLOCK_ROWS) -> None:
        self.folder = folder
        self.block_rows = block_rows

    def images(
        self,
        kind: str,
        model: str,
        data: ImageSet,
        images: Sequence[EvalImage],
        batches: Callable[[ImageSet, Sequence[EvalImage]], Iterator[Embeddings]],
    ) -> Embeddings:
        """Return stored or computed embeddings of some images of a set.

        All images of the set are embedded, even if only some are wanted: other tasks will want the others.

        Args:
            kind: `images` or `features`.
            model: The model's fingerprint (see `ModelInfo`).
            data: The set.
            images: The images whose embeddings are returned, in this order.
            batches: Computes the embeddings of images, batch by batch.
        """
        all_ND = self._load_or_compute(
            [kind, images_digest(data, data.images), model],
            len(data.images),
            lambda start, stop: batches(data, data.images[start:stop]),
        )
        if images is data.images or list(images) == data.images:
            return all_ND
        row_of = {(image.tar, image.ordinal): row for row, image in enumerate(data.images)}
        chosen_ND: Embeddings = all_ND[[row_of[image.tar, image.ordinal] for image in images]]
        return chosen_ND

    def texts(
        self,
        model: str,
        captions: Sequence[str],
        batches: Callable[[Sequence[str]], Iterator[Embeddings]],
    ) -> Embeddings:
        """Return stored or computed embeddings of some captions, in their order."""
        digest = xxhash.xxh3_128()
        for caption in captions:
            encoded = caption.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return self._load_or_compute(
            ["texts", digest.hexdigest(), model],
            len(captions),
            lambda start, stop: batches(captions[start:stop]),
        )

    def _load_or_compute(
        self, key: Sequence[str], count: int, batches: Callable[[int, int], Iterator[Embeddings]]
    ) -> Embeddings:
        """Return the memory-mapped embeddings of `count` inputs, computing those that an earlier call has not."""
        kind = key[0]
        path = self.folder / f"{kind}-{xxhash.xxh3_128_hexdigest(json.dumps(list(key)).encode())}.npy"
        if not path.exists():
            # Another process may need the same embeddings at the same time: it waits, and finds them.
            with one_at_a_time(self.folder, path.stem):
                if not path.exists():
                    _fill(path, count, batches, self.block_rows)
        stored: Embeddings = np.load(path, mmap_mode="r", allow_pickle=False)
        return stored


def _fill(path: Path, count: int, batches: Callable[[int, int], Iterator[Embeddings]], block_rows: int) -> None:
    """Write (count, width) float32 into `path`. Until then `<path>.rows` holds how many rows are safe on disk."""
    partial = path.with_suffix(".partial")
    progress = path.with_suffix(".rows")
    safe = int(progress.read_text()) if progress.exists() and partial.exists() else 0
    array = None
    if safe:
        array = np.lib.format.open_memmap(partial, mode="r+")
        logger.info("%s: %s of %s embeddings are there already", path.name, f"{safe:,}", f"{count:,}")

    written = safe
    for batch in batches(safe, count):
        if array is None:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, batch.shape[1]))
        array[written : written + len(batch)] = batch
        written += len(batch)
        if written - safe >= block_rows:
            array.flush()
            write_atomic(progress, str(written))
            safe = written

    assert array is not None
    if written != count:
        raise ValueError(f"{path.name}: {written} embeddings came out of {count} inputs")
    array.flush()
    del array
    finish_partial(partial, path)
    progress.unlink(missing_ok=True)


def images_digest(data: ImageSet, images: Sequence[EvalImage]) -> str:
    """Return a digest of some images and their order: tars by fingerprint, samples by place and image member."""
    digest = xxhash.xxh3_128()
    for tar in data.tars:
        digest.update(f"{tar.fingerprint}\n".encode())
    for image in images:
        member = data.tars[image.tar].samples[image.ordinal].image
        digest.update(f"{image.tar}:{image.ordinal}:{image.key}.{member}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

"""Embeddings on disk: each input goes through a model once, whatever tasks ask for it, and a kill costs one block."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from threetowers.cache.storage.atomic import finish_partial, write_atomic
from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture
from threetowers.eval.encoders.encoder import Batched, ModelInfo

log = logging.getLogger(__name__)

BLOCK = 16_384  # inputs; what a kill costs at most


class Kept:
    """An encoder that keeps what it computes in a folder of .npy files, and gives it back memory-mapped."""

    def __init__(self, encoder: Batched, folder: Path, block: int = BLOCK) -> None:
        self.encoder, self.folder, self.block = encoder, folder, block

    @property
    def facts(self) -> ModelInfo:
        return self.encoder.facts

    @property
    def dim(self) -> int:
        return self.encoder.dim

    @property
    def sees_text(self) -> bool:
        return self.encoder.sees_text

    @property
    def logit_scale(self) -> float:
        return self.encoder.logit_scale

    def images(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        return self._pictures("images", data, pictures, self.encoder.image_batches)

    def features(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        return self._pictures("features", data, pictures, self.encoder.feature_batches)

    def texts(self, captions: Sequence[str]) -> Floats:
        digest = xxhash.xxh3_128()
        for caption in captions:
            encoded = caption.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return self._keep(
            "texts",
            digest.hexdigest(),
            len(captions),
            lambda start, stop: self.encoder.text_batches(captions[start:stop]),
        )

    def _pictures(
        self,
        kind: str,
        data: EvaluationSet,
        pictures: Sequence[Picture],
        batches: Callable[[EvaluationSet, Sequence[Picture]], Iterator[Floats]],
    ) -> Floats:
        """All pictures of the set are embedded, whichever are asked for: other tasks will ask for the others."""
        whole_ND = self._keep(
            kind,
            pictures_digest(data, data.pictures),
            len(data.pictures),
            lambda start, stop: batches(data, data.pictures[start:stop]),
        )
        if pictures is data.pictures or list(pictures) == data.pictures:
            return whole_ND
        places = {(p.tar, p.ordinal): row for row, p in enumerate(data.pictures)}
        chosen_ND: Floats = whole_ND[[places[p.tar, p.ordinal] for p in pictures]]
        return chosen_ND

    def _keep(self, kind: str, inputs: str, count: int, batches: Callable[[int, int], Iterator[Floats]]) -> Floats:
        """The memory-mapped embeddings of `count` inputs, computed from where an earlier call was cut off."""
        if count == 0:
            raise ValueError(f"{self.facts.name}: nothing to embed")
        facts = self.facts
        key = json.dumps([kind, inputs, facts.digest, facts.precision, facts.preprocessing, facts.cache_manifest])
        path = self.folder / f"{kind}-{xxhash.xxh3_128_hexdigest(key.encode())}.npy"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _fill(path, count, batches, self.block)
        stored: Floats = np.load(path, mmap_mode="r", allow_pickle=False)
        return stored


def _fill(path: Path, count: int, batches: Callable[[int, int], Iterator[Floats]], block: int) -> None:
    """Write (count, width) float32 into `path`. `<path>.rows` says how many are safe on disk until all are."""
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".rows")
    rows = int(progress.read_text()) if progress.exists() and partial.exists() else 0
    array = np.lib.format.open_memmap(partial, mode="r+") if rows else None
    if rows:
        log.info("%s: %s of %s embeddings are there already", path.name, f"{rows:,}", f"{count:,}")
    at = rows
    for batch in batches(rows, count):
        if array is None:
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, batch.shape[1]))
        array[at : at + len(batch)] = batch
        at += len(batch)
        if at - rows >= block:
            array.flush()
            write_atomic(progress, str(at))
            rows = at
    assert array is not None
    if at != count:
        raise ValueError(f"{path.name}: {at} embeddings came out of {count} inputs")
    array.flush()
    del array
    finish_partial(partial, path)
    progress.unlink(missing_ok=True)


def pictures_digest(data: EvaluationSet, pictures: Sequence[Picture]) -> str:
    """Of which pictures, in which order: tars by fingerprint, samples by place and key."""
    digest = xxhash.xxh3_128()
    for tar in data.tars:
        digest.update(f"{tar.fingerprint}\n".encode())
    for picture in pictures:
        digest.update(f"{picture.tar}:{picture.ordinal}:{picture.key}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

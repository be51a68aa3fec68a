"""Caches of random rows, made without a teacher, and done records without what differs between two builds."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from threetowers.cache.format.done_record import DoneRecord, done_record_name
from threetowers.cache.format.dtypes import STORAGE_DTYPES, storage_dtype
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import RowStatus, image_room, text_room
from threetowers.cache.format.manifest import CaptionSources, Manifest, Preprocessing, TextProcessing, to_json
from threetowers.cache.format.row_buffer import Provenance, RowBuffer
from threetowers.cache.format.store import fit_to_table
from threetowers.cache.format.tar_table import TarEntry, extend
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.format.views import Views
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_headers import Member
from threetowers.cache.webdataset.tar_index import TarIndex

DTYPES = sorted(STORAGE_DTYPES)
TRANSFORM = Preprocessing((8, 8), "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)
PROCESSING = TextProcessing("d", "", 8, "mean", normalize=False)
CaptionsBySource = Mapping[str, Sequence[str]]


def image_manifest(dim: int, largest: int, dtype: Any = "float16", views: Views | None = None) -> Manifest:
    """The manifest of a cache of images, in tars of up to so many samples."""
    room = image_room(storage_dtype(dtype).row_bytes(dim), largest)
    return Manifest(
        "timm:b",
        "w",
        "d",
        "pooled",
        dim,
        dtype,
        *room,
        versions={"torch": "1"},
        preprocessing=TRANSFORM,
        views=views or Views(),
    )


def text_manifest(
    dim: int, largest: int, captions: int, dtype: Any = "float16", sources: Sequence[str] = (), chunk_rows: int = 0
) -> Manifest:
    """The manifest of a cache of text, in tars of up to so many samples and captions."""
    room = text_room(storage_dtype(dtype).row_bytes(dim), largest, captions)
    if chunk_rows:
        room = room._replace(rows_per_tar=-(-captions // chunk_rows) * chunk_rows, chunk_rows=chunk_rows)
    return Manifest(
        "test:bag",
        "pretrained",
        "d",
        "pooled",
        dim,
        dtype,
        *room,
        versions={"torch": "1"},
        of="text",
        text=PROCESSING,
        captions=CaptionSources(tuple(sources)),
    )


def make_cache(
    where: str | Path, sizes: list[int], dim: int, dtype: Any = "float16", views: Views | None = None, seed: int = 0
) -> list[np.ndarray]:
    """A cache of random rows, every seventh without an embedding; returns (n, V, D) float32 rows of each tar."""
    rng = np.random.default_rng(seed)
    manifest = image_manifest(dim, max(sizes), dtype, views)
    storage = open_storage(where)
    tars = []
    for entry, index in _added(storage, manifest, sizes):
        views = manifest.views
        emb_nVD = (rng.normal(size=(entry.n_samples, views.count, dim)) * 3 + 5).astype(np.float32)
        rows, bad = ImageRowBuffer(index, manifest), np.arange(entry.n_samples) % 7 == 6
        for ordinal in range(entry.n_samples):
            rows.set_image(ordinal, ordinal, views.params(ordinal, 40, 30) if views.cropped else None)
        rows.set_embeddings(np.flatnonzero(~bad).tolist(), emb_nVD[~bad])
        for ordinal in np.flatnonzero(bad).tolist():
            rows.reject(ordinal, RowStatus.UNDECODABLE, "not an image")
        _finish(storage, entry, rows)
        emb_nVD[bad] = np.nan
        tars.append(emb_nVD)
    return tars


def make_text_cache(
    where: str | Path,
    tars: list[list[CaptionsBySource]],
    dim: int,
    dtype: Any = "float16",
    sources: Sequence[str] = (),
    chunk_rows: int = 4,
    seed: int = 0,
    nonfinite: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """A cache of the captions of some samples in some tars, {} for a sample that has none.

    Returns the random (D,) float32 embedding of each caption; those of the `nonfinite` captions are NaN.
    """
    rng = np.random.default_rng(seed)
    counts = [sum(len(captions) for sample in tar for captions in sample.values()) for tar in tars]
    sizes = [len(tar) for tar in tars]
    manifest = text_manifest(dim, max(sizes), max([1, *counts]), dtype, sources, chunk_rows)
    storage = open_storage(where)
    embeddings: dict[str, np.ndarray] = {}
    for (entry, index), tar in zip(_added(storage, manifest, sizes), tars, strict=True):
        rows = TextRowBuffer(index, manifest)
        for ordinal, captions in enumerate(tar):
            if captions:
                rows.set_captions(ordinal, captions)
            else:
                rows.reject(ordinal, RowStatus.NO_CAPTION, "no caption")
        for caption in rows.captions:
            embeddings.setdefault(caption, (rng.normal(size=dim) * 3 + 5).astype(np.float32))
            if caption in nonfinite:
                embeddings[caption][-1] = np.nan
        for place in rng.permutation(len(rows.captions)).tolist():
            rows.set_embeddings([place], embeddings[rows.captions[place]][None])
        _finish(storage, entry, rows)
    return embeddings


def some_captions(rng: np.random.Generator, sizes: list[int], most: int = 4) -> list[list[CaptionsBySource]]:
    """Tars of so many samples with 0 to `most` captions each, of two sources, some of them equal."""
    tars = []
    for size in sizes:
        tar: list[CaptionsBySource] = []
        for _ in range(size):
            captions = [f"caption {i}" for i in rng.integers(5 * most, size=rng.integers(most + 1))]
            first = int(rng.integers(len(captions) + 1))
            found = {"txt": captions[:first], "json.captions": captions[first:]}
            tar.append({source: each for source, each in found.items() if each})
        tars.append(tar)
    return tars


def _added(storage: Storage, manifest: Manifest, sizes: list[int]) -> list[tuple[TarEntry, TarIndex]]:
    """A new cache of tars with so many samples, none of them finished."""
    indexes = []
    for i, n in enumerate(sizes):
        samples = SampleList([(f"{i}/{k}", {"png": Member(0, 1), "txt": Member(0, 1)}) for k in range(n)])
        indexes.append(TarIndex(f"/tars/{i}.tar", 1, f"print {i}", samples, {}))
    entries = extend(storage, indexes, manifest.samples_per_tar).entries
    fit_to_table(storage, manifest)
    storage.put("manifest.json", to_json(manifest), owner="manifest")
    return list(zip(entries, indexes, strict=True))


def _finish(storage: Storage, entry: TarEntry, rows: RowBuffer) -> None:
    """Write the rows of a tar, and its done record."""
    rows.check_complete()
    record = rows.write(storage, entry, "", Provenance("teacher", 1, "cpu", 0.0))
    storage.put(done_record_name(entry.id), to_json(record), owner=f"{entry.id}.done")


def without_times(record: DoneRecord) -> DoneRecord:
    """Return the record without what differs between two builds of the same bytes."""
    return dataclasses.replace(record, seconds=0.0, finished="", host="")

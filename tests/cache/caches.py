"""Caches of random rows, made without a teacher, and done records without what differs between two builds."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from threetowers.cache.builder.row_buffer import Provenance, RowBuffer
from threetowers.cache.format.done_record import DoneRecord, done_record_name
from threetowers.cache.format.dtypes import STORAGE_DTYPES, storage_dtype
from threetowers.cache.format.layout import RowStatus, rows_and_chunk
from threetowers.cache.format.manifest import Manifest, Preprocessing, to_json
from threetowers.cache.format.store import fit_to_table
from threetowers.cache.format.tar_table import extend
from threetowers.cache.format.views import Views
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_headers import Member
from threetowers.cache.webdataset.tar_index import TarIndex

DTYPES = sorted(STORAGE_DTYPES)


def make_cache(
    where: str | Path, sizes: list[int], dim: int, dtype: Any = "float16", views: Views | None = None, seed: int = 0
) -> list[np.ndarray]:
    """A cache of random rows, every seventh without an embedding; returns (n, V, D) float32 rows of each tar."""
    rng, views = np.random.default_rng(seed), views or Views()
    rows_per_tar, chunk_rows = rows_and_chunk(storage_dtype(dtype).row_bytes(dim), max(sizes))
    transform = Preprocessing((8, 8), "bicubic", 0.9, "center", (0.5,) * 3, (0.5,) * 3)
    manifest = Manifest(
        encoder="timm:b",
        weights="w",
        weights_digest="d",
        feature="pooled",
        dim=dim,
        dtype=dtype,
        samples_per_tar=rows_per_tar,
        rows_per_tar=rows_per_tar,
        chunk_rows=chunk_rows,
        versions={},
        preprocessing=transform,
        views=views,
    )
    storage = open_storage(where)
    indexes = []
    for i, n in enumerate(sizes):
        samples = SampleList([(f"{i}/{k}", {"png": Member(0, 1)}) for k in range(n)])
        indexes.append(TarIndex(f"/tars/{i}.tar", 1, f"print {i}", samples, {}))
    entries = extend(storage, indexes, rows_per_tar).entries
    fit_to_table(storage, manifest)
    storage.put("manifest.json", to_json(manifest), owner="manifest")
    tars = []
    for entry, index in zip(entries, indexes, strict=True):
        emb_nVD = (rng.normal(size=(entry.n_samples, views.count, dim)) * 3 + 5).astype(np.float32)
        rows, bad = RowBuffer(index, manifest), np.arange(entry.n_samples) % 7 == 6
        for ordinal in range(entry.n_samples):
            rows.set_image(ordinal, ordinal, views.params(ordinal, 40, 30) if views.cropped else None)
        rows.set_embeddings(np.flatnonzero(~bad).tolist(), emb_nVD[~bad])
        for ordinal in np.flatnonzero(bad).tolist():
            rows.reject(ordinal, RowStatus.UNDECODABLE, "not an image")
        record = rows.write(storage, entry, "", Provenance("teacher", 1, "cpu", 0.0))
        storage.put(done_record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
        emb_nVD[bad] = np.nan
        tars.append(emb_nVD)
    return tars


def without_times(record: DoneRecord) -> DoneRecord:
    """Return the record without what differs between two builds of the same bytes."""
    return dataclasses.replace(record, seconds=0.0, finished="", host="")

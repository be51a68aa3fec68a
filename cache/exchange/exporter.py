"""Write the rows of a cache as matrices and tables that other tools read: the layout of clip-retrieval."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from threetowers.cache.exchange.clip_retrieval import metadata_path, rows_path
from threetowers.cache.exchange.parquet import require_pyarrow
from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Side
from threetowers.cache.format.tar_table import TarEntry, join_location, repacked_error
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.sample_stream import stream_annotations
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar
from threetowers.cache.webdataset.tar_list import index_tars, require_samples
from threetowers.cache.webdataset.tar_patterns import expand

ROWS_PER_PART = 1_000_000  # as clip-retrieval writes them
ExportDtype = Literal["float16", "float32"]
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class ExportReport:
    """What was written: rows in parts, to a folder; `without` samples have no embedding."""

    folder: Path
    rows: int
    parts: int
    tars: int
    without: int

    def text(self) -> str:
        """Return the report for a person."""
        return (
            f"{self.folder}: {self.rows} rows of {self.tars} tars in {self.parts} parts; {self.without} samples "
            "without an embedding are left out"
        )


def export_cache(
    cache: str | Path,
    output_dir: str | Path,
    tars: Sequence[str | Path] | None = None,
    *,
    view: int = 0,
    dtype: ExportDtype = "float16",
    rows_per_part: int = ROWS_PER_PART,
) -> ExportReport:
    """Write a cache to a new folder, tar by tar; in memory are the rows of one tar.

    `img_emb/img_emb_N.npy` or `text_emb/text_emb_N.npy` are the rows, `metadata/metadata_N.parquet` has a line for each
    row: `image_path` and `key` (both the sample's key), `tar`, `ordinal`, and of text `caption` and `caption_source`.

    Args:
        cache: folder or URL of the cache.
        output_dir: the folder.
        tars: where the tars are now, which have the keys and captions; by default where they were embedded. Those that
            are left out are not exported.
        view: of an image.
        dtype: of the matrices.
        rows_per_part: rows of all parts but the last.

    Raises:
        ManifestError: a tar is incomplete or damaged, is another one than was embedded, or has other captions.
        ValueError: a row overflows float16, the folder is not empty, or there is no pyarrow; and as by `index_tars`.
    """
    require_pyarrow()
    folder = Path(output_dir)
    if rows_per_part < 1:
        raise ValueError(f"--rows-per-part {rows_per_part}: expected at least 1")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder (--output-dir)")
    opened = EmbeddingCache.open(cache)
    located = _located(opened, tars)
    records = [opened.record(entry.id) for entry, _ in located]
    of = opened.manifest.of
    n_rows = sum(record.n_ok if of == "image" else record.n_rows for record in records)

    # Written beside the folder, which is there when it is complete.
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    with _Parts(partial, of, n_rows, opened.dim, dtype, rows_per_part) as parts:
        for entry, location in located:
            index = index_tar(location, image_member=opened.manifest.image_member)
            if index.fingerprint != entry.fingerprint:
                raise repacked_error(location, [entry.fingerprint], index.fingerprint)
            if of == "image":
                parts.add(*_image_rows(opened, entry, index, view))
            else:
                parts.add(*_caption_rows(opened, entry, index))
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    without = sum(record.n_samples - record.n_ok for record in records)
    return ExportReport(folder, n_rows, parts.count, len(located), without)


def _located(cache: EmbeddingCache, tars: Sequence[str | Path] | None) -> list[tuple[TarEntry, str]]:
    """Return the tars to export, and where they are, in the order of the cache."""
    if tars is None:
        segments = cache.table.segments
        return [(entry, join_location(segment.root, entry.path)) for segment in segments for entry in segment.entries]
    listed = require_samples(index_tars(expand(tars), cache.manifest.image_member))
    found = [(cache.table.find(index), index.location) for index in listed.tars]
    return sorted(found, key=lambda each: each[0].id)


def _image_rows(cache: EmbeddingCache, entry: TarEntry, index: TarIndex, view: int) -> tuple[Float32Array, Columns]:
    ordinals = np.flatnonzero(cache.status(entry.id) == RowStatus.OK)
    return cache.tar(entry.id, view)[ordinals], _sample_columns(entry, index, ordinals.tolist())


def _caption_rows(cache: EmbeddingCache, entry: TarEntry, index: TarIndex) -> tuple[Float32Array, Columns]:
    ordinals: list[int] = []
    captions: list[str] = []
    sources: list[str] = []
    status = cache.status(entry.id)
    for ordinal, annotation in stream_annotations(index, cache.manifest.caption_sources.caption_format):
        if status[ordinal] != RowStatus.OK:
            continue
        cache.check_captions(entry.id, ordinal, index.samples.key(ordinal), annotation.captions_by_source)
        for source, found in annotation.captions_by_source.items():
            ordinals += [ordinal] * len(found)
            captions += found
            sources += [source] * len(found)
    columns = _sample_columns(entry, index, ordinals)
    return cache.tar(entry.id), columns | {"caption": captions, "caption_source": sources}


def _sample_columns(entry: TarEntry, index: TarIndex, ordinals: list[int]) -> Columns:
    keys = [index.samples.key(ordinal) for ordinal in ordinals]
    return {"image_path": keys, "key": keys, "tar": [entry.path] * len(keys), "ordinal": ordinals}


class _Parts:
    """The parts of a folder, written one after the other."""

    def __init__(self, folder: Path, of: Side, n_rows: int, dim: int, dtype: ExportDtype, rows_per_part: int) -> None:
        self._folder = folder
        self._of: Side = of
        self._n_rows = n_rows
        self._dim = dim
        self._dtype = dtype
        self._rows_per_part = rows_per_part
        self.count = -(-n_rows // rows_per_part)
        self._written = 0
        self._rows_nD: npt.NDArray[Any] | None = None
        self._metadata: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, rows_nD: Float32Array, columns: Columns) -> None:
        """Write the rows of a tar, and a line for each. Raises ValueError for a row that overflows."""
        with np.errstate(over="ignore"):
            stored_nD = rows_nD.astype(self._dtype)
        if not np.isfinite(stored_nD).all():
            row = int(np.flatnonzero(~np.isfinite(stored_nD).all(axis=1))[0])
            raise ValueError(
                f"tar {columns['tar'][row]}: {columns['key'][row]!r}: a component overflows {self._dtype}: use --dtype "
                "float32"
            )
        start = 0
        while start < len(stored_nD):
            at = self._written % self._rows_per_part
            if at == 0:
                self._open()
            stop = min(len(stored_nD), start + self._rows_per_part - at)
            assert self._rows_nD is not None
            self._rows_nD[at : at + stop - start] = stored_nD[start:stop]
            self._write_lines({name: values[start:stop] for name, values in columns.items()})
            self._written += stop - start
            start = stop

    def _open(self) -> None:
        self._close()
        first = self._written // self._rows_per_part
        number = str(first).zfill(len(str(self.count)))
        path = rows_path(self._folder, self._of, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (min(self._rows_per_part, self._n_rows - self._written), self._dim)
        self._rows_nD = np.lib.format.open_memmap(path, "w+", np.dtype(self._dtype), shape)
        self._metadata = metadata_path(self._folder, number)
        self._metadata.parent.mkdir(exist_ok=True)

    def _write_lines(self, columns: Columns) -> None:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table(columns)
        if isinstance(self._metadata, Path):
            self._metadata = parquet.ParquetWriter(self._metadata, table.schema)
        self._metadata.write_table(table)

    def _close(self) -> None:
        if self._rows_nD is not None:
            self._rows_nD.flush()  # type: ignore[attr-defined]
            self._rows_nD = None
            self._metadata.close()

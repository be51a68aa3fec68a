"""Checking one tar of a cache: its files, its values, and whether it is the tar that was embedded."""

import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from threetowers.cache.format import shard
from threetowers.cache.format.done_record import DoneRecord, read_done_record
from threetowers.cache.format.layout import RowStatus, arrays, emb_name, scale_name
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.store import Arrays, read_tar_rows
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.verify.recompute import SampledRow
from threetowers.cache.verify.report import Problem, VerifyReport
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

Float32Array = npt.NDArray[np.float32]


class TarChecker(ABC):
    """Checks tar after tar, and draws a random sample of their rows.

    Attributes:
        report: takes what is found.
        manifest: of the cache.
        check_contents: whether the images or captions of the tars are compared with those that were embedded.
        sample: how many rows to draw, of those with an embedding.
        rng: draws them.
        sampled: the rows that were drawn.
    """

    def __init__(
        self, report: VerifyReport, manifest: Manifest, check_contents: bool, sample: int, rng: np.random.Generator
    ) -> None:
        self.report = report
        self.manifest = manifest
        self.check_contents = check_contents
        self.sample = sample
        self.rng = rng
        self.sampled: list[SampledRow] = []  # of all embeddings so far, those with the smallest priorities

    def check(self, entry: TarEntry, index: TarIndex | None) -> bool:
        """Check one tar, and compare it with the tar itself if that is given; return whether it is intact."""
        report = self.report
        n_problems = len(report.problems)
        try:
            record = read_done_record(report.storage, self.manifest, entry)
            rows = read_tar_rows(report.storage, self.manifest, entry, record)
        except ManifestError as error:
            report.problems.append(Problem(str(error), entry.id))
            return False
        if index is not None:
            self._compare_with_tar(entry, index, record, rows)
        if report.depth != "metadata":
            self._check_values(entry, record, rows)
        if len(report.problems) > n_problems:
            return False
        report.tars_intact += 1
        report.samples += entry.n_samples
        report.rows += record.n_rows
        report.ok_samples += record.n_ok
        report.counts.update(record.counts)
        if report.depth != "metadata":
            self._collect(entry, index, record, rows)
        return True

    @abstractmethod
    def compare_contents(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        """Compare the images or captions of a tar with those that were embedded. Raises BadTar if it has changed."""

    @abstractmethod
    def embedded_rows(self, record: DoneRecord, rows: Arrays) -> npt.NDArray[np.bool_]:
        """Return (n_rows,) which rows of a tar have an embedding."""

    @abstractmethod
    def check_addresses(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        """Check what says which rows are whose, and what they were made of."""

    @abstractmethod
    def content_hashes(self, rows: Arrays) -> npt.NDArray[np.uint64]:
        """Return the hash of what each row is the embedding of."""

    @abstractmethod
    def name_of(self, rows: Arrays, index: TarIndex | None) -> Callable[[int], str]:
        """Return what names a row in its tar for a person."""

    @abstractmethod
    def sampled_row(
        self, priority: float, entry: TarEntry, index: TarIndex, row: int, view: int, row_D: Float32Array, rows: Arrays
    ) -> SampledRow:
        """Return a row to recompute."""

    def add_problem(self, entry: TarEntry, text: str) -> None:
        """Report what is wrong with the rows of a tar."""
        self.report.problems.append(Problem(f"tar {entry.path} ({entry.id}): {text}", entry.id))

    def _compare_with_tar(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        """Compare the keys of the samples with those of the tar, and the contents if asked to."""
        hashes = rows["key_hash"].tolist()
        for ordinal, sample in enumerate(index.samples):
            if hashes[ordinal] != key_hash(sample.key):
                self.add_problem(entry, f"ordinal {ordinal}: the row is not of key {sample.key!r}")
                return
        if self.check_contents:
            try:
                self.compare_contents(entry, index, record, rows)
            except BadTar as error:
                self.add_problem(entry, str(error))

    def _check_values(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        """Compare the rows of a tar with its record, and with each other."""
        self._check_samples(entry, record, rows)
        self.check_addresses(entry, record, rows)
        embedded = self.embedded_rows(record, rows)
        views = self._views(record, rows)
        if not all(np.isfinite(view[embedded]).all() for view in views):
            self.add_problem(entry, "a nonfinite row with status ok")
        if not all(np.isnan(view[~embedded]).all() for view in views):
            self.add_problem(entry, "an embedding in a row without status ok")
        if beyond := self._padding_with_values(record, rows):
            self.add_problem(entry, f"values of {', '.join(beyond)} beyond the last sample")
        if self._chunk_checksums(rows) != record.chunk_crc32c:
            self.add_problem(entry, "other chunk checksums than in the done record")

    def _check_samples(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        n = entry.n_samples
        status = rows["status"]
        known = [int(s) for s in RowStatus if s != RowStatus.ABSENT]
        counts: Counter[str] = Counter()
        for s in status[:n][status[:n] != RowStatus.OK].tolist():
            if s in known:
                counts[RowStatus(s).name.lower()] += 1
        if not np.isin(status[:n], known).all() or status[n:].any():
            self.add_problem(entry, "a sample without a status, or a status without a sample")
        if len(np.unique(rows["key_hash"][:n])) != n:
            self.add_problem(entry, "two samples with the same key")
        if (status == RowStatus.OK).sum() != record.n_ok or counts != record.counts:
            self.add_problem(entry, "other counts of statuses than in the done record")

    def _padding_with_values(self, record: DoneRecord, rows: Arrays) -> list[str]:
        """Return the arrays that hold something else than the fill value after the last sample or row."""
        found = []
        for name, spec in arrays(self.manifest).items():
            padding = rows[name][spec.length(record.n_samples, record.n_rows) :]
            fill = np.full_like(padding, spec.fill)
            if not np.array_equal(padding, fill, equal_nan=padding.dtype.kind == "f") and name != "status":
                found.append(name)
        return found

    def _chunk_checksums(self, rows: Arrays) -> dict[str, tuple[int, ...]]:
        manifest = self.manifest
        sums = {}
        for name, spec in arrays(manifest).items():
            if spec.chunked:
                _, crcs = shard.encode(rows[name], manifest.chunk_rows, manifest.chunks_per_tar)
                sums[name] = tuple(crcs)
        return sums

    def _views(self, record: DoneRecord, rows: Arrays) -> list[Float32Array]:
        """Return the (n_rows, D) float32 embeddings of each view; NaN where there is none."""
        views = []
        dtype = self.manifest.storage_dtype
        for view in range(self.manifest.views.count):
            scale = rows[scale_name(view)][: record.n_rows] if dtype.scaled else None
            views.append(dtype.decode(rows[emb_name(view)][: record.n_rows], scale))
        return views

    def _collect(self, entry: TarEntry, index: TarIndex | None, record: DoneRecord, rows: Arrays) -> None:
        """Add the embeddings of a tar to the statistics and, with some luck, to the sample to be recomputed."""
        at = np.flatnonzero(self.embedded_rows(record, rows))
        views = [view[at] for view in self._views(record, rows)]
        name = self.name_of(rows, index)
        self.report.statistics.add(
            entry, lambda row: f"{entry.path} ({entry.id}):{name(row)}", at, views, self.content_hashes(rows)[at]
        )
        if self.sample and index is not None:
            self._draw(entry, index, at, views, rows)

    def _draw(
        self, entry: TarEntry, index: TarIndex, at: npt.NDArray[np.int64], views: Sequence[Float32Array], rows: Arrays
    ) -> None:
        priorities = self.rng.random(len(at))
        chosen_views = self.rng.integers(len(views), size=len(at))
        for i in np.argsort(priorities)[: self.sample].tolist():
            view = int(chosen_views[i])
            row_D = views[view][i].copy()
            drawn = self.sampled_row(float(priorities[i]), entry, index, int(at[i]), view, row_D, rows)
            self.sampled.append(drawn)
        self.sampled = heapq.nsmallest(self.sample, self.sampled, key=lambda row: row.priority)

"""Verify a cache at three depths: its files and records, its values, and a sample of recomputed embeddings.

Rows are decoded by zarr-python, not by this package's own reader: a cache that passes can be used by any Zarr reader.
Each file is read once.
"""

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from threetowers.cache.format import shard
from threetowers.cache.format.done_record import DONE, DoneRecord, done_record_name, read_done_record
from threetowers.cache.format.layout import STORE, RowStatus, arrays, emb_name, params_name, scale_name, tar_files
from threetowers.cache.format.manifest import Manifest, ManifestError, read_manifest
from threetowers.cache.format.store import Arrays, empty_group, fit_to_table, read_tar_rows
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.format.views import params_problem
from threetowers.cache.processes.progress import progress_bar
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage, open_storage
from threetowers.cache.verify.recompute import SampledRow, recompute
from threetowers.cache.verify.report import Depth, Problem, VerifyReport
from threetowers.cache.verify.statistics import EXAMPLES_SHOWN
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar, key_hash
from threetowers.cache.webdataset.tar_list import OnBad
from threetowers.cache.webdataset.tar_patterns import expand


def verify(
    cache: str | Path | Storage,
    tars: Sequence[str | Path] | None = None,
    *,
    depth: Depth = "values",
    check_images: bool = False,
    sample: int = 64,
    seed: int = 0,
    min_cosine: float | None = None,
    weights: str | None = None,
    device: str = "cpu",
    max_pixels: int = MAX_PIXELS,
    on_bad: OnBad = "skip",
    fix: bool = False,
) -> VerifyReport:
    """Check every tar of a cache.

    `metadata` checks the manifest, the tar table, the Zarr metadata, the done records, and size and digest of every
    file. `values` also checks that statuses are as recorded, OK rows are finite and the others have the fill value; it
    reports norms, zero and constant rows, and duplicates. `recompute` also embeds a random sample of images again.

    Args:
        cache: folder, URL or storage of the cache.
        tars: patterns as for `build`: compare fingerprints and the keys of all samples too. `recompute` needs them.
        depth: how much to check.
        check_images: also compare the bytes of all images in these tars with those that were embedded.
        sample: how many images to recompute.
        seed: of that sample.
        min_cosine: bound on the cosines of recomputed rows, by default a little below that of the dtype.
        weights: path of the teacher's weights, if they came from a file.
        device: of the teacher.
        max_pixels: largest width x height of an image that `recompute` decodes; as the build's.
        on_bad: `skip_tars` passes over tars that cannot be used, with a warning; otherwise they are problems.
        fix: remove rows and record of each tar with a problem, and repair the Zarr metadata, for the next build.

    Raises:
        ManifestError: the manifest or the tar table is unreadable, or the teacher is not that of the cache.
        ValueError: `tars` are missing where they are needed, or match nothing.
    """
    if tars is None and (check_images or depth == "recompute"):
        option = "--check-images" if check_images else "--depth recompute"
        raise ValueError(f"{option} compares with the tars: name them (--tars)")
    storage = open_storage(cache)
    manifest = read_manifest(storage)
    table = read_table(storage)
    report = VerifyReport(storage, depth, tars=len(table.entries))
    metadata_intact = _check_metadata(report, manifest, table)

    # Check each tar: first those that are given, together with the tar itself.
    n_recomputed = sample if depth == "recompute" else 0
    checker = _TarChecker(report, manifest, check_images, n_recomputed, np.random.default_rng(seed))
    compared: set[int] = set()
    paths = expand(tars) if tars is not None else []
    with progress_bar("cache verify", max(len(paths), len(table.entries)), "tars") as bar:
        for path in paths:
            found = _find_tar(report, manifest, table, path, on_bad)
            if found is not None:
                entry, index = found
                compared.add(entry.id)
                report.tars_compared += checker.check(entry, index)
            bar.update()
        for entry in table.entries:
            if entry.id not in compared:
                checker.check(entry, None)
                bar.update()

    # Warn of what is suspicious, but no damage.
    if tars is not None and len(compared) < len(table.entries):
        report.warnings.append(f"{len(table.entries) - len(compared)} tars of the cache are not among --tars")
    _warn_of_anomalies(report)
    _warn_of_unexpected_files(report, manifest, table)

    if depth == "recompute":
        report.recomputed, problems = recompute(manifest, checker.sampled, weights, device, min_cosine, max_pixels)
        report.problems += [Problem(text, tar_id) for tar_id, text in problems]
        report.tars_intact -= len({tar_id for tar_id, _ in problems})
    if fix and not report.ok:
        _fix(report, manifest, metadata_intact)
    return report


def _find_tar(
    report: VerifyReport, manifest: Manifest, table: TarTable, path: str, on_bad: OnBad
) -> tuple[TarEntry, TarIndex] | None:
    """Return a tar that is given and its entry, or report why it cannot be compared."""
    try:
        index = index_tar(path, image_member=manifest.image_member)
    except BadTar as error:
        if on_bad == "skip_tars":
            report.warnings.append(f"left out, a bad tar: {error}")
        else:
            report.problems.append(Problem(str(error)))
        return None
    if not index.samples:
        report.warnings.append(f"{path}: holds no samples, and has no rows")
        return None
    try:
        return table.find(index), index
    except ManifestError as error:
        report.problems.append(Problem(str(error)))
        return None


class _TarChecker:
    """Checks tar after tar, and draws a random sample of their rows."""

    def __init__(
        self, report: VerifyReport, manifest: Manifest, check_images: bool, sample: int, rng: np.random.Generator
    ) -> None:
        self.report = report
        self.manifest = manifest
        self.check_images = check_images
        self.sample = sample
        self.rng = rng
        self.sampled: list[SampledRow] = []  # of all OK rows so far, those with the smallest priorities

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
        report.ok_rows += record.n_ok
        report.counts.update(record.counts)
        if report.depth != "metadata":
            self._collect(entry, index, rows)
        return True

    def _add_problem(self, entry: TarEntry, text: str) -> None:
        self.report.problems.append(Problem(f"tar {entry.path} ({entry.id}): {text}", entry.id))

    def _compare_with_tar(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        """Compare the keys of the rows with those of the tar, and the images if asked to."""
        hashes = rows["key_hash"].tolist()
        for ordinal, sample in enumerate(index.samples):
            if hashes[ordinal] != key_hash(sample.key):
                self._add_problem(entry, f"ordinal {ordinal}: the row is not of key {sample.key!r}")
                return
        if not self.check_images:
            return
        digest = xxhash.xxh3_128()
        changed = []
        try:
            for ordinal, key, data in stream_images(index, digest):
                if xxhash.xxh3_64_intdigest(data) != rows["image_hash"][ordinal]:
                    changed.append(key)
        except BadTar as error:
            self._add_problem(entry, str(error))
            return
        if changed:
            examples = ", ".join(changed[:EXAMPLES_SHOWN])
            self._add_problem(entry, f"{len(changed)} images are not those that were embedded: {examples}")
        elif digest.hexdigest() != record.tar_xxh3_128:
            self.report.warnings.append(
                f"tar {entry.path} ({entry.id}): its bytes have changed, its images are those that were embedded"
            )

    def _check_values(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        """Compare the rows of a tar with its record, and with each other."""
        n = entry.n_samples
        views = [_decoded(self.manifest, rows, view) for view in range(self.manifest.views.count)]

        # Statuses, and the columns behind the last sample.
        status = rows["status"]
        ok = status == RowStatus.OK
        known = [int(s) for s in RowStatus if s != RowStatus.ABSENT]
        counts: Counter[str] = Counter()
        for s in status[:n][~ok[:n]].tolist():
            if s in known:
                counts[RowStatus(s).name.lower()] += 1
        if not np.isin(status[:n], known).all() or status[n:].any():
            self._add_problem(entry, "a sample without a status, or a status without a sample")
        if rows["key_hash"][n:].any() or rows["image_hash"][n:].any():
            self._add_problem(entry, "keys or images beyond the last sample")
        if len(np.unique(rows["key_hash"][:n])) != n:
            self._add_problem(entry, "two samples with the same key")

        # Embeddings.
        if not all(np.isfinite(view[ok[: len(view)]]).all() for view in views):
            self._add_problem(entry, "a nonfinite row with status ok")
        if not all(np.isnan(view[~ok[: len(view)]]).all() for view in views):
            self._add_problem(entry, "an embedding in a row without status ok")
        if ok.sum() != record.n_ok or counts != record.counts:
            self._add_problem(entry, "other counts of statuses than in the done record")
        if self._chunk_checksums(rows, n) != record.chunk_crc32c:
            self._add_problem(entry, "other chunk checksums than in the done record")

        # Crops.
        if self.manifest.views.cropped:
            params = [rows[params_name(view)][ok] for view in range(self.manifest.views.count)]
            problem = params_problem(np.concatenate(params))
            if problem:
                self._add_problem(entry, problem)

    def _chunk_checksums(self, rows: Arrays, n_samples: int) -> dict[str, tuple[int, ...]]:
        manifest = self.manifest
        sums = {}
        for name, spec in arrays(manifest).items():
            if spec.chunked:
                _, crcs = shard.encode(rows[name], manifest.chunk_rows, manifest.chunks_per_tar)
                sums[name] = tuple(crcs)
        return sums

    def _collect(self, entry: TarEntry, index: TarIndex | None, rows: Arrays) -> None:
        """Add the OK rows of a tar to the statistics and, with some luck, to the sample to be recomputed."""

        def name(ordinal: int) -> str:
            key = f" {index.samples[ordinal].key!r}" if index is not None else ""
            return f"{entry.path} ({entry.id}):{key} ordinal {ordinal}"

        ordinals = np.flatnonzero(rows["status"] == RowStatus.OK)
        views = [_decoded(self.manifest, rows, view)[ordinals] for view in range(self.manifest.views.count)]
        self.report.statistics.add(entry, name, ordinals, views, rows["image_hash"][ordinals])
        if not self.sample or index is None:
            return
        priorities = self.rng.random(len(ordinals))
        chosen_views = self.rng.integers(self.manifest.views.count, size=len(ordinals))
        for i in np.argsort(priorities)[: self.sample].tolist():
            ordinal = int(ordinals[i])
            view = int(chosen_views[i])
            row = SampledRow(
                priority=float(priorities[i]),
                entry=entry,
                location=index.location,
                sample=index.samples[ordinal],
                ordinal=ordinal,
                view=view,
                row_D=views[view][i].copy(),
                params_P=rows[params_name(view)][ordinal] if self.manifest.views.cropped else None,
                image_hash=int(rows["image_hash"][ordinal]),
            )
            self.sampled.append(row)
        self.sampled = heapq.nsmallest(self.sample, self.sampled, key=lambda row: row.priority)


def _decoded(manifest: Manifest, rows: Arrays, view: int) -> npt.NDArray[np.float32]:
    """Return the stored float32 embeddings of a view; NaN where there is none."""
    stored = rows[emb_name(view)]
    scale = rows[scale_name(view)][: len(stored)] if manifest.storage_dtype.scaled else None
    return manifest.storage_dtype.decode(stored, scale)


def _check_metadata(report: VerifyReport, manifest: Manifest, table: TarTable) -> bool:
    """Compare each metadata file with the manifest. Arrays may be longer: a build may be adding tars."""
    n_problems = len(report.problems)
    expected = empty_group(manifest, len(table.entries), MemoryStore())
    for name in arrays(manifest):
        path = f"{STORE}/{name}/zarr.json"
        try:
            raw = report.storage.read(path)
            content = {f"{name}/zarr.json": default_buffer_prototype().buffer.from_bytes(raw)}
            found = zarr.open_array(MemoryStore(content), path=name, mode="r", zarr_format=3)
        except (OSError, KeyError, ValueError, TypeError) as error:  # what zarr raises for damaged metadata
            report.problems.append(Problem(f"{path}: missing or damaged: {type(error).__name__}: {error}"))
            continue
        array: Any = expected[name]
        long_enough = found.shape[0] >= array.shape[0] and found.shape[0] % manifest.rows_per_tar == 0
        if _without_length(found.metadata) != _without_length(array.metadata) or not long_enough:
            report.problems.append(Problem(f"{path}: does not fit the manifest: {json.dumps(json.loads(raw))}"))
    try:
        report.storage.read(f"{STORE}/zarr.json")
    except OSError as error:
        report.problems.append(Problem(f"{STORE}/zarr.json: missing or damaged: {error}"))
    return len(report.problems) == n_problems


def _without_length(metadata: Any) -> str:
    """Return an array's metadata as text, except for the number of rows."""
    fields = metadata.to_dict()
    return json.dumps(fields | {"shape": fields["shape"][1:]}, default=str, sort_keys=True)


def _warn_of_anomalies(report: VerifyReport) -> None:
    statistics = report.statistics
    _, of_other_images = statistics.duplicates()
    for anomaly, text in (
        (statistics.zero, "zero rows with status ok"),
        (statistics.constant, "constant rows with status ok"),
        (of_other_images, "rows equal the row of another image"),
        (statistics.uniform, "tars whose rows are all equal although their images differ: does the teacher work?"),
    ):
        if anomaly.count:
            report.warnings.append(f"{text}: {anomaly}")


def _warn_of_unexpected_files(report: VerifyReport, manifest: Manifest, table: TarTable) -> None:
    expected = {f"{STORE}/zarr.json"} | {f"{STORE}/{array}/zarr.json" for array in arrays(manifest)}
    for entry in table.entries:
        expected.add(done_record_name(entry.id))
        expected.update(tar_files(manifest, entry.id).values())
    for top in (DONE, STORE, PARTIAL_FOLDER):
        unexpected = sorted({f"{top}/{name}" for name in report.storage.walk(top)} - expected)
        if unexpected:
            reason = (
                "left by a killed build or written by a running one"
                if top == PARTIAL_FOLDER
                else "of no tar of the cache"
            )
            report.warnings.append(f"{len(unexpected)} files {reason}: {', '.join(unexpected[:EXAMPLES_SHOWN])}")


def _fix(report: VerifyReport, manifest: Manifest, metadata_intact: bool) -> None:
    """Remove the tars with a problem, each done record first: without it the rest does not count.

    Tars without a record are left alone: a build may be writing them, and will write all of their rows in any case.
    """
    for tar_id in sorted({problem.tar_id for problem in report.problems if problem.tar_id is not None}):
        if report.storage.size(done_record_name(tar_id)) is None:
            continue
        report.storage.delete(done_record_name(tar_id))
        for path in tar_files(manifest, tar_id).values():
            report.storage.delete(path)
        report.fixed.append(tar_id)
    if not metadata_intact:
        fit_to_table(report.storage, manifest)

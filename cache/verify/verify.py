"""Verify a cache at three depths: its files and records, its values, and a sample of recomputed embeddings.

Rows are decoded by zarr-python, not by this package's own reader: a cache that passes can be used by any Zarr reader.
Each file is read once.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from threetowers.cache.format.done_record import DONE, done_record_name
from threetowers.cache.format.layout import STORE, arrays, tar_files
from threetowers.cache.format.manifest import Manifest, ManifestError, read_manifest
from threetowers.cache.format.store import empty_group, fit_to_table
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.processes.progress import progress_bar
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage, open_storage
from threetowers.cache.verify.image_checker import ImageChecker
from threetowers.cache.verify.recompute import recompute
from threetowers.cache.verify.report import Depth, Problem, VerifyReport
from threetowers.cache.verify.statistics import EXAMPLES_SHOWN
from threetowers.cache.verify.tar_checker import TarChecker
from threetowers.cache.verify.text_checker import TextChecker
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar
from threetowers.cache.webdataset.tar_list import OnBad
from threetowers.cache.webdataset.tar_patterns import expand


def verify(
    cache: str | Path | Storage,
    tars: Sequence[str | Path] | None = None,
    *,
    depth: Depth = "values",
    check_contents: bool = False,
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
    reports norms, zero and constant rows, and duplicates. `recompute` also embeds a random sample of rows again.

    Args:
        cache: folder, URL or storage of the cache.
        tars: patterns as for `build`: compare fingerprints and the keys of all samples too. `recompute` needs them.
        depth: how much to check.
        check_contents: also compare all images or captions in these tars with those that were embedded.
        sample: how many rows to recompute.
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
    if tars is None and (check_contents or depth == "recompute"):
        option = "--check-contents" if check_contents else "--depth recompute"
        raise ValueError(f"{option} compares with the tars: name them (--tars)")
    storage = open_storage(cache)
    manifest = read_manifest(storage)
    table = read_table(storage)
    report = VerifyReport(storage, depth, manifest.of, tars=len(table.entries))
    metadata_intact = _check_metadata(report, manifest, table)

    # Check each tar: first those that are given, together with the tar itself.
    n_recomputed = sample if depth == "recompute" else 0
    side_checker: type[TarChecker] = ImageChecker if manifest.of == "image" else TextChecker
    checker = side_checker(report, manifest, check_contents, n_recomputed, np.random.default_rng(seed))
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


def _check_metadata(report: VerifyReport, manifest: Manifest, table: TarTable) -> bool:
    """Compare each metadata file with the manifest. Arrays may be longer: a build may be adding tars."""
    n_problems = len(report.problems)
    expected = empty_group(manifest, len(table.entries), MemoryStore())
    for name, spec in arrays(manifest).items():
        path = f"{STORE}/{name}/zarr.json"
        try:
            raw = report.storage.read(path)
            content = {f"{name}/zarr.json": default_buffer_prototype().buffer.from_bytes(raw)}
            found = zarr.open_array(MemoryStore(content), path=name, mode="r", zarr_format=3)
        except (OSError, KeyError, ValueError, TypeError) as error:  # what zarr raises for damaged metadata
            report.problems.append(Problem(f"{path}: missing or damaged: {type(error).__name__}: {error}"))
            continue
        array: Any = expected[name]
        long_enough = found.shape[0] >= array.shape[0] and found.shape[0] % spec.per_tar(manifest) == 0
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
    contents = "images" if report.of == "image" else "captions"
    uniform = f"tars whose rows are all equal although their {contents} differ: does the teacher work?"
    anomalies = [
        (statistics.zero, "zero rows with status ok"),
        (statistics.constant, "constant rows with status ok"),
        (statistics.uniform, uniform),
    ]
    if report.of == "image":  # tokenizers make the same of captions that differ in case or at their ends
        _, of_others = statistics.duplicates()
        anomalies.append((of_others, "rows equal the row of another image"))
    for anomaly, text in anomalies:
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

"""Check a cache in three depths: its structure, its numbers, and their meaning by the live teacher.

Rows are decoded by zarr-python, not by this package's own reader: a cache that passes is one that any Zarr reader can
use. Each file is read once.
"""

from __future__ import annotations

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
from threetowers.cache.format.layout import STORE, RowStatus, arrays, emb_name, scale_name, slot_files, stored_rows
from threetowers.cache.format.manifest import Manifest, ManifestError, read_manifest
from threetowers.cache.format.store import Arrays, empty_group, fit_to_table, read_slot
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage, open_storage
from threetowers.cache.verify.recompute import Candidate, compare
from threetowers.cache.verify.report import Depth, Problem, Report
from threetowers.cache.verify.statistics import SHOWN
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_index import BadTar, TarIndex, expand, index_tar, key_hash


def verify(
    cache: str | Path | Storage,
    tars: Sequence[str | Path] | None = None,
    *,
    depth: Depth = "numbers",
    payloads: bool = False,
    sample: int = 64,
    seed: int = 0,
    min_cosine: float | None = None,
    weights: str | None = None,
    device: str = "cpu",
    fix: bool = False,
) -> Report:
    """Check every tar of a cache.

    Structure: manifest, tar table, Zarr metadata, done records, size and digest of every file. Numbers: statuses as
    recorded, OK rows finite, the others without numbers; norms, zero and constant rows and duplicates are reported.
    Meaning: rows of a random sample of pictures compared with what the teacher says of them now.

    Args:
        tars: patterns as for `build`: compare fingerprints and the keys of every sample too. Needed for meaning.
        payloads: also compare the bytes of these tars with those that were embedded.
        sample, seed: how many pictures to embed for `meaning`, and which.
        min_cosine: what a row must reach there, by default a little less than the precision tier allows.
        weights, device: the teacher for it (`live_teacher`).
        fix: remove the rows and the record of tars with a problem, and mend the Zarr metadata, for the next build.

    Raises:
        ContractError: no readable manifest or tar table, or a teacher that is not the cache's.
        ValueError: what needs tars without them, or a pattern that matches nothing.
    """
    if tars is None and (payloads or depth == "meaning"):
        raise ValueError(
            f"{'payloads' if payloads else 'depth meaning'}: name the tars that should be compared (--tars)"
        )
    storage = open_storage(cache)
    manifest, table = read_manifest(storage), read_table(storage)
    report = Report(storage, depth, tars=len(table.entries))
    check = _Check(report, manifest, payloads, sample if depth == "meaning" else 0, np.random.default_rng(seed))
    metadata_sound = _check_metadata(report, manifest, table)
    compared: set[int] = set()
    for path in expand(tars) if tars is not None else ():
        try:
            index = index_tar(path)
            entry = table.find(index)
        except (BadTar, ManifestError) as error:
            report.found.append(Problem(str(error)))
            continue
        compared.add(entry.id)
        report.tars_compared += check.tar(entry, index)
    for entry in table.entries:
        if entry.id not in compared:
            check.tar(entry, None)
    if tars is not None and len(compared) < len(table.entries):
        report.warnings.append(f"{len(table.entries) - len(compared)} tars of the table were not given to compare")
    _warn_of_numbers(report)
    _check_strangers(report, manifest, table)
    if depth == "meaning":
        report.meaning, problems = compare(manifest, check.candidates, weights, device, min_cosine)
        report.found += [Problem(text, tar_id) for tar_id, text in problems]
        report.tars_sound -= len({tar_id for tar_id, _ in problems})
    if fix and not report.ok:
        _fix(report, manifest, metadata_sound)
    return report


class _Check:
    """Checks tar after tar."""

    def __init__(
        self, report: Report, manifest: Manifest, payloads: bool, sample: int, rng: np.random.Generator
    ) -> None:
        self.report, self.manifest, self.payloads, self.sample, self.rng = report, manifest, payloads, sample, rng
        self.candidates: list[Candidate] = []  # a random sample of all OK rows so far: those of the smallest lots

    def tar(self, entry: TarEntry, index: TarIndex | None) -> bool:
        """Check one tar, and compare it with the tar itself if that is at hand; whether it is sound."""
        before = len(self.report.found)
        found = self._files(entry)
        if found is not None:
            record, rows = found
            if index is not None:
                self._compare(entry, index, record, rows)
            if self.report.depth != "structure":
                self._rows(entry, record, rows)
        if found is None or len(self.report.found) > before:
            return False
        self.report.tars_sound += 1
        self.report.samples += entry.n_samples
        self.report.ok_rows += record.n_ok
        self.report.counts.update(record.counts)
        if self.report.depth != "structure":
            self._numbers(entry, index, rows)
        return True

    def _problem(self, entry: TarEntry, text: str) -> None:
        self.report.found.append(Problem(f"tar {entry.path} ({entry.id}): {text}", entry.id))

    def _files(self, entry: TarEntry) -> tuple[DoneRecord, Arrays] | None:
        """The done record and the rows of a tar, if its files are those that were written."""
        storage, manifest = self.report.storage, self.manifest
        try:
            record = read_done_record(storage, manifest, entry)
            return record, read_slot(storage, manifest, entry, record)
        except ManifestError as error:
            self.report.found.append(Problem(str(error), entry.id))
            return None

    def _compare(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        found = rows["key_hash"][: entry.n_samples].tolist()
        for ordinal, expected in enumerate(key_hash(sample.key) for sample in index.samples):
            if found[ordinal] != expected:
                key = index.samples[ordinal].key
                self._problem(entry, f"ordinal {ordinal}: the row is not of key {key!r}")
                return
        if self.payloads:
            self._compare_bytes(entry, index, record, rows)

    def _compare_bytes(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        digest = xxhash.xxh3_128()
        try:
            changed = [
                key
                for ordinal, key, data in stream_images(index, digest)
                if xxhash.xxh3_64_intdigest(data) != rows["image_hash"][ordinal]
            ]
        except BadTar as error:
            self._problem(entry, str(error))
            return
        if changed:
            self._problem(
                entry, f"{len(changed)} images are not those that were embedded: {', '.join(changed[:SHOWN])}"
            )
        elif digest.hexdigest() != record.tar_xxh3_128:
            self.report.warnings.append(
                f"tar {entry.path} ({entry.id}): its bytes have changed, its images are those that were embedded"
            )

    def _rows(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        """Compare the rows of a tar with its record, and with themselves."""
        manifest, n = self.manifest, entry.n_samples
        status_S, hash_S, image_S = rows["status"], rows["key_hash"], rows["image_hash"]
        ok = status_S == RowStatus.OK
        known = [int(status) for status in RowStatus if status != RowStatus.ABSENT]
        counts = Counter(RowStatus(s).name.lower() for s in status_S[:n][~ok[:n]].tolist() if s in known)
        views = [decoded(manifest, rows, view) for view in range(manifest.views.count)]
        sums = {
            name: tuple(
                shard.encode(rows[name][: stored_rows(manifest, spec, n)], manifest.chunk_rows, manifest.n_chunks)[1]
            )
            for name, spec in arrays(manifest).items()
            if spec.chunked
        }
        checks = [
            (
                np.isin(status_S[:n], known).all() and not status_S[n:].any(),
                "a sample without a status, or one too many",
            ),
            (not hash_S[n:].any() and not image_S[n:].any(), "keys or images beyond the last sample"),
            (len(np.unique(hash_S[:n])) == n, "two samples with the same key"),
            (all(np.isfinite(view[ok]).all() for view in views), "a row with status ok that is not finite"),
            (all(np.isnan(view[~ok]).all() for view in views), "numbers in a row without status ok"),
            (ok.sum() == record.n_ok and counts == record.counts, "other counts of statuses than the done record"),
            (sums == record.chunk_crc32c, "other chunk checksums than the done record"),
        ]
        if "view_params" in rows:
            box_nK4, flip_nK = rows["view_params"][ok][..., :4], rows["view_params"][ok][..., 4]
            inside = (box_nK4 >= 0).all() and (box_nK4 <= 1).all() and (box_nK4[..., :2] < box_nK4[..., 2:]).all()
            checks.append((bool(inside and np.isin(flip_nK, (0, 1)).all()), "a crop that is not inside its picture"))
        for holds, text in checks:
            if not holds:
                self._problem(entry, text)

    def _numbers(self, entry: TarEntry, index: TarIndex | None, rows: Arrays) -> None:
        def name(ordinal: int) -> str:
            key = f" {index.samples[ordinal].key!r}" if index is not None else ""
            return f"{entry.path} ({entry.id}):{key} ordinal {ordinal}"

        ordinals = np.flatnonzero(rows["status"] == RowStatus.OK)
        views = [decoded(self.manifest, rows, view)[ordinals] for view in range(self.manifest.views.count)]
        self.report.numbers.add(entry, name, ordinals, views, rows["image_hash"][ordinals])
        if not self.sample or index is None:
            return
        lots = self.rng.random(len(ordinals))
        chosen = self.rng.integers(self.manifest.views.count, size=len(ordinals))
        for i in np.argsort(lots)[: self.sample].tolist():
            ordinal, view = int(ordinals[i]), int(chosen[i])
            params = rows["view_params"][ordinal, view] if "view_params" in rows else None
            image = int(rows["image_hash"][ordinal])
            self.candidates.append(
                Candidate(
                    float(lots[i]),
                    entry,
                    index.location,
                    index.samples[ordinal],
                    ordinal,
                    view,
                    views[view][i].copy(),
                    params,
                    image,
                )
            )
        self.candidates = heapq.nsmallest(self.sample, self.candidates, key=lambda candidate: candidate.lot)


def decoded(manifest: Manifest, rows: Arrays, view: int) -> npt.NDArray[np.float32]:
    """(slot, D) float32 embeddings of a view; NaN where there is none."""
    scale = rows[scale_name(view)] if manifest.precision.scaled else None
    return manifest.precision.decode(rows[emb_name(view)], scale)


def _check_metadata(report: Report, manifest: Manifest, table: TarTable) -> bool:
    """Compare each metadata file with what the manifest asks for. Arrays may be longer: a build is adding tars."""
    before = len(report.found)
    expected = empty_group(manifest, len(table.entries), MemoryStore())
    for name in arrays(manifest):
        path = f"{STORE}/{name}/zarr.json"
        try:
            raw = report.storage.read(path)
            content = {f"{name}/zarr.json": default_buffer_prototype().buffer.from_bytes(raw)}
            found = zarr.open_array(MemoryStore(content), path=name, mode="r", zarr_format=3)
        except (OSError, KeyError, ValueError, TypeError) as error:  # what zarr raises for damaged metadata
            report.found.append(Problem(f"{path}: missing or damaged: {type(error).__name__}: {error}"))
            continue
        asked: Any = expected[name]
        longer = found.shape[0] >= asked.shape[0] and found.shape[0] % manifest.slot == 0
        if _plain(found.metadata) != _plain(asked.metadata) or not longer:
            report.found.append(Problem(f"{path}: not as the manifest asks: {json.dumps(json.loads(raw))}"))
    try:
        report.storage.read(f"{STORE}/zarr.json")
    except OSError as error:
        report.found.append(Problem(f"{STORE}/zarr.json: missing or damaged: {error}"))
    return len(report.found) == before


def _plain(metadata: Any) -> str:
    fields = metadata.to_dict()
    return json.dumps(fields | {"shape": fields["shape"][1:]}, default=str, sort_keys=True)


def _warn_of_numbers(report: Report) -> None:
    numbers = report.numbers
    _, strange = numbers.duplicates()
    for odd, text in (
        (numbers.zero, "zero rows with status ok"),
        (numbers.constant, "constant rows with status ok"),
        (strange, "rows equal the row of another picture"),
        (numbers.uniform, "tars whose rows are all equal, of different pictures: does the teacher see them?"),
    ):
        if odd.count:
            report.warnings.append(f"{text}: {odd}")


def _check_strangers(report: Report, manifest: Manifest, table: TarTable) -> None:
    ids = range(len(table.entries))
    expected = {done_record_name(i) for i in ids} | {path for i in ids for path in slot_files(manifest, i).values()}
    expected |= {f"{STORE}/{name}zarr.json" for name in ("", *(f"{array}/" for array in arrays(manifest)))}
    for top in (DONE, STORE, PARTIAL_FOLDER):
        strange = sorted({f"{top}/{name}" for name in report.storage.walk(top)} - expected)
        if strange:
            why = (
                "left by a build that was killed or still runs"
                if top == PARTIAL_FOLDER
                else "no tar of the table owns them"
            )
            report.warnings.append(f"{len(strange)} files, {why}: {', '.join(strange[:SHOWN])}")


def _fix(report: Report, manifest: Manifest, metadata_sound: bool) -> None:
    """Remove what is bad, each done record first: without it the rest is as good as absent.

    Tars without a record are left alone: a build may be writing them, and will write them whole in any case.
    """
    for tar_id in sorted({problem.tar_id for problem in report.found if problem.tar_id is not None}):
        if report.storage.size(done_record_name(tar_id)) is None:
            continue
        report.storage.delete(done_record_name(tar_id))
        for path in slot_files(manifest, tar_id).values():
            report.storage.delete(path)
        report.fixed.append(tar_id)
    if not metadata_sound:
        fit_to_table(report.storage, manifest)

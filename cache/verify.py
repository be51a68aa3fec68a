"""Check a cache: its structure, its numbers, and, where the tars are at hand, that it is theirs.

Rows are read through zarr-python, not through this package's own reader: a cache that passes is one that any Zarr
reader can use.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zarr
from zarr.storage import MemoryStore

from threetowers.cache import shard
from threetowers.cache.contract import Contract, ContractError, TarEntry, TarTable, read_contract
from threetowers.cache.layout import STORE, Status, slot_files
from threetowers.cache.place import STAGING, Place, place_of
from threetowers.cache.record import DONE, FileSum, Record, read_record
from threetowers.cache.store import empty_group
from threetowers.cache.tars import BadTar, expand, index_tar, key_hash

SHOWN = 5


@dataclass
class Report:
    """What `verify` found. `problems` make a cache unfit; `warnings` are for a person to judge."""

    place: Place
    tars: int = 0
    tars_sound: int = 0
    tars_compared: int = 0
    samples: int = 0
    ok_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    norms: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.problems

    def text(self) -> str:
        """The report for a person."""
        bad = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "none"
        lines = [
            f"{self.place}: {'sound' if self.ok else 'NOT SOUND'}",
            f"tars       {self.tars_sound} sound of {self.tars}, {self.tars_compared} compared with the tar itself",
            f"samples    {self.samples} in sound tars, {self.ok_rows} with an embedding, without: {bad}",
            f"duplicates {self.duplicates} rows equal an earlier row bit for bit",
            *_histogram(self.norms),
            *(f"warning: {line}" for line in self.warnings),
            *(f"PROBLEM: {line}" for line in self.problems),
        ]
        return "\n".join(lines)


def verify(cache: str | Path | Place, tars: Sequence[str | Path] | None = None, *, payloads: bool = False) -> Report:
    """Check every tar of a cache.

    Structure: manifest, tar table, Zarr metadata, done records, size and digest of every file. Numbers: statuses as
    recorded, OK rows finite, the others NaN; zero and constant rows, exact duplicates and norms are reported. With
    `tars` (patterns as for `build`): fingerprints and the keys of every sample; with `payloads` also the digest of
    every byte of these tars.

    Raises:
        ContractError: no readable manifest.
        ValueError: `payloads` without `tars`, or a pattern that matches nothing.
    """
    if payloads and tars is None:
        raise ValueError("payloads: name the tars whose bytes should be compared")
    place = place_of(cache)
    contract, table = read_contract(place)
    report = Report(place, tars=len(table.entries))
    group = _check_metadata(report, contract, table)
    records: dict[int, Record] = {}
    norms, digests = [], []
    for entry in table.entries if group is not None else ():
        problems = len(report.problems)
        record = _check_files(report, contract, entry)
        if record is not None and group is not None:
            emb_nD = _check_rows(report, contract, entry, record, group)
            if len(report.problems) == problems:
                records[entry.id] = record
                report.tars_sound += 1
                norms.append(_check_values(report, entry, emb_nD))
                digests.append(np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in emb_nD], dtype=np.uint64))
    if norms:
        report.norms = np.concatenate(norms)
        report.duplicates = len(report.norms) - len(np.unique(np.concatenate(digests)))
    _check_strangers(report, table)
    if tars is not None:
        _check_tars(report, table, records, expand(tars), group, payloads)
    return report


def _check_metadata(report: Report, contract: Contract, table: TarTable) -> zarr.Group | None:
    expected = empty_group(contract, len(table.entries), MemoryStore())
    try:
        group = zarr.open_group(report.place.at(STORE), mode="r", zarr_format=3)
        for name in ("emb", "key_hash", "status"):
            found = _plain(group[name].metadata)
            if found != _plain(expected[name].metadata):
                report.problems.append(f"{STORE}/{name}/zarr.json: not as the manifest asks: {found}")
    except (OSError, KeyError, ValueError, TypeError) as error:  # what zarr raises for missing or damaged metadata
        report.problems.append(f"{STORE}: zarr.json missing or damaged: {type(error).__name__}: {error}")
        return None
    return None if report.problems else group


def _plain(metadata: Any) -> str:
    return json.dumps(metadata.to_dict(), default=str, sort_keys=True)


def _check_files(report: Report, contract: Contract, entry: TarEntry) -> Record | None:
    try:
        record = read_record(report.place, contract, entry)
    except ContractError as error:
        report.problems.append(str(error))
        return None
    for name, path in slot_files(entry.id).items():
        if FileSum.of(report.place.read(path)) != record.files[name]:
            report.problems.append(f"tar {entry.path} ({entry.id}): {path} is not the file that was written")
            return None
    return record


def _check_rows(
    report: Report, contract: Contract, entry: TarEntry, record: Record, group: zarr.Group
) -> npt.NDArray[np.floating]:
    """Compare the rows of a tar with its record and return the OK ones."""
    where, n = f"tar {entry.path} ({entry.id})", entry.n_samples
    try:
        emb_SD, hash_S, status_S = (
            _read(group, name, entry.id, contract.slot) for name in ("emb", "key_hash", "status")
        )
    except ValueError as error:  # zarr's checksums
        report.problems.append(f"{where}: zarr cannot read it: {error}")
        return np.zeros((0, contract.dim), dtype=contract.dtype)
    ok = status_S == Status.OK
    known = [int(status) for status in Status if status != Status.ABSENT]
    stored = -(-n // contract.chunk_rows) * contract.chunk_rows
    _, sums = shard.encode(emb_SD[:stored], contract.chunk_rows, contract.slot // contract.chunk_rows)
    counts = Counter(Status(status).name.lower() for status in status_S[:n][~ok[:n]].tolist() if status in known)
    for holds, problem in (
        (np.isin(status_S[:n], known).all() and not status_S[n:].any(), "a sample without a status, or one too many"),
        (not hash_S[n:].any(), "keys beyond the last sample"),
        (len(np.unique(hash_S[:n])) == n, "two samples with the same key"),
        (np.isfinite(emb_SD[ok]).all(), "a row with status ok that is not finite"),
        (np.isnan(emb_SD[~ok]).all(), "numbers in a row without status ok"),
        (ok.sum() == record.n_ok and counts == record.counts, "other counts of statuses than the done record"),
        (tuple(sums) == record.chunk_crc32c, "other chunk checksums than the done record"),
    ):
        if not holds:
            report.problems.append(f"{where}: {problem}")
    report.samples += n
    report.ok_rows += int(ok.sum())
    report.counts.update(counts)
    rows: npt.NDArray[np.floating] = emb_SD[ok]
    return rows


def _read(group: zarr.Group, name: str, tar_id: int, slot: int) -> npt.NDArray[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[tar_id * slot : (tar_id + 1) * slot])


def _check_values(report: Report, entry: TarEntry, emb_nD: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    where, wide_nD = f"tar {entry.path} ({entry.id})", emb_nD.astype(np.float32)
    zero = ~wide_nD.any(axis=1)
    constant = ~zero & (np.ptp(wide_nD, axis=1) == 0) & (wide_nD.shape[1] > 1)
    for count, kind in ((int(zero.sum()), "zero"), (int(constant.sum()), "constant")):
        if count:
            report.warnings.append(f"{where}: {count} {kind} rows among {len(wide_nD)} with status ok")
    if len(wide_nD) > 1 and (wide_nD == wide_nD[0]).all():
        report.warnings.append(f"{where}: all {len(wide_nD)} rows are equal: does the teacher see the images?")
    norms: npt.NDArray[np.float32] = np.linalg.norm(wide_nD.astype(np.float64), axis=1).astype(np.float32)
    return norms


def _check_strangers(report: Report, table: TarTable) -> None:
    ids = range(len(table.entries))
    expected = {f"{DONE}/{i}.json" for i in ids} | {path for i in ids for path in slot_files(i).values()}
    expected |= {f"{STORE}/{name}zarr.json" for name in ("", "emb/", "key_hash/", "status/")}
    for top in (DONE, STORE, STAGING):
        strange = sorted({f"{top}/{name}" for name in report.place.walk(top)} - expected)
        if strange:
            why = "left by a build that was killed or still runs" if top == STAGING else "no tar of the table owns them"
            report.warnings.append(f"{len(strange)} files, {why}: {', '.join(strange[:SHOWN])}")


def _check_tars(
    report: Report,
    table: TarTable,
    records: dict[int, Record],
    paths: Sequence[Path],
    group: zarr.Group | None,
    payloads: bool,
) -> None:
    for path in paths:
        try:
            index = index_tar(path)
            entry = table.find(index)
        except (BadTar, ContractError) as error:
            report.problems.append(str(error))
            continue
        if group is None or entry.id not in records:
            continue  # named above
        slot = group.attrs["slot"]
        assert isinstance(slot, int)
        found = _read(group, "key_hash", entry.id, slot)[: entry.n_samples].tolist()
        expected = [key_hash(sample.key) for sample in index.samples]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
            key = index.samples[at].key if at < len(expected) else None
            report.problems.append(f"tar {path} ({entry.id}): ordinal {at}: the row is not of key {key!r}")
        if payloads and _file_digest(path) != records[entry.id].tar_xxh3_128:
            report.problems.append(f"tar {path} ({entry.id}): its bytes are not those that were embedded")
        report.tars_compared += 1
    if len(paths) < len(table.entries):
        report.warnings.append(f"{len(table.entries) - len(paths)} tars of the table were not given to compare")


def _file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _histogram(norms: npt.NDArray[np.float32]) -> list[str]:
    if not len(norms):
        return ["norms      no rows"]
    low, median, high = np.percentile(norms, [1, 50, 99])
    counts, edges = np.histogram(norms, bins=10)
    lines = [f"norms      1 % {low:.4g}, median {median:.4g}, 99 % {high:.4g}"]
    for count, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
        lines.append(f"  {a:10.4g} to {b:10.4g}  {count:9d} {'#' * int(np.ceil(40 * count / counts.max()))}")
    return lines

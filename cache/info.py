"""What a cache holds, and how much of it is built."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from threetowers.cache.format.done_record import DoneRecord, RejectedSample, read_done_record
from threetowers.cache.format.manifest import Manifest, ManifestError, read_manifest
from threetowers.cache.format.tar_table import TarTable, read_table
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.tar_list import counts_by_reason

MAX_BAD_LISTED = 20
MAX_MISSING_LISTED = 5


@dataclass(frozen=True)
class CacheInfo:
    """The manifest, tar table and done records of a cache.

    Attributes:
        records: Of the tars that are built.
        bad: Path of the tar, and sample, of the samples without an embedding that the records name.
        missing: Why each of the other tars counts as not built.
    """

    storage: Storage
    manifest: Manifest
    table: TarTable
    records: list[DoneRecord]
    bad: list[tuple[str, RejectedSample]]
    missing: list[str]

    def text(self) -> str:
        """Return the information as aligned lines."""
        manifest, records = self.manifest, self.records
        counts: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        ignored: Counter[str] = Counter()
        for record in records:
            counts.update(record.counts)
            notes.update(record.notes)
            ignored.update(record.ignored_members)
        n_all = sum(entry.n_samples for entry in self.table.entries)
        n_samples = sum(record.n_samples for record in records)
        n_ok = sum(record.n_ok for record in records)
        n_rows = sum(record.n_rows for record in records)
        n_bytes = sum(file.size for record in records for file in record.files.values())
        cosines = [record.cosines.min for record in records if record.cosines.min is not None]

        versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        lines = [
            f"{self.storage}: {manifest.encoder}, weights {manifest.weights} (sha256 {manifest.weights_digest[:16]})",
            f"feature   {manifest.feature}, {manifest.dim} x {manifest.dtype}, {input_text(manifest)}",
            contents_text(manifest),
            f"computed  in {manifest.precision} by {manifest.runtime}{batches_text(manifest, records)}",
        ]
        if manifest.image_member is not None:
            lines.append(f"image     the member .{manifest.image_member} of each sample")
        if cosines:
            lines.append(
                f"dtype     {manifest.dtype}: cosine between computed and stored rows at least {min(cosines):.7f}"
            )
        if origins := counts_by_reason(
            Counter(f"by {record.source}" for record in records if record.source != "teacher")
        ):
            lines.append(f"tars      whose rows were not computed here: {origins}")
        lines += [
            f"versions  {versions or 'not known'}",
            f"tars      {len(records)} of {len(self.table.entries)} built, from {self.table.root}",
            f"samples   {n_samples} of {n_all}: {n_ok} embedded, {counts_text(counts)}",
            *([f"rows      {n_rows}, {n_rows / n_ok:.2f} captions a sample"] if manifest.of == "text" and n_ok else []),
            f"bytes     {n_bytes}",
            *note_lines(notes, ignored),
            *bad_sample_lines(self.bad[:MAX_BAD_LISTED], counts.total()),
            *(f"not built: {line}" for line in self.missing[:MAX_MISSING_LISTED]),
        ]
        if len(self.missing) > MAX_MISSING_LISTED:
            lines.append(f"not built: {len(self.missing) - MAX_MISSING_LISTED:,} more")
        return "\n".join(lines)


def contents_text(manifest: Manifest) -> str:
    """Return a line on which views of the images, or which captions, a cache holds."""
    if manifest.of == "image":
        return f"views     {manifest.views}"
    sources = manifest.caption_sources
    lines = ", each line of a text member" if sources.caption_per_line else ""
    named = ", ".join(sources.names) if sources.sources else sources.caption_format.sources_text()
    return f"captions  from {named}{lines}"


def batches_text(manifest: Manifest, records: Sequence[DoneRecord]) -> str:
    """Return how many images or captions a forward pass took, where the rows of a tar were computed here."""
    sizes = sorted({record.batch_size for record in records if record.source == "teacher"})
    what = "captions" if manifest.of == "text" else "images"
    return f", {' or '.join(map(str, sizes))} {what} per forward pass" if sizes else ""


def input_text(manifest: Manifest) -> str:
    """Return in words how the teacher takes its input."""
    if manifest.text is not None:
        text = manifest.text
        prompt = f", prompt {text.prompt!r}" if text.prompt else ""
        unit = ", to unit norm" if text.normalize else ""
        return f"captions of up to {text.max_length} tokens{prompt}, pooled by {text.pooling}{unit}"
    preprocessing = manifest.image_preprocessing
    height, width = preprocessing.input_size
    return f"{height} x {width} px, {preprocessing.interpolation}, crop {preprocessing.crop_pct}"


def read_info(cache: str | Path) -> CacheInfo:
    """Read what the cache in a folder or at a URL holds.

    Raises:
        ManifestError: There is no cache, or its manifest or tar table is damaged.
    """
    storage = open_storage(cache)
    manifest = read_manifest(storage)
    table = read_table(storage)
    records: list[DoneRecord] = []
    bad: list[tuple[str, RejectedSample]] = []
    missing: list[str] = []
    for entry in table.entries:
        try:
            record = read_done_record(storage, manifest, entry)
        except ManifestError as error:
            missing.append(str(error))
            continue
        records.append(record)
        bad += [(entry.path, sample) for sample in record.bad]
    return CacheInfo(storage, manifest, table, records, bad, missing)


def counts_text(counts: Mapping[str, int]) -> str:
    """Return the numbers of samples without an embedding, by status, as text."""
    named = [f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items())]
    return ", ".join(named) or "none without an embedding"


def note_lines(notes: Mapping[str, int], ignored: Mapping[str, int]) -> list[str]:
    """Return lines on what was tolerated in embedded samples, and on members that nothing reads."""
    lines = []
    if notes:
        lines.append(f"noted     {counts_by_reason(notes)}")
    if ignored:
        lines.append(f"not read  {counts_by_reason(ignored)}")
    return lines


def bad_sample_lines(bad: Sequence[tuple[str, RejectedSample]], total: int) -> list[str]:
    """Return a line for each of these samples without an embedding: its tar, key, ordinal and the reason.

    A last line tells how many of `total` these are not.
    """
    lines = [f"  {path}: {sample.key} (ordinal {sample.ordinal}): {sample.reason}" for path, sample in bad]
    if len(bad) < total:
        lines.append(f"  and {total - len(bad):,} more without an embedding")
    return lines

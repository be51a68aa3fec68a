"""Make a cache of embeddings that another tool has computed: no image is decoded, and the encoder embeds none.

The rows are joined to the samples of the tars, one tar at a time. In memory are 17 bytes for each row of the source,
about twice as many while they are sorted, the headers of the tars, and the rows of one tar; matrices are memory-mapped.
"""

import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.builder.opening import (
    check_compatible,
    create,
    new_manifest,
    requested_manifest,
    requested_room,
)
from threetowers.cache.encoders.encoder import UNIT, FrozenEncoder, ImageEncoder
from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.datacompdr.finders import CropRowFinder, ReinforcedCaptionFinder
from threetowers.cache.exchange.datacompdr.reinforced_tars import ReinforcedTars
from threetowers.cache.exchange.import_config import ImportConfig
from threetowers.cache.exchange.import_source import UNIT_TOLERANCE, ImportSource
from threetowers.cache.exchange.row_finder import CaptionRowFinder, ImageRowFinder, JoinedTar, RowFinder
from threetowers.cache.exchange.sample_keys import sample_name
from threetowers.cache.exchange.source_rows import SourceRows
from threetowers.cache.format.done_record import (
    DoneRecord,
    RejectedSample,
    done_record_name,
    finished_tars,
    read_done_record,
)
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import MANIFEST, Manifest, ManifestError, Side, read_manifest, to_json
from threetowers.cache.format.row_buffer import MAX_BAD_SHOWN, Provenance
from threetowers.cache.format.store import fit_to_table
from threetowers.cache.format.tar_table import TarEntry, extend
from threetowers.cache.info import bad_sample_lines, counts_text, note_lines
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.captions import caption_hash
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash
from threetowers.cache.webdataset.tar_list import index_tars, refuse_defects, require_samples
from threetowers.cache.webdataset.tar_patterns import expand

MAX_NAMES_SHOWN = 5
CAPTION_THREADS = 4  # that count captions for the room of a cache of text


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes:
        storage: the cache.
        tars: tars written now.
        kept: tars finished before.
        samples: samples of the tars written now; each is `ok` or in `counts`.
        ok: samples with an embedding.
        counts: samples without one, by status: `filtered` have no row in the source.
        notes: embedded samples of which something was tolerated, by what it was.
        bad: the first few without an embedding, with the path of their tar.
        left: tars that `cache build` has to build.
        rows: rows of the source, or its samples with several rows each, as `units` says.
        used: of them, those that go with samples, also of tars finished before.
        repeated: of them, those whose key an earlier row has too, with the same values.
        unused_names: the first few of the others.
        units: what `rows` counts.
        tar_notes: lines on tars that are not used.
        seconds: wall time.
    """

    storage: Storage
    tars: int
    kept: int
    samples: int
    ok: int
    counts: dict[str, int]
    notes: dict[str, int]
    bad: tuple[tuple[str, RejectedSample], ...]
    left: tuple[str, ...]
    rows: int
    used: int
    repeated: int
    unused_names: tuple[str, ...]
    units: str
    tar_notes: tuple[str, ...]
    seconds: float

    @property
    def unmatched(self) -> int:
        """Rows of the source that go with no sample of the cache."""
        return self.rows - self.used - self.repeated

    def text(self) -> str:
        """Return the report for a person."""
        lines = [
            f"{self.storage}: {self.tars} tars written, {self.kept} already finished, in {self.seconds:.1f} s",
            f"{self.samples} samples: {self.ok} with rows, {counts_text(self.counts)}",
            *note_lines(self.notes, {}),
            *bad_sample_lines(self.bad, sum(self.counts.values())),
            f"{self.rows} {self.units}: {self.used} used, {self.unmatched} of no sample of these tars, "
            f"{self.repeated} repeated",
            *(f"  of no sample: {name}" for name in self.unused_names),
            *self.tar_notes,
        ]
        if self.left:
            shown = ", ".join(self.left[:MAX_NAMES_SHOWN])
            lines.append(f"left to `threetowers cache build`: {len(self.left)} tars: {shown}")
        return "\n".join(lines)


def import_cache(config: ImportConfig) -> ImportReport:
    """Create a cache from the files of another tool. Run it again to resume.

    Raises:
        BadSource: The files cannot be used, or go with no sample, or not with the encoder.
        ManifestError: a sample has no row (`missing` is error), or the output has something else in it.
        RoundingError: a row that the dtype stores with a smaller cosine to itself than `min_cosine`.
        BadTar, BadSample, ValueError: bad input, named in the message.
    """
    started = time.monotonic()
    storage = open_storage(config.output_dir)
    parts = config.parts()
    listed = require_samples(index_tars(expand(config.tars), config.image_member, config.on_bad))
    indexes = listed.tars
    reinforced = _index_reinforced(config, indexes)
    if config.on_bad == "error" and config.of == "image":
        refuse_defects(indexes)

    # What is said of the rows must be true of the encoder.
    encoder = config.build_config(1).load_encoder(config.device)
    feature = config.feature or encoder.side(config.of).features[0]
    source: SourceRows | ReinforcedTars
    if reinforced:
        source = ReinforcedTars(reinforced, config.of, config.match, config.column_range())
    else:
        source = SourceRows(parts, _hash_of(config))
    build = config.build_config(source.n_crops if isinstance(source, ReinforcedTars) else 0)
    _check_encoder(source, encoder, config.of, feature)

    # Something of the source must go with the tars.
    finder = _finder(source, indexes, build, config)
    if not any(finder.has_any(index) for index in indexes):
        raise BadSource(
            f"none of {len(source)} {source.units} goes with a sample of these tars: {source.first_key()}, the "
            f"first sample has the key {indexes[0].samples.key(0)!r}: name another column (--key-column), other "
            "captions (--captions), or compare names or uids alone (--match)"
        )

    # Write the tars that are not finished.
    manifest = _open_or_create(storage, encoder, build, indexes)
    extend(storage, indexes, manifest.samples_per_tar)
    table = fit_to_table(storage, manifest)
    finished = finished_tars(storage, indexes)
    records: list[tuple[TarEntry, DoneRecord]] = []
    left = []
    for index in indexes:
        entry = table.find(index)
        if index.fingerprint in finished:
            finder.mark_used(index, storage, manifest, entry, read_done_record(storage, manifest, entry))
            continue
        begun = time.monotonic()
        joined = finder.take(index, manifest)
        _apply_policies(joined, config)
        if joined.missing and config.missing == "build":
            left.append(index.location)
        else:
            records.append((entry, _write(storage, entry, joined, begun)))
    return _report(storage, config, source, records, left, len(finished), listed.notes(), started)


def _index_reinforced(config: ImportConfig, indexes: Sequence[TarIndex]) -> list[TarIndex]:
    """Return the tars of DataCompDR, if any are named; those that have the images too are indexed already."""
    if not config.datacompdr:
        return []
    known = {index.location: index for index in indexes}
    locations = expand(config.datacompdr)
    others = [location for location in locations if location not in known]
    found = index_tars(others, None, config.on_bad).tars if others else []
    known |= {index.location: index for index in found}
    tars = [known[location] for location in locations if location in known]
    if not tars:
        raise BadSource(f"none of {len(locations)} tars can be used and holds a sample (--datacompdr): {locations[0]}")
    return tars


def _finder(
    source: SourceRows | ReinforcedTars, indexes: Sequence[TarIndex], build: BuildConfig, config: ImportConfig
) -> RowFinder:
    """Return what finds the rows of a source. Raises BadSource where one would go with two samples."""
    captions = build.caption_sources().caption_format
    if isinstance(source, ReinforcedTars):
        if config.of == "image":
            return CropRowFinder(source, indexes, config.match, config.view_size, config.min_cosine)
        return ReinforcedCaptionFinder(source, indexes, config.match, captions, config.min_cosine)
    if config.of == "image":
        return ImageRowFinder(source, indexes, config.match, config.min_cosine)
    return CaptionRowFinder(source, captions, config.min_cosine)


def _hash_of(config: ImportConfig) -> Any:
    """Return what makes a number of a key in the source, as `RowFinder` makes one of a sample."""
    if config.of == "text":
        return lambda caption: caption_hash(caption.strip())
    return (lambda key: key_hash(sample_name(key))) if config.match == "name" else key_hash


def _check_encoder(source: ImportSource, encoder: FrozenEncoder, of: Side, feature: str) -> None:
    """Raise BadSource unless the rows can be this feature of the encoder, by their width and norm."""
    side = encoder.side(of)
    path = source.location
    if side.width(feature) != source.dim:
        widths = ", ".join(f"{name} {side.width(name)}" for name in side.features)
        raise BadSource(
            f"{path}: rows of width {source.dim}, expected {side.width(feature)}, that of {feature!r} of "
            f"{encoder.name} ({widths}): name another --feature or --encoder"
            + (", or the --columns of this one" if isinstance(source, ReinforcedTars) else "")
        )
    if isinstance(side, ImageEncoder):
        grey_13HW = torch.full((1, 3, *side.preprocessing.input_size), 128, dtype=torch.uint8)
        norm = float(side.embed(grey_13HW, feature).norm())
    else:
        norm = float(side.embed(["a photo"], feature).norm())
    has_unit_norm = abs(norm - 1) < UNIT_TOLERANCE
    if source.have_unit_norm() and not has_unit_norm:
        raise BadSource(
            f"{path}: rows of unit norm, where {feature!r} of {encoder.name} has the norm {norm:.3g}: say that they "
            f"were scaled (--feature {UNIT}{feature})"
        )
    if has_unit_norm and not source.have_unit_norm():
        raise BadSource(
            f"{path}: rows that do not have unit norm, where {feature!r} of {encoder.name} has: name the feature that "
            "they are (--feature)"
        )


def _open_or_create(
    storage: Storage, encoder: FrozenEncoder, build: BuildConfig, indexes: Sequence[TarIndex]
) -> Manifest:
    """Return the manifest of the cache, which is created if there is none: that of a build, but for the versions.

    Those of the packages that made the rows are not known.
    """
    (source,) = build.sources()
    if storage.size(MANIFEST) is None:
        with ThreadPoolExecutor(CAPTION_THREADS) as pool:
            created = new_manifest(indexes, encoder, source, build, pool)
        create(storage, replace(created, versions={}))
    manifest = read_manifest(storage)
    room = requested_room(manifest, source, build)
    requested = requested_manifest(encoder, source, build.dtype, room, manifest.batch_size, build)
    check_compatible(storage, manifest, requested)
    return manifest


def _apply_policies(joined: JoinedTar, config: ImportConfig) -> None:
    """Raise ManifestError for a sample without a row, BadSample for another one without an embedding, if asked to."""
    index = joined.rows.index
    if joined.missing and config.missing == "error":
        named = [f"{index.samples.key(ordinal)!r}: {why}" for ordinal, why in joined.missing[:MAX_NAMES_SHOWN]]
        raise ManifestError(
            f"{index.location}: {len(joined.missing)} of {len(index.samples)} samples have no row: {'; '.join(named)}. "
            "Choose --missing filtered to give them a status, or --missing build to leave their tars to the teacher"
        )
    bad = [sample for sample in joined.rows.bad if sample.status != RowStatus.FILTERED]
    if bad and config.on_bad == "error":
        raise BadSample(
            f"{index.describe(bad[0].ordinal)}: {bad[0].reason}; --on-bad skip leaves it out",
            RowStatus(bad[0].status).name.lower().replace("_", " "),
        )


def _write(storage: Storage, entry: TarEntry, joined: JoinedTar, begun: float) -> DoneRecord:
    joined.rows.check_complete()
    provenance = Provenance("import", 0, "none", time.monotonic() - begun, "none")
    record = joined.rows.write(storage, entry, joined.tar_xxh3_128, provenance)
    storage.remove_partial(str(entry.id))
    storage.put(done_record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
    return record


def _report(
    storage: Storage,
    config: ImportConfig,
    source: ImportSource,
    records: Sequence[tuple[TarEntry, DoneRecord]],
    left: Sequence[str],
    kept: int,
    tar_notes: Sequence[str],
    started: float,
) -> ImportReport:
    counts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    bad: list[tuple[str, RejectedSample]] = []
    for entry, record in records:
        counts.update(record.counts)
        notes.update(record.notes)
        bad += [(entry.path, sample) for sample in record.bad]
    unused = source.first_unused(MAX_NAMES_SHOWN)
    return ImportReport(
        storage=storage,
        tars=len(records),
        kept=kept,
        samples=sum(record.n_samples for _, record in records),
        ok=sum(record.n_ok for _, record in records),
        counts=dict(counts),
        notes=dict(notes),
        bad=tuple(bad[:MAX_BAD_SHOWN]),
        left=tuple(left),
        rows=len(source),
        used=int(np.count_nonzero(source.used_N)),
        repeated=source.repeated,
        units=source.units,
        unused_names=tuple(source.name(row) for row in unused),
        tar_notes=tuple(tar_notes),
        seconds=time.monotonic() - started,
    )

"""Carry the rows of a cache over to other tars of the same samples: split, merged, filtered or downloaded again.

A row goes with a sample if the hashes of its key and of its image's bytes, or of its caption, equal those stored beside
the row. No image is decoded and no teacher runs; the tars are read once.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from threetowers.cache.builder.opening import check_compatible, create
from threetowers.cache.format.done_record import done_record_name, finished_tars
from threetowers.cache.format.layout import TarRoom
from threetowers.cache.format.manifest import MANIFEST, Manifest, ManifestError, Side, read_manifest, to_json
from threetowers.cache.format.row_buffer import Provenance
from threetowers.cache.format.store import fit_to_table
from threetowers.cache.format.tar_table import TarEntry, extend
from threetowers.cache.remap.old_cache import TarMatch
from threetowers.cache.remap.old_captions import OldCaptions, TextMatch
from threetowers.cache.remap.old_images import ImageMatch, OldImages
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import OnBad, index_tars, refuse_defects, require_samples
from threetowers.cache.webdataset.tar_patterns import expand

MAX_NAMES_SHOWN = 5
MissingRows = Literal["error", "filtered", "build"]
WHAT_CHANGED: dict[Side, str] = {"image": "another image", "text": "other captions"}
WHAT_LACKS: dict[Side, str] = {"image": "a usable image", "text": "a caption"}


@dataclass(frozen=True)
class RemapReport:
    """What was carried over.

    Attributes:
        storage: the new cache.
        of: what it holds.
        tars: tars written now.
        kept: tars finished before.
        samples: samples whose rows were written now.
        bad: samples without a usable image, as far as headers tell, or without a caption.
        missing: samples whose key has no row in the old cache.
        changed: samples whose key has a row of another image, or no row of one of their captions.
        nonfinite: samples whose embedding was nonfinite, which keep that status.
        names: the first few of the missing and the changed ones.
        left: tars that `cache build` has to build.
        notes: lines on tars that are not used.
        seconds: wall time.
    """

    storage: Storage
    of: Side
    tars: int
    kept: int
    samples: int
    bad: int
    missing: int
    changed: int
    nonfinite: int
    names: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def text(self) -> str:
        """Return the report for a person."""
        lines = [
            f"{self.storage}: {self.tars} tars written, {self.kept} already finished; {self.samples} samples "
            f"carried over in {self.seconds:.1f} s",
            f"samples without a row: {self.missing} new, {self.changed} with {WHAT_CHANGED[self.of]}, {self.bad} "
            f"without {WHAT_LACKS[self.of]}, {self.nonfinite} whose embedding was nonfinite",
            *(f"  {name}" for name in self.names),
            *self.notes,
        ]
        if self.left:
            shown = ", ".join(self.left[:MAX_NAMES_SHOWN])
            lines.append(f"left to `threetowers cache build`: {len(self.left)} tars: {shown}")
        return "\n".join(lines)


def remap(
    old: str | Path | Storage,
    new: str | Path | Storage,
    tars: Sequence[str | Path],
    *,
    missing: MissingRows = "error",
    image_member: str | None = None,
    on_bad: OnBad = "skip",
) -> RemapReport:
    """Create a cache of `tars` from the rows of another cache. Run it again to resume.

    Args:
        old: the cache that has the rows.
        new: the cache to create.
        tars: paths, URLs, globs and brace ranges.
        missing: what to do with a sample that has no row of its key and image, or of its key and each of its captions,
            in the old cache. `error`: stop, and
            name it; `filtered`: give it no embedding and the status FILTERED; `build`: leave its tar to a later build.
        image_member: the extension of the image of a sample in these tars; by default that of the old cache.
        on_bad: whether samples without a usable image, or a caption (`skip`), and bad tars (`skip_tars`) are accepted.

    Raises:
        ManifestError: a sample has no row (`error`), the old cache is incomplete or damaged, or the new folder has
            something else in it.
        BadTar, BadSample, ValueError: bad input, named in the message.
    """
    started = time.monotonic()
    storage = open_storage(new)
    old_storage = open_storage(old)
    old_manifest = read_manifest(old_storage)
    of = old_manifest.of

    # Match the samples of the tars that are not finished with the old rows.
    image_member = image_member or old_manifest.image_member
    listed = require_samples(index_tars(expand(tars), image_member, on_bad))
    indexes = listed.tars
    if on_bad == "error" and of == "image":
        refuse_defects(indexes)
    finished = finished_tars(storage, indexes)
    unfinished = [index for index in indexes if index.fingerprint not in finished]
    matches = _matches(old_storage, of, unfinished, on_bad)
    n_new = sum(int(match.new_n.sum()) for match in matches)
    n_changed = sum(int(match.changed_n.sum()) for match in matches)
    names = []
    for match in matches:
        names += match.names()
    if names and missing == "error":
        raise ManifestError(
            f"{n_new} samples have no row of their key in {old}, {n_changed} have one of {WHAT_CHANGED[of]}: "
            f"{'; '.join(names[:MAX_NAMES_SHOWN])}. Choose --missing filtered to give them no embedding, or --missing "
            "build to leave their tars to the teacher"
        )
    left = [match for match in matches if missing == "build" and match.names()]
    complete = [match for match in matches if match not in left]

    # Write the new cache.
    requested = dataclasses.replace(old_manifest, image_member=image_member)
    manifest = _open_or_create(storage, requested, indexes, matches)
    extend(storage, indexes, manifest.samples_per_tar)
    table = fit_to_table(storage, manifest)
    for match in complete:
        _write(storage, manifest, table.find(match.index), match)
    return RemapReport(
        storage=storage,
        of=of,
        tars=len(complete),
        kept=len(indexes) - len(matches),
        samples=sum(match.n_matched for match in complete),
        bad=sum(int(match.defect_n.sum()) for match in matches),
        missing=n_new,
        changed=n_changed,
        nonfinite=sum(int(match.nonfinite_n.sum()) for match in matches),
        names=tuple(names[:MAX_NAMES_SHOWN]),
        left=tuple(match.index.location for match in left),
        notes=tuple(listed.notes()),
        seconds=time.monotonic() - started,
    )


def _matches(old: Storage, of: Side, indexes: Sequence[TarIndex], on_bad: OnBad) -> Sequence[TarMatch]:
    """Match the samples of tars with the rows of the old cache."""
    if of == "image":
        images = OldImages(old)
        return [ImageMatch(index, images) for index in indexes]
    captions = OldCaptions(old)
    return [TextMatch(index, captions, on_bad) for index in indexes]


def _open_or_create(
    storage: Storage, old: Manifest, indexes: Sequence[TarIndex], matches: Sequence[TarMatch]
) -> Manifest:
    """Return the manifest of the new cache: the old one, with as much room in each tar as these tars need."""
    if storage.size(MANIFEST) is None:
        row_bytes = old.storage_dtype.row_bytes(old.dim)
        largest = max(len(index.samples) for index in indexes)
        rooms = [match.room(row_bytes, largest) for match in matches]
        room = max(rooms, key=lambda each: each.rows_per_tar)
        create(storage, dataclasses.replace(old, **room._asdict()))
    manifest = read_manifest(storage)
    room = TarRoom(manifest.samples_per_tar, manifest.rows_per_tar, manifest.chunk_rows)
    check_compatible(storage, manifest, dataclasses.replace(old, **room._asdict()))
    return manifest


def _write(storage: Storage, manifest: Manifest, entry: TarEntry, match: TarMatch) -> None:
    """Write the rows of a tar, and its done record with the cosines of the records that the rows come from."""
    started = time.monotonic()
    rows, cosines = match.buffer(manifest)
    rows.check_complete()
    provenance = Provenance("remap", 0, "none", time.monotonic() - started, "none")
    record = rows.write(storage, entry, match.tar_xxh3_128, provenance)
    storage.remove_partial(str(entry.id))
    done = dataclasses.replace(record, cosines=cosines)
    storage.put(done_record_name(entry.id), to_json(done), owner=f"{entry.id}.done")

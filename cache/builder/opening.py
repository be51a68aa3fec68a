"""Opening a cache to build it: all processes agree on one manifest and one tar table, whatever exists already."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig, Source
from threetowers.cache.builder.tar_indexer import TarIndexer
from threetowers.cache.encoders.device_defaults import default_batch_size
from threetowers.cache.encoders.encoder import FrozenEncoder, ImageEncoder
from threetowers.cache.format.dtypes import DtypeName, storage_dtype
from threetowers.cache.format.layout import STORE, TarRoom, image_room, text_room
from threetowers.cache.format.manifest import (
    MANIFEST,
    Manifest,
    ManifestError,
    incompatibilities,
    informative_differences,
    read_manifest,
    to_json,
)
from threetowers.cache.format.store import MANIFEST_OWNER, fit_to_table
from threetowers.cache.format.tar_table import TARS, TarTable, extend, read_table
from threetowers.cache.format.views import CENTER
from threetowers.cache.processes.world import World
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage
from threetowers.cache.webdataset.caption_density import captions_per_tar
from threetowers.cache.webdataset.tar_index import TarIndex

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.2


def open_or_create(
    storage: Storage,
    paths: Sequence[str],
    teacher: FrozenEncoder,
    source: Source,
    config: BuildConfig,
    world: World,
    index: TarIndexer,
) -> tuple[Manifest, TarTable, FrozenEncoder, tuple[str, ...]]:
    """Create a cache, or add to an existing one the tars that it lacks: rank 0 writes, the others wait for it.

    Args:
        storage: where the cache is.
        paths: the tars.
        teacher: embeds the samples.
        source: which of its sides and features the cache holds.
        config: of the build.
        world: the place of this process among all.
        index: reads the headers of tars, and leaves out those that cannot be used. Tars that are where the table has
            them are not read here; whoever embeds one compares its fingerprint.

    Returns:
        The manifest, the tar table, the teacher as it runs (where `config` leaves precision and runtime open, as the
        manifest states them), and the tolerated differences between the cache and this build.

    Raises:
        ManifestError: a cache with another manifest or of repacked tars, or something that is not a cache.
        TimeoutError: rank 0 did not write what this rank waits for.
    """
    deadline = time.monotonic() + config.wait_seconds

    def wait() -> None:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {world.rank} waited {config.wait_seconds:.0f} s for rank 0 to index the tars and to write "
                f"{storage.uri(MANIFEST)} and {storage.uri(TARS)}/: see the output of rank 0, check that both see "
                "the same files, or raise wait_seconds"
            )
        time.sleep(WAIT_SECONDS)

    # The manifest: written by rank 0, if there is none, and compared by all.
    if world.first and storage.size(MANIFEST) is None:
        create(storage, new_manifest(index(paths), teacher, source, config, index.pool))
    while storage.size(MANIFEST) is None:
        wait()
    manifest = read_manifest(storage)
    running = teacher.running(config.precision or manifest.precision, config.runtime or manifest.runtime)
    room = requested_room(manifest, source, config)
    batch_size = config.batch_size or manifest.batch_size
    requested = requested_manifest(running, source, config.dtype, room, batch_size, config)
    check_compatible(storage, manifest, requested)
    differences = tuple(informative_differences(manifest, requested))

    # The tar table: extended by rank 0, while the others wait until it has all of their tars.
    if world.first:
        before = read_table(storage, allow_empty=True)
        extend(storage, index([path for path in paths if before.at(path) is None]), manifest.samples_per_tar)
        table = fit_to_table(storage, manifest)
        _warn_of_duplicate_names(storage, before, table, paths)
        return manifest, table, running, differences
    while not (table := read_table(storage, allow_empty=True)).entries:
        wait()
    unknown = {tar.fingerprint for tar in index([path for path in paths if table.at(path) is None])}
    while not unknown <= (table := read_table(storage)).by_fingerprint.keys():
        wait()
    return manifest, table, running, differences


def _warn_of_duplicate_names(storage: Storage, before: TarTable, table: TarTable, paths: Sequence[str]) -> None:
    """Warn of added tars with known names: another data set, or the same tars downloaded again and embedded twice."""
    added = [path for path in before.duplicate_names(paths) if table.at(path) is not None]
    if added:
        logger.warning(
            "%s: %d tars were added whose names the cache already has from another folder, with other contents: %s%s",
            storage,
            len(added),
            ", ".join(added[:3]),
            ", ..." if len(added) > 3 else "",
        )


def create(storage: Storage, manifest: Manifest) -> None:
    """Write the manifest, unless there is one: with it, the folder is a cache.

    Raises:
        ManifestError: the folder has something else in it.
    """
    foreign = {name.rstrip("/") for name in storage.listdir()} - {TARS, STORE, PARTIAL_FOLDER}
    if foreign and storage.size(MANIFEST) is None:
        raise ManifestError(
            f"{storage}: neither a cache nor empty, found {sorted(foreign)[:5]}: choose another folder (--output-dir)"
        )
    storage.create_exclusive(MANIFEST, to_json(manifest), owner=MANIFEST_OWNER)


def check_compatible(storage: Storage, manifest: Manifest, requested: Manifest) -> None:
    """Raise ManifestError if the cache has another manifest than requested, except for informative fields."""
    if lines := incompatibilities(manifest, requested):
        raise ManifestError(
            f"{storage}: the cache here was built with other settings: {'; '.join(lines)} (expected: by the cache; "
            "found: in this command). Use the cache's settings, or choose another folder (--output-dir)"
        )


def new_manifest(
    tars: Sequence[TarIndex], teacher: FrozenEncoder, source: Source, config: BuildConfig, pool: ThreadPoolExecutor
) -> Manifest:
    """Return the manifest of a new cache of these tars.

    Raises:
        ManifestError: A tar is there twice, or has too many samples.
        BadSample: None of the samples that were looked at has a caption.
    """
    largest = config.samples_per_tar or max(len(tar.samples) for tar in tars)
    TarTable(()).missing(tars, largest)  # refuses copies, and tars that are too large
    side = teacher.side(source.of)
    row_bytes = storage_dtype(config.dtype).row_bytes(side.width(source.feature))
    if source.of == "image":
        room = image_room(row_bytes, largest)
    else:
        captions = captions_per_tar(tars, config.caption_sources().caption_format, pool)
        room = text_room(row_bytes, largest, captions, config.rows_per_tar)
    batch_size = config.batch_size or default_batch_size(side.device, source.of)
    return requested_manifest(teacher, source, config.dtype, room, batch_size, config)


def requested_room(manifest: Manifest, source: Source, config: BuildConfig) -> TarRoom:
    """Return the room for each tar that the command asks for: the cache's own, or more, which it does not have."""
    samples_per_tar = max(manifest.samples_per_tar, config.samples_per_tar or 0)
    if source.of == "image":
        return TarRoom(samples_per_tar, samples_per_tar, manifest.chunk_rows)
    return TarRoom(samples_per_tar, max(manifest.rows_per_tar, config.rows_per_tar or 0), manifest.chunk_rows)


def requested_manifest(
    teacher: FrozenEncoder, source: Source, dtype: DtypeName, room: TarRoom, batch_size: int, config: EmbeddingConfig
) -> Manifest:
    """Return the manifest that a build with these settings would write."""
    side = teacher.side(source.of)
    feature = source.feature or side.features[0]
    packages = teacher.packages
    of_side: dict[str, Any]
    if isinstance(side, ImageEncoder):
        of_side = {
            "preprocessing": side.preprocessing,
            "views": config.views,
            "image_member": config.image_member,
            "runtime": side.runtime,
        }
        packages += ("onnxruntime",) if side.runtime == "onnx" else ()
    else:
        of_side = {"text": side.processing, "captions": config.caption_sources(), "views": CENTER}
    return Manifest(
        encoder=teacher.name,
        weights=teacher.weights,
        weights_digest=teacher.weights_digest,
        feature=feature,
        dim=side.width(feature),
        dtype=dtype,
        **room._asdict(),
        versions={name: version(name) for name in packages},
        of=source.of,
        precision=side.precision,
        batch_size=batch_size,
        **of_side,
    )

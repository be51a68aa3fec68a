"""The caches that are built together, as their builder sees them."""

from collections.abc import Sequence
from dataclasses import dataclass

from threetowers.cache.builder.leases import Leases
from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.storage.storage import Storage


@dataclass(frozen=True, eq=False)
class OutputCache:
    """One of the caches that are built together.

    Attributes:
        storage: where it is.
        manifest: what it holds.
        teacher: embeds its samples, in the precision and by the runtime of the manifest.
        leases: of this worker on its tars.
        entries: `entries[i]` is tar i of the list in the cache's tar table.
        min_cosine: bound on the error of a stored row; None: that of the storage dtype.
    """

    storage: Storage
    manifest: Manifest
    teacher: FrozenEncoder
    leases: Leases
    entries: Sequence[TarEntry]
    min_cosine: float | None = None

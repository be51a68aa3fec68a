"""The tars of a build: those that cannot be used are known before a teacher is loaded."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from threetowers.cache.builder.build_config import EncoderConfig
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import (
    TarList,
    refuse_defects,
    require_images,
    require_samples,
    select_tars,
    try_index,
)


class TarIndexer:
    """Indexes tars in a pool of threads, and remembers what it has found."""

    def __init__(self, config: EncoderConfig, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.of_images = any(source.of == "image" for source in config.sources())
        self._image_member = config.image_member
        self._on_bad = config.on_bad
        self._found: dict[str, TarIndex | BadTar] = {}

    def __call__(self, paths: Sequence[str]) -> list[TarIndex]:
        """Return the indexes of those of these tars that can be used.

        Raises:
            BadTar: Some of them are bad and `on_bad` does not leave them out.
            BadSample: A sample has no usable image, where images are embedded and `on_bad` is error.
        """
        new = [path for path in paths if path not in self._found]
        index = partial(try_index, image_member=self._image_member)
        self._found.update(zip(new, self.pool.map(index, new), strict=True))
        listed = select_tars([self._found[path] for path in paths], self._on_bad)
        if self._on_bad == "error" and self.of_images:
            refuse_defects(listed.tars)
        return listed.tars

    def usable(self, paths: Sequence[str]) -> list[str]:
        """Return those of these tars that are not known to be bad or empty."""
        left_out = set()
        for path, found in self._found.items():
            if isinstance(found, BadTar) or not found.samples:
                left_out.add(path)
        return [path for path in paths if path not in left_out]

    def listed(self) -> TarList:
        """Return the tars that are held in memory, and those that are left out."""
        return select_tars(self._found.values(), "skip_tars")

    def release(self) -> None:
        """Free the memory of the indexes; what is left out stays known."""
        self._found = {
            path: found for path, found in self._found.items() if isinstance(found, BadTar) or not found.samples
        }


def index_new_tars(indexer: TarIndexer, storages: Iterable[Storage], paths: Sequence[str]) -> None:
    """Index the tars that one of these caches does not know by their place.

    Raises:
        BadTar, BadSample: As by the indexer; and where no tar is left, or no sample of them all has an image where
            images are embedded.
    """
    tables = [read_table(storage, allow_empty=True) for storage in storages]
    new = [path for path in paths if any(table.at(path) is None for table in tables)]
    tars = indexer(new)
    if not indexer.usable(paths):
        require_samples(indexer.listed())
    if len(new) == len(paths) and indexer.of_images:
        require_images(tars)

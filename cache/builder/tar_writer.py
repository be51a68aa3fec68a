"""Writing tars: one is written while the next one is embedded."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.format.done_record import DoneRecord, done_record_name
from threetowers.cache.format.manifest import to_json
from threetowers.cache.format.row_buffer import Provenance, RowBuffer
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.processes.stage_timer import StageTimer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WrittenTar:
    """A tar that is complete in a cache.

    Attributes:
        cache: number of the cache.
        entry: of the tar in its table.
        record: None where another worker wrote it.
        different_captions: how many captions were embedded, in a cache of text.
    """

    cache: int
    entry: TarEntry
    record: DoneRecord | None
    different_captions: int = 0


class TarWriter:
    """Writes the rows of tars in a thread, one tar at a time."""

    def __init__(self, outputs: Sequence[OutputCache], timer: StageTimer) -> None:
        self._outputs = outputs
        self._timer = timer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: deque[Future[WrittenTar]] = deque()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being written."""
        self._pool.shutdown()

    def start(self, cache: int, number: int, rows: RowBuffer, tar_xxh3_128: str, provenance: Provenance) -> None:
        """Have the rows of a tar written to one of the caches."""
        self._writing.append(self._pool.submit(self._write, cache, number, rows, tar_xxh3_128, provenance))

    def finished(self, left: int = 0) -> Iterator[WrittenTar]:
        """Wait, and yield what has been written, until only so many are left. Raises what went wrong."""
        while len(self._writing) > left:
            with self._timer("write"):
                written = self._writing.popleft().result()
            yield written

    def _write(self, cache: int, number: int, rows: RowBuffer, tar_xxh3_128: str, provenance: Provenance) -> WrittenTar:
        """Write the rows of a tar, then its done record, unless another worker took the tar over."""
        output = self._outputs[cache]
        entry = output.entries[number]
        rows.check_complete()
        if not output.leases.confirm(entry.id):
            logger.warning("%s: tar %s was taken over by another worker, skipped here", output.storage, entry.path)
            return WrittenTar(cache, entry, None)
        record = rows.write(output.storage, entry, tar_xxh3_128, provenance)
        output.storage.remove_partial(str(entry.id))
        output.storage.put(done_record_name(entry.id), to_json(record), owner=f"{entry.id}.done")
        output.leases.release(entry.id)
        return WrittenTar(cache, entry, record, len(rows.captions) if isinstance(rows, TextRowBuffer) else 0)

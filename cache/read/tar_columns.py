"""What is stored of a tar beside the embeddings: keys, statuses and, in a cache of text, the runs of captions."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.done_record import DoneRecord
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.read.caption_runs import CaptionRuns
from threetowers.cache.read.shard_rows import read_column
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_index import key_hash

OK = int(RowStatus.OK)  # an enum's member is slow to look up, and this is compared at every row


@dataclass(frozen=True, eq=False)
class TarColumns:
    """What is stored of one tar of n samples beside the embeddings.

    Attributes:
        record: its done record.
        key_hash_n: (n,) hashes of the samples' keys.
        status_n: (n,) RowStatus of each sample.
        runs: the captions of the samples; None in a cache of images.
    """

    record: DoneRecord
    key_hash_n: npt.NDArray[np.uint64]
    status_n: npt.NDArray[np.uint8]
    runs: CaptionRuns | None = None

    def is_at(self, ordinal: int, key: str) -> bool:
        """Return whether the sample at this place has this key."""
        return 0 <= ordinal < len(self.status_n) and bool(self.key_hash_n[ordinal] == key_hash(key))

    def embedded_rows(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return those rows from `start` on, before `stop`, that have an embedding."""
        if self.runs is not None:
            return np.arange(start, min(stop, self.record.n_rows))
        return start + np.flatnonzero(self.status_n[start:stop] == OK)

    def why_missing(self, ordinal: int, key: str | None) -> str:
        """Return why the sample that is expected at this place has no embedding, for a message."""
        if not 0 <= ordinal < len(self.status_n):
            return f"the tar has {len(self.status_n)} samples"
        if key is not None and not self.is_at(ordinal, key):
            return "the row there is of another key: the tar is not the one that was cached"
        return f"no embedding: {RowStatus(self.status_n[ordinal]).name.lower()}"


def read_tar_columns(storage: Storage, manifest: Manifest, record: DoneRecord) -> TarColumns:
    """Read them. Raises BadShard where a file is not the one that was written."""
    hash_n = read_column(storage, manifest, record, "key_hash").astype(np.uint64)
    status_n = read_column(storage, manifest, record, "status").astype(np.uint8)
    if manifest.of == "image":
        return TarColumns(record, hash_n, status_n)
    end_n, source_r, hash_r = (
        read_column(storage, manifest, record, name) for name in ("row_end", "caption_source", "caption_hash")
    )
    return TarColumns(record, hash_n, status_n, CaptionRuns.of(end_n, source_r, hash_r))

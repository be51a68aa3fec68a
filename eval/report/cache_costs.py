"""The costs of the caches behind a run: bytes, seconds and rate, from their done records."""

from dataclasses import dataclass

from threetowers.cache.format.manifest import ManifestError, Side
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import CacheTower, TrainConfig


@dataclass(frozen=True)
class CacheCost:
    """The size of a cache and the time it took to build.

    Attributes:
        path: Its folder or URL.
        encoder: Its teacher.
        rows: Embeddings that it holds, of images or of captions.
        dim: Width of an embedding.
        dtype: Number format of its rows.
        bytes: Of all files of its tars.
        seconds: Of reading, decoding, embedding and writing, added up over processes.
        of: Which side of the samples is embedded.
    """

    path: str
    encoder: str
    rows: int
    dim: int
    dtype: str
    bytes: int
    seconds: float
    of: Side = "image"

    def __str__(self) -> str:
        things = "images" if self.of == "image" else "captions"
        rate = f", {self.rows / self.seconds:.0f} {things}/s" if self.seconds else ""
        return (
            f"cache {self.path}: {self.encoder}, {self.rows:,} x {self.dim} {self.dtype}, "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.0f} s{rate}"
        )


def cache_costs(run: TrainConfig) -> list[CacheCost]:
    """Return the costs of the caches that a run was trained with, of those that still exist."""
    costs = []
    for tower in run.towers.values():
        if isinstance(tower, CacheTower):
            try:
                costs.append(_cost(tower.path))
            except ManifestError:  # moved or removed since: a finished run does not need it
                continue
    return costs


def _cost(path: str) -> CacheCost:
    cache = EmbeddingCache.open(path)
    records = [cache.record(entry.id) for entry in cache.tars]
    return CacheCost(
        path=path,
        encoder=cache.manifest.encoder,
        rows=sum(record.n_rows for record in records),
        dim=cache.dim,
        dtype=cache.manifest.dtype,
        bytes=sum(file.size for record in records for file in record.files.values()),
        seconds=sum(record.seconds for record in records),
        of=cache.manifest.of,
    )

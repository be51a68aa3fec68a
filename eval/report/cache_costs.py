"""What the caches behind a run cost: bytes, seconds, rate. Taken from their done records."""

from dataclasses import dataclass
from pathlib import Path

from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.trainer.config import CacheTower, TrainConfig


@dataclass(frozen=True)
class CacheFacts:
    """One cache as it was built. `seconds`: of streaming, decoding, embedding and writing, added up over processes."""

    path: Path
    backbone: str
    samples: int
    dim: int
    dtype: str
    bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.samples / self.seconds:.0f} images/s" if self.seconds else ""
        return (
            f"cache {self.path}: {self.backbone}, {self.samples:,} x {self.dim} {self.dtype}, "
            f"{self.bytes / 1e6:.1f} MB, {self.seconds:.0f} s{rate}"
        )


def caches_of(run: TrainConfig) -> list[CacheFacts]:
    """Return the caches a run was trained with, those that are still there."""
    return [facts for t in run.towers.values() if isinstance(t, CacheTower) and (facts := _facts(Path(t.path)))]


def _facts(path: Path) -> CacheFacts | None:
    try:
        cache = EmbeddingCache.open(path)
        records = [cache.record(entry.id) for entry in cache.tars]
    except ManifestError:
        return None  # moved or removed since: a finished run does not need it
    return CacheFacts(
        path=path,
        backbone=cache.manifest.backbone,
        samples=len(cache),
        dim=cache.dim,
        dtype=cache.manifest.dtype,
        bytes=sum(file.size for record in records for file in record.files.values()),
        seconds=sum(record.seconds for record in records),
    )

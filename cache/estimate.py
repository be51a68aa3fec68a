"""The cost of a cache before it is built: bytes, files and hours, measured by building a sample of its images.

The sample is packed into tars of its own and built by the real build, so that the rate is that of reading, decoding,
embedding and writing together, on this machine.
"""

import dataclasses
import io
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig, Source
from threetowers.cache.builder.opening import requested_manifest
from threetowers.cache.encoders.device_defaults import default_batch_size
from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.encoders.live import embed, view_pixels
from threetowers.cache.format.done_record import done_record_name, read_done_record
from threetowers.cache.format.dtypes import STORAGE_DTYPES, StorageDtype, storage_cosines
from threetowers.cache.format.layout import arrays, image_room, stored_bytes
from threetowers.cache.format.manifest import read_manifest
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.format.views import Views
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.dataset_sample import DatasetSample
from threetowers.cache.webdataset.tar_list import counts_by_reason

MIN_TIMED = 8


@dataclass(frozen=True)
class DtypeCost:
    """The cost of one storage dtype.

    Attributes:
        name: of the dtype.
        bytes: of the cache.
        files: of the cache.
        min_cosine: between computed and stored rows of the sample, the smallest.
        mean_cosine: the mean.
        fits: whether the smallest is within the dtype's bound.
    """

    name: str
    bytes: int
    files: int
    min_cosine: float
    mean_cosine: float
    fits: bool


@dataclass(frozen=True)
class CostEstimate:
    """The cost of a cache.

    Attributes:
        n_tars: tars.
        n_samples: samples in them.
        exact: whether these are counted, not estimated from some of the tars.
        sampled: images that were measured.
        bad: bad samples among those that were drawn, by the reason.
        dim: width D of a row.
        views: of each image.
        ranks: processes that share the work.
        rate: images per second of the build in one process.
        decode_rate: images per second of decoding and transforming in one thread.
        shares: of the build's time by stage, largest first.
        dtypes: cost of each storage dtype.
        notes: lines on tars that are not used.
    """

    n_tars: int
    n_samples: int
    exact: bool
    sampled: int
    bad: dict[str, int]
    dim: int
    views: Views
    ranks: int
    rate: float
    decode_rate: float
    shares: dict[str, float]
    dtypes: tuple[DtypeCost, ...]
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """Hours of the build on all ranks."""
        return self.n_samples / (self.rate * self.ranks) / 3600

    @property
    def live_hours(self) -> float:
        """Hours per epoch of a live teacher in place of the cache: its forward passes of one view."""
        return self.hours * self.shares["forward"] / self.views.count

    @property
    def break_even(self) -> float:
        """Epochs, of all runs together, after which a live teacher would have cost more."""
        return self.hours / self.live_hours

    def scaled(self, n_samples: int) -> "CostEstimate":
        """Return the estimate for another number of samples, in tars of the same size."""
        factor = n_samples / self.n_samples
        dtypes = tuple(
            dataclasses.replace(cost, bytes=round(cost.bytes * factor), files=round(cost.files * factor))
            for cost in self.dtypes
        )
        n_tars = max(1, round(self.n_tars * factor))
        return dataclasses.replace(self, n_samples=n_samples, n_tars=n_tars, exact=False, dtypes=dtypes)

    def text(self) -> str:
        """Return the estimate for a person."""
        counted = "counted" if self.exact else "estimated from some of the tars"
        bad = f"; left out: {counts_by_reason(self.bad)}" if self.bad else ""
        stages = ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares.items())
        lines = [
            f"tars        {self.n_tars:,}, {self.n_samples:,} samples ({counted})",
            *self.notes,
            f"measured    on {self.sampled} images{bad}",
            f"  decode and transform {self.decode_rate:10.1f} img/s per thread",
            f"  build                {self.rate:10.1f} img/s per process, views {self.views}; time by stage: {stages}",
            f"time        {self.hours:.2f} hours on {self.ranks} ranks ({self.hours * self.ranks:.2f} rank-hours)",
            f"break-even  {self.break_even:.2f} epochs: a live teacher takes {self.live_hours:.2f} hours per epoch",
            f"{'dtype':10}{'bytes':>20}{'files':>12}{'1 - cosine: worst':>20}{'mean':>10}",
        ]
        for cost in self.dtypes:
            worst = max(0.0, 1 - cost.min_cosine)
            mean = max(0.0, 1 - cost.mean_cosine)
            note = "" if cost.fits else "  refused: below its bound"
            lines.append(f"{cost.name:10}{cost.bytes:20,}{cost.files:12,}{worst:20.1e}{mean:10.1e}{note}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for a script."""
        return dataclasses.asdict(self) | {
            "hours": self.hours,
            "live_hours_per_epoch": self.live_hours,
            "break_even_epochs": self.break_even,
        }


def estimate(config: EmbeddingConfig, *, ranks: int = 1, sample: int = 256, seed: int = 0) -> CostEstimate:
    """Measure what a cache would cost. Nothing is left behind.

    Args:
        config: images, encoder and views of the cache.
        ranks: processes that would share the work, each as fast as this one.
        sample: images to measure on, drawn by `seed` from some of the tars.
        seed: of that sample.

    Raises:
        ValueError: bad input, named in the message; fewer than MIN_TIMED images that can be decoded.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks}: expected at least 1")
    drawn = config.sample_images(sample, seed)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher = config.load_encoder(device)
    (source,) = config.sources()
    encoder = teacher.side("image")

    # One thread's rate of decoding and transforming, and the embeddings that the dtypes are compared on.
    started = time.perf_counter()
    images, bad = drawn.images()
    pixels = [view_pixels(encoder, image, 0, None) for image in images]
    decode_seconds = time.perf_counter() - started
    if len(pixels) < MIN_TIMED:
        raise ValueError(
            f"{len(pixels)} of {len(drawn.sample)} sampled images can be decoded: expected at least {MIN_TIMED}"
        )
    batch_size = config.batch_size or default_batch_size(device)
    rows_nD = embed(encoder, pixels, source.feature, batch_size)

    rate, shares, record_bytes = _measure_build(drawn, config, device)
    costs = [
        _dtype_cost(dtype, drawn, teacher, source, config, rows_nD, record_bytes) for dtype in STORAGE_DTYPES.values()
    ]
    return CostEstimate(
        n_tars=drawn.n_tars,
        n_samples=drawn.n_samples,
        exact=drawn.exact,
        sampled=len(pixels),
        bad=dict(bad),
        dim=rows_nD.shape[1],
        views=config.views,
        ranks=ranks,
        rate=rate,
        decode_rate=len(drawn.sample) / decode_seconds,
        shares=shares,
        dtypes=tuple(costs),
        notes=drawn.notes,
    )


def _measure_build(drawn: DatasetSample, config: EmbeddingConfig, device: str) -> tuple[float, dict[str, float], int]:
    """Build the sample, packed twice.

    Returns:
        Images per second in the second tar, the time by stage, and the bytes of a done record.
    """
    with tempfile.TemporaryDirectory(prefix="threetowers-estimate-") as folder:
        tars = [_pack(Path(folder) / f"{i}.tar", drawn, i) for i in range(2)]
        settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(EmbeddingConfig)}
        settings |= {"tars": tars, "device": device}
        output = Path(folder) / "cache"
        report = build_cache(BuildConfig(**settings, output_dir=output, dtype="float32"))
        storage = open_storage(output)
        record = read_done_record(storage, read_manifest(storage), read_table(storage).entries[1])
        rate = record.n_samples / max(record.seconds, 1e-3)
        return rate, report.shares, storage.size(done_record_name(1)) or 0


def _pack(path: Path, drawn: DatasetSample, number: int) -> str:
    """Write the images of the sample to a tar."""
    with tarfile.open(path, "w") as archive:
        for i, (tar, ordinal) in enumerate(drawn.sample):
            sample = drawn.indexed[tar].samples[ordinal]
            if sample.defect is not None:
                continue
            data = drawn.data((tar, ordinal))
            info = tarfile.TarInfo(f"{number}-{i}.{sample.image}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def _dtype_cost(
    dtype: StorageDtype,
    drawn: DatasetSample,
    teacher: FrozenEncoder,
    source: Source,
    config: EmbeddingConfig,
    rows_nD: npt.NDArray[np.float32],
    record_bytes: int,
) -> DtypeCost:
    room = image_room(dtype.row_bytes(rows_nD.shape[1]), drawn.largest)
    manifest = requested_manifest(teacher, source, dtype.name, room, 1, config)
    sizes = [len(index.samples) for index in drawn.indexed]
    bytes_per_tar = np.mean([stored_bytes(manifest, size, size) for size in sizes]) + record_bytes
    n_arrays = len(arrays(manifest))
    per_tar = n_arrays + 1  # a shard of each array, and the done record
    shared = n_arrays + 3  # zarr.json of each array and of the group, manifest, tar table
    found = storage_cosines(dtype, rows_nD)
    return DtypeCost(
        name=dtype.name,
        bytes=round(float(bytes_per_tar) * drawn.n_tars),
        files=per_tar * drawn.n_tars + shared,
        min_cosine=float(found.min()),
        mean_cosine=float(found.mean()),
        fits=bool(found.min() >= dtype.min_cosine),
    )

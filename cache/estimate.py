"""What a cache would cost: bytes, files and hours, from a short build of a sample of the very tars, before it is begun.

The sample is packed into a tar of its own and built by the real build, so that the rate is that of reading, decoding,
embedding and writing together, on the machine where this runs.
"""

from __future__ import annotations

import dataclasses
import io
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threetowers.cache.builder.build import build
from threetowers.cache.builder.opening import Terms, offer
from threetowers.cache.encoders.live import embed, view_pixels
from threetowers.cache.encoders.teacher import Teacher, load_teacher
from threetowers.cache.format.done_record import done_record_name, read_done_record
from threetowers.cache.format.dtypes import PRECISIONS, fidelity
from threetowers.cache.format.layout import arrays, slot_and_chunk, stored_bytes
from threetowers.cache.format.manifest import Manifest, read_manifest
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.dataset_sample import Survey, survey

MIN_TIMED = 8


@dataclass(frozen=True)
class DtypeCost:
    """What a precision tier would cost: bytes and files of the whole cache, and cosine of rows as stored with the rows
    themselves, on the sample. `fits`: it is within the tier's own bound."""

    name: str
    bytes: int
    files: int
    min_cosine: float
    mean_cosine: float
    fits: bool


@dataclass(frozen=True)
class CostEstimate:
    """`rate`: pictures a second of the whole build in one process, `shares` where its time went, largest first;
    `decode_rate`: of decoding and transforming in one thread. `hours`: of all ranks at that rate. `live_hours`: of one
    epoch with a live teacher in place of the cache, its forward passes of one view alone."""

    n_tars: int
    n_samples: int
    exact: bool
    sampled: int
    bad: int
    dim: int
    views: Views
    ranks: int
    rate: float
    decode_rate: float
    shares: dict[str, float]
    tiers: tuple[DtypeCost, ...]

    @property
    def hours(self) -> float:
        return self.n_samples / (self.rate * self.ranks) / 3600

    @property
    def live_hours(self) -> float:
        return self.hours * self.shares["forward"] / self.views.count

    @property
    def break_even(self) -> float:
        """Epochs, of all runs together, after which a live teacher would have cost more."""
        return self.hours / self.live_hours

    def scaled(self, n_samples: int) -> CostEstimate:
        """The same for so many samples in tars of the same size."""
        factor = n_samples / self.n_samples
        tiers = tuple(
            dataclasses.replace(tier, bytes=round(tier.bytes * factor), files=round(tier.files * factor))
            for tier in self.tiers
        )
        n_tars = max(1, round(self.n_tars * factor))
        return dataclasses.replace(self, n_samples=n_samples, n_tars=n_tars, exact=False, tiers=tiers)

    def text(self) -> str:
        """The plan for a person."""
        how = "counted" if self.exact else "estimated from some of the tars"
        lines = [
            f"tars        {self.n_tars:,}, {self.n_samples:,} samples ({how})",
            f"measured    on {self.sampled} pictures" + (f", {self.bad} more not decodable" if self.bad else ""),
            f"  decode and transform {self.decode_rate:10.1f} img/s a thread",
            f"  whole build          {self.rate:10.1f} img/s a process, views {self.views}; time goes to "
            + ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares.items()),
            f"time        {self.hours:.2f} hours on {self.ranks} ranks ({self.hours * self.ranks:.2f} rank-hours)",
            f"break-even  {self.break_even:.2f} epochs: a live teacher would cost {self.live_hours:.2f} hours of each",
            f"{'dtype':10}{'bytes':>20}{'files':>12}{'1 - cosine: worst':>20}{'mean':>10}",
        ]
        for tier in self.tiers:
            note = "" if tier.fits else "  refused: below its bound"
            lines.append(
                f"{tier.name:10}{tier.bytes:20,}{tier.files:12,}"
                f"{max(0.0, 1 - tier.min_cosine):20.1e}{max(0.0, 1 - tier.mean_cosine):10.1e}{note}"
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The plan for a script."""
        return dataclasses.asdict(self) | {
            "hours": self.hours,
            "live_hours_an_epoch": self.live_hours,
            "break_even_epochs": self.break_even,
        }


def estimate(
    tars: Sequence[str | Path],
    *,
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    views: Views = CENTER,
    ranks: int = 1,
    sample: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    device: str | None = None,
) -> CostEstimate:
    """Measure what a cache of these tars would cost. Nothing is left behind.

    Args:
        backbone, weights, image_size, views, batch_size, threads, device: as for `build`.
        ranks: processes that would share the work, each as fast as this one.
        sample: pictures that are embedded to measure, drawn by `seed` from some of the tars.

    Raises:
        ValueError: bad input, named; fewer than MIN_TIMED pictures that can be decoded.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: expected at least 1")
    look = survey(tars, sample, seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(backbone, weights, image_size, device)
    began = time.perf_counter()
    pictures, bad = look.pictures()
    pixels = [view_pixels(teacher, image, 0, None) for _, image in pictures]
    decode_seconds = time.perf_counter() - began
    if len(pixels) < MIN_TIMED:
        raise ValueError(f"{len(pixels)} of {len(look.sample)} sampled pictures can be decoded: expected {MIN_TIMED}")
    rows_nD = embed(teacher, pixels, batch_size)
    options = {"views": views, "batch_size": batch_size, "threads": threads, "device": device}
    rate, shares, record_bytes = _built(look, backbone, weights, image_size, options)
    return CostEstimate(
        n_tars=look.n_tars,
        n_samples=look.n_samples,
        exact=look.exact,
        sampled=len(pixels),
        bad=bad,
        dim=teacher.dim,
        views=views,
        ranks=ranks,
        rate=rate,
        decode_rate=len(look.sample) / decode_seconds,
        shares=shares,
        tiers=tuple(_tier(name, look, teacher, views, rows_nD, record_bytes) for name in PRECISIONS),
    )


def _built(
    look: Survey, backbone: str, weights: str, image_size: int | None, options: dict[str, Any]
) -> tuple[float, dict[str, float], int]:
    """Of the real build on the sample, packed twice: pictures a second in the second tar, where the time went, and the
    bytes of a done record."""
    with tempfile.TemporaryDirectory(prefix="threetowers-plan-") as folder:
        tars = [_pack(Path(folder) / f"{i}.tar", look, i) for i in range(2)]
        storage = open_storage(Path(folder) / "cache")
        report = build(
            tars, storage, backbone=backbone, weights=weights, image_size=image_size, dtype="float32", **options
        )
        record = read_done_record(storage, read_manifest(storage), read_table(storage).entries[1])
        return record.n_samples / max(record.seconds, 1e-3), report.shares, storage.size(done_record_name(1)) or 0


def _pack(path: Path, look: Survey, number: int) -> str:
    with tarfile.open(path, "w") as archive:
        for i, at in enumerate(look.sample):
            data, index = look.data(at), look.indexed[at[0]]
            info = tarfile.TarInfo(f"{number}-{i}.{index.samples[at[1]].image}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def _tier(
    name: str, look: Survey, teacher: Teacher, views: Views, rows_nD: np.ndarray[Any, Any], record_bytes: int
) -> DtypeCost:
    tier = PRECISIONS[name]
    slot, chunk_rows = slot_and_chunk(tier.row_bytes(teacher.dim), look.largest)
    manifest: Manifest = offer(teacher, Terms(name, views), slot, chunk_rows)
    a_tar = np.mean([stored_bytes(manifest, len(index.samples)) for index in look.indexed]) + record_bytes
    found = fidelity(tier, rows_nD)
    return DtypeCost(
        name=name,
        bytes=round(float(a_tar) * look.n_tars),
        files=(len(arrays(manifest)) + 1) * look.n_tars + len(arrays(manifest)) + 3,
        min_cosine=float(found.min()),
        mean_cosine=float(found.mean()),
        fits=bool(found.min() >= tier.min_cosine),
    )

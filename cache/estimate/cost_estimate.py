"""The cost of a cache: bytes, files and hours."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from threetowers.cache.format.manifest import Side
from threetowers.cache.format.views import Views
from threetowers.cache.webdataset.tar_list import counts_by_reason


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
        of: what is embedded, images or captions.
        per_sample: how many of them a sample has; 1 of images.
        sampled: images or captions that were measured.
        bad: bad samples among those that were drawn, by the reason.
        dim: width D of a row.
        views: of each image.
        ranks: processes that share the work.
        rate: images or captions per second of the build in one process.
        input_rate: images per second of decoding and transforming, or captions of making tokens, in one thread.
        shares: of the build's time by stage, largest first.
        dtypes: cost of each storage dtype.
        notes: lines on tars that are not used.
    """

    n_tars: int
    n_samples: int
    exact: bool
    of: Side
    per_sample: float
    sampled: int
    bad: dict[str, int]
    dim: int
    views: Views
    ranks: int
    rate: float
    input_rate: float
    shares: dict[str, float]
    dtypes: tuple[DtypeCost, ...]
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """Hours of the build on all ranks."""
        return self.n_samples * self.per_sample / (self.rate * self.ranks) / 3600

    @property
    def live_hours(self) -> float:
        """Hours per epoch of a live teacher in place of the cache: its forward passes of one view or caption."""
        return self.hours * self.shares["forward"] / self.views.count / self.per_sample

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
        of_text = self.of == "text"
        contents, unit = ("captions", "captions") if of_text else ("images", "img")
        stage = "tokens" if of_text else "decode and transform"
        detail = f"{self.per_sample:.2f} captions a sample" if of_text else f"views {self.views}"
        lines = [
            f"tars        {self.n_tars:,}, {self.n_samples:,} samples ({counted})",
            *self.notes,
            f"measured    on {self.sampled} {contents}{bad}",
            f"  {stage:20} {self.input_rate:10.1f} {unit}/s per thread",
            f"  build                {self.rate:10.1f} {unit}/s per process, {detail}; time by stage: {stages}",
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

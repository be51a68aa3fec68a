"""The data that the sections of the report are written from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from reproduce.claims import Claims
from reproduce.folder import Folder, read_json
from reproduce.plan import Plan
from reproduce.scores import Metric, Scores, read_scores
from reproduce.teachers import cache_seconds
from threetowers.cache.format.manifest import ManifestError

BASELINE = "clip"


@dataclass(frozen=True)
class ReportData:
    """The plan and the claims, and the results of the experiments that are finished.

    Attributes:
        plan: Without the missing teachers.
        claims: Claims, metrics and trends.
        folder: The folder of the reproduction.
        missing: Teachers that could not be obtained, with the reason.
        scores: Of the finished experiments.
        fits: How well each teacher fits the data, in 0..1.
    """

    plan: Plan
    claims: Claims
    folder: Folder
    missing: Mapping[str, str]
    scores: Scores
    fits: Mapping[str, float]

    @classmethod
    def read(cls, plan: Plan, claims: Claims, folder: Folder, missing: Mapping[str, str]) -> Self:
        """Read the results that are in the folder."""
        fits = {}
        for name in plan.teachers:
            path = folder[f"fits/{name}.json"]
            if path.exists():
                fits[name] = float(read_json(path)["fit"])
        return cls(plan, claims, folder, missing, read_scores(plan, folder), fits)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics of the claims by key."""
        return self.claims.metrics

    def rows_seconds(self, teacher: str | None) -> float:
        """Return the seconds on one core of the contrastive images in a teacher's cache, 0 without one."""
        if teacher is None:
            return 0.0
        try:
            return cache_seconds(self.folder[f"caches/{teacher}"])
        except ManifestError:  # the cache was removed
            return 0.0

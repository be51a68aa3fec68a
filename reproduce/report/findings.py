"""What the sections of the report are written from: the plan, and what is there of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from reproduce.claims import Claims
from reproduce.folder import Folder, read_json
from reproduce.plan import Plan
from reproduce.scores import Metric, Scores, gather
from reproduce.teachers import seconds_of
from threetowers.cache.format.manifest import ManifestError

BASELINE = "clip"
PLOTTED = ("lit", "3t")


@dataclass(frozen=True)
class Findings:
    """`missing`: teachers that could not be had, with the reason; `fits`: of the others, as fractions."""

    plan: Plan
    claims: Claims
    folder: Folder
    missing: Mapping[str, str]
    scores: Scores
    fits: Mapping[str, float]

    @classmethod
    def gathered(cls, plan: Plan, claims: Claims, folder: Folder, missing: Mapping[str, str]) -> Self:
        """Read what is finished."""
        paths = {name: folder[f"fits/{name}.json"] for name in plan.teachers}
        fits = {name: float(read_json(path)["fit"]) for name, path in paths.items() if path.exists()}
        return cls(plan, claims, folder, missing, gather(plan, folder), fits)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return self.claims.metrics

    def rows_seconds(self, teacher: str | None) -> float:
        """What the rows of a teacher's cache took on one core, of the contrastive pictures."""
        if teacher is None:
            return 0.0
        try:
            return seconds_of(self.folder[f"caches/{teacher}"])
        except ManifestError:  # removed since
            return 0.0

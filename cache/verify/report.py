"""The result of a verification, for a person and for a script."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from threetowers.cache.format.manifest import Side
from threetowers.cache.storage.storage import Storage
from threetowers.cache.verify.recompute import Recomputation
from threetowers.cache.verify.statistics import RowStatistics

Depth = Literal["metadata", "values", "recompute"]


@dataclass(frozen=True)
class Problem:
    """A defect of a cache. `tar_id`: the tar whose rows have it, which `--fix` would have built again."""

    text: str
    tar_id: int | None = None


@dataclass
class VerifyReport:
    """What `verify` found. `problems` make a cache unfit for use; `warnings` need a person's judgement.

    `fixed` are the ids of the tars that were removed, to be built again.
    """

    storage: Storage
    depth: Depth
    of: Side = "image"
    tars: int = 0
    tars_intact: int = 0
    tars_compared: int = 0
    samples: int = 0
    rows: int = 0
    ok_samples: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    statistics: RowStatistics = field(default_factory=RowStatistics)
    recomputed: Recomputation | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def text(self) -> str:
        """Return the report for a person."""
        bad = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(self.counts.items())) or "none"
        lines = [
            f"{self.storage}: {'OK' if self.ok else 'DAMAGED'} (depth {self.depth})",
            f"tars       {self.tars_intact} of {self.tars} intact, {self.tars_compared} compared with the tar itself",
            f"samples    {self.samples} in intact tars, {self.ok_samples} with an embedding, without: {bad}",
        ]
        if self.of == "text":
            lines.append(f"captions   {self.rows} with an embedding")
        if self.depth != "metadata":
            duplicates, _ = self.statistics.duplicates()
            lines += [f"duplicates {duplicates} rows equal an earlier row bit for bit", *self.statistics.norm_lines()]
        if self.recomputed is not None:
            lines.append(f"recompute  {self.recomputed}")
        lines += [f"warning: {line}" for line in self.warnings]
        lines += [f"PROBLEM: {problem.text}" for problem in self.problems]
        if self.fixed:
            lines.append(f"removed    rows and records of {len(self.fixed)} tars: run `threetowers cache build` again")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for a script."""
        return {
            "cache": str(self.storage),
            "of": self.of,
            "depth": self.depth,
            "ok": self.ok,
            "tars": {"all": self.tars, "intact": self.tars_intact, "compared": self.tars_compared},
            "samples": {"intact": self.samples, "embedded": self.ok_samples, "without": dict(self.counts)},
            "rows": self.rows,
            "statistics": self.statistics.as_dict() if self.depth != "metadata" else None,
            "recomputed": self.recomputed.as_dict() if self.recomputed is not None else None,
            "problems": [{"tar_id": problem.tar_id, "text": problem.text} for problem in self.problems],
            "warnings": self.warnings,
            "fixed": self.fixed,
        }

"""What a check of a cache found, for a person and for a script."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from threetowers.cache.storage.storage import Storage
from threetowers.cache.verify.recompute import Meaning
from threetowers.cache.verify.statistics import Numbers

Depth = Literal["structure", "numbers", "meaning"]


@dataclass(frozen=True)
class Problem:
    """What makes a cache unfit. `tar_id`: the tar whose rows are to blame, and that `--fix` would have built again."""

    text: str
    tar_id: int | None = None


@dataclass
class Report:
    """What `verify` found. `problems` make a cache unfit; `warnings` are for a person to judge.

    `fixed` are the ids of the tars that were removed, to be built again.
    """

    storage: Storage
    depth: Depth
    tars: int = 0
    tars_sound: int = 0
    tars_compared: int = 0
    samples: int = 0
    ok_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    numbers: Numbers = field(default_factory=Numbers)
    meaning: Meaning | None = None
    found: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fixed: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No problems."""
        return not self.found

    @property
    def problems(self) -> list[str]:
        """The problems in words."""
        return [problem.text for problem in self.found]

    def text(self) -> str:
        """The report for a person."""
        bad = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "none"
        lines = [
            f"{self.storage}: {'sound' if self.ok else 'NOT SOUND'} in {self.depth}",
            f"tars       {self.tars_sound} sound of {self.tars}, {self.tars_compared} compared with the tar itself",
            f"samples    {self.samples} in sound tars, {self.ok_rows} with an embedding, without: {bad}",
        ]
        if self.depth != "structure":
            duplicates, _ = self.numbers.duplicates()
            lines += [f"duplicates {duplicates} rows equal an earlier row bit for bit", *self.numbers.norm_lines()]
        if self.meaning is not None:
            lines.append(f"meaning    {self.meaning}")
        lines += [f"warning: {line}" for line in self.warnings] + [f"PROBLEM: {line}" for line in self.problems]
        if self.fixed:
            lines.append(f"removed    rows and records of {len(self.fixed)} tars: run `threetowers cache build` again")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report for a script."""
        return {
            "cache": str(self.storage),
            "depth": self.depth,
            "ok": self.ok,
            "tars": {"all": self.tars, "sound": self.tars_sound, "compared": self.tars_compared},
            "samples": {"sound": self.samples, "embedded": self.ok_rows, "without": dict(self.counts)},
            "numbers": self.numbers.as_dict() if self.depth != "structure" else None,
            "meaning": self.meaning.as_dict() if self.meaning is not None else None,
            "problems": [{"tar_id": problem.tar_id, "text": problem.text} for problem in self.found],
            "warnings": self.warnings,
            "fixed": self.fixed,
        }

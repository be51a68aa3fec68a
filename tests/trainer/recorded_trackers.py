"""Modules that take the place of `wandb` and `trackio` and record the calls that a run makes, as these document them.

Each refuses what the real one refuses: `log` after `finish`, values that are no numbers.
"""

import sys
from types import ModuleType
from typing import Any

import pytest


class RecordedRun:
    """A run of a tracker, in one launch."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.lines: list[dict[str, float]] = []
        self.axes: dict[str, str | None] = {}
        self.ended = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert not self.ended
        assert all(isinstance(value, int | float) for value in metrics.values())
        self.lines.append(metrics if step is None else metrics | {"step": step})

    def finish(self) -> None:
        assert not self.ended
        self.ended = True


class RecordedTracker(ModuleType):
    """A module with the function `init`; its `runs` are what was begun."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[RecordedRun] = []

    def init(self, **settings: Any) -> RecordedRun:
        self.runs.append(RecordedRun(settings))
        return self.runs[-1]


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> RecordedTracker:
    """Put a recording module in the place of a tracker's."""
    module = RecordedTracker(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module

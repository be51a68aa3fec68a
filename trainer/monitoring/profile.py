"""A trace of some steps, for chrome://tracing or Perfetto."""

from pathlib import Path
from typing import Any

import torch


class StepProfile:
    """Writes a trace of the steps first..last, counted from 1, to a file."""

    def __init__(self, span: tuple[int, int] | None, path: Path) -> None:
        """Trace the steps of `span` (first, last) to `path`; None: no trace."""
        self._span = span
        self._path = path
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before step `step`."""
        if self._span is not None and step == self._span[0]:
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.start()

    def after(self, step: int, last: bool) -> None:
        """Call after step `step`; `last` marks the last step of the run."""
        if self._profiler is not None and self._span is not None and (last or step == self._span[1]):
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None

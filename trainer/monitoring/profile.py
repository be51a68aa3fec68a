"""A trace of some steps, for chrome://tracing or Perfetto."""

from pathlib import Path
from typing import Any

import torch


class StepProfile:
    """Traces the steps first..last (from 1) into a file, and nothing outside them."""

    def __init__(self, span: tuple[int, int] | None, path: Path) -> None:
        """`span`: None for no trace."""
        self._span, self._path = span, path
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Call before step `step`."""
        if self._span is not None and step == self._span[0]:
            self._profiler = torch.profiler.profile(profile_memory=True)
            self._profiler.start()

    def after(self, step: int, last: bool) -> None:
        """Call after step `step`; `last`: no other will follow."""
        if self._profiler is not None and self._span is not None and (last or step == self._span[1]):
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None

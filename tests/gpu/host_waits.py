"""Where the host waits for the GPU."""

import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Self
from unittest import mock

import torch

HERE = str(Path(__file__).parent)


class HostWaits:
    """Counts, within a `with` block, the places at which the host waits for the GPU.

    torch reports operations that wait, such as `.item()`, by `set_sync_debug_mode`. Waits that are asked for, of a
    device, a stream or an event, it does not report, so those are counted at their Python methods.
    """

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._warnings = warnings.catch_warnings(record=True)
        self._recorded = self._warnings.__enter__()
        warnings.simplefilter("always")
        self._patches = [
            mock.patch.object(owner, "synchronize", self._counted(owner.synchronize))
            for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream)
        ]
        for patch in self._patches:
            patch.start()
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        for patch in self._patches:
            patch.stop()
        self._warnings.__exit__(None, None, None)
        for warning in self._recorded:
            if "synchroniz" in str(warning.message):
                self.places[_place(warning.filename, warning.lineno)] += 1

    def _counted(self, synchronize: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            caller = traceback.extract_stack(limit=2)[0]
            if not caller.filename.startswith(HERE):
                self.places[f"{_place(caller.filename, caller.lineno or 0)} ({synchronize.__qualname__})"] += 1
            return synchronize(*arguments, **options)

        return counted


def _place(file: str, line: int) -> str:
    """Return file and line, the file by its last two parts."""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"

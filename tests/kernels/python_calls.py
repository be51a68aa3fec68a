"""Counting what the loss does in Python."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from threetowers.kernels.operator import operators

KERNELS = str(Path(operators.__file__).parent)
ROOM = 4  # calls that a step may make to enlarge memory which it reuses, depending on the sizes of its tiles


def python_calls(work: Callable[[], Any]) -> int:
    """Return how many calls the code of the kernels makes in Python on this thread: of itself, torch and all else."""
    count = 0

    def notice(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        caller = frame if event == "c_call" else frame.f_back
        if event in ("call", "c_call") and caller is not None and caller.f_code.co_filename.startswith(KERNELS):
            count += 1

    sys.setprofile(notice)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count

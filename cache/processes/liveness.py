"""Whether a process of this machine still runs, told apart from later ones of the same number."""

import os
from pathlib import Path

PROC = Path("/proc")


def process_exists(pid: int) -> bool:
    """Return whether this machine runs a process of that id. One that has ended and was not waited for does not run."""
    return process_start(pid) is not None


def process_start(pid: int) -> str | None:
    """Return what tells a running process apart from others of the same id: machine, namespace of ids, time of start.

    None where no such process runs; empty where the system does not tell (no `/proc`).
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user
        pass
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = (PROC / "self/ns/pid").stat().st_ino
        # The fields after the name, which is in parentheses and may hold anything: the state, ..., the time of start.
        state, *fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state in ("Z", "X") else f"{boot}/{namespace}/{fields[18]}"

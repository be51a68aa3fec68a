"""What a run's metrics are sent to, besides its own `metrics.jsonl`: experiment trackers."""

import importlib
import json
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from threetowers.cache.storage.atomic import write_atomic
from threetowers.trainer.config import ConfigError

Metrics = dict[str, float | int | None]

IDENTITY_FILE = "tracked_run.json"


class Tracker(ABC):
    """A place to which the first rank sends a run's metrics."""

    @abstractmethod
    def write(self, metrics: Metrics) -> None:
        """Send one step's metrics; `metrics["step"]` is its number, from 1."""

    def flush(self) -> None:  # noqa: B027  # most have no files in the run's folder
        """Bring files in the run's folder up to date."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left, and say that this launch has ended."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows a run by, the same in all its launches.

    Attributes:
        name: For people: the last part of `output_dir` as the run began.
        id: Tells it apart from others of that name.
    """

    name: str
    id: str

    @classmethod
    def of(cls, folder: Path, name: str) -> "TrackedRun":
        """Return that of a run's folder, where it is kept in a file from the first launch on.

        Args:
            folder: The run's local folder.
            name: For the first launch.
        """
        path = folder / IDENTITY_FILE
        if not path.exists():
            write_atomic(path, json.dumps({"name": name, "id": secrets.token_hex(4)}))
        return cls(**json.loads(path.read_text()))


def logged(metrics: Metrics) -> dict[str, float]:
    """Return the metrics that have a value, without the step."""
    return {name: value for name, value in metrics.items() if name != "step" and value is not None}


def import_tracker(package: str) -> ModuleType:
    """Import the package of a tracker, whose name is also that of its key under `log` and of its extra.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"log.{package}: the package {package} cannot be imported ({error}); install it by "
            f"`pip install 'threetowers[{package}]'`, or set log.{package}: null"
        ) from error


def cannot_start(package: str, error: Exception) -> ConfigError:
    """Return the error for a tracker that refuses to begin."""
    reason: Any = str(error).partition("\n")[0] or type(error).__name__
    return ConfigError(f"log.{package}: {package} cannot start: {reason}; see its settings, or set log.{package}: null")

"""Where the checkpoints of a run are kept: whole ones by their step, each complete or absent at any moment."""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from threetowers.cache.storage.atomic import sync_folder, write_atomic

INDEX_FILE = "checkpoint.json"
STEP_DIGITS = 8
STEP_PATTERN = "step-" + "[0-9]" * STEP_DIGITS


class CheckpointStore(ABC):
    """The checkpoints of a run. Ranks write the files of one into the same place; the first rank completes it.

    Methods that write raise OSError, whose message names the address.
    """

    @abstractmethod
    def address(self, step: int) -> str:
        """Return the address of the checkpoint after `step` steps, for messages."""

    @abstractmethod
    def newest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None where there is none."""

    @abstractmethod
    def fetch(self, step: int) -> None:
        """Bring the files of a complete checkpoint into its local folder. Once per machine, before ranks read it."""

    @abstractmethod
    def local_folder(self, step: int) -> Path:
        """Return the local folder with the files of a checkpoint that was fetched."""

    @abstractmethod
    def forget(self) -> None:
        """Remove local copies of checkpoints that are kept elsewhere. Once per machine, after all have read them."""

    @abstractmethod
    def remove_partial(self) -> None:
        """Remove what a run left that died while writing or removing one. First rank, before any other writes."""

    @abstractmethod
    def begin(self, step: int) -> Path:
        """Return the local folder, which exists, into which a rank writes its file of a new checkpoint."""

    @abstractmethod
    def add(self, step: int, file: Path) -> None:
        """Take a rank's file, which is whole and on the disk, into the new checkpoint."""

    @abstractmethod
    def complete(self, step: int, index: str, keep: int) -> None:
        """Make a checkpoint of what all ranks have added, and remove all but the newest `keep`. First rank alone.

        Args:
            step: Of the checkpoint.
            index: The content of its INDEX_FILE.
            keep: Number of checkpoints that stay.
        """

    @abstractmethod
    def discard(self, step: int) -> None:
        """Remove what was added to a checkpoint that cannot be completed. First rank alone; failures are no errors."""


class LocalCheckpoints(CheckpointStore):
    """Checkpoints in a folder that all ranks see: written under another name, and renamed when they are whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, step: int) -> Path:
        return self._folder / step_name(step)

    def _partial(self, step: int) -> Path:
        return self._folder / f".{step_name(step)}.partial"

    def address(self, step: int) -> str:
        """Return the checkpoint's folder."""
        return str(self._path(step))

    def newest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None where there is none."""
        newest = max(self._folder.glob(STEP_PATTERN), default=None)
        return None if newest is None else step_of(newest.name)

    def fetch(self, step: int) -> None:
        """Do nothing: the files are in place."""

    def local_folder(self, step: int) -> Path:
        """Return the checkpoint's folder."""
        return self._path(step)

    def forget(self) -> None:
        """Do nothing: there are no copies."""

    def remove_partial(self) -> None:
        """Remove partial checkpoints."""
        for partial in self._folder.glob(".step-*.partial"):
            shutil.rmtree(partial)

    def begin(self, step: int) -> Path:
        """Create the checkpoint's folder under its partial name."""
        partial = self._partial(step)
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def add(self, step: int, file: Path) -> None:
        """Do nothing: the file is where it belongs."""

    def complete(self, step: int, index: str, keep: int) -> None:
        """Rename the partial folder, then remove old checkpoints."""
        partial, final = self._partial(step), self._path(step)
        write_atomic(partial / INDEX_FILE, index)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        sync_folder(self._folder)
        for old in sorted(self._folder.glob("step-*"))[:-keep]:
            obsolete = self._folder / f".{old.name}.partial"  # never half a checkpoint under a complete one's name
            old.replace(obsolete)
            shutil.rmtree(obsolete)

    def discard(self, step: int) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self._partial(step), ignore_errors=True)


def step_name(step: int) -> str:
    """Return the name of the checkpoint after `step` steps."""
    return f"step-{step:0{STEP_DIGITS}d}"


def step_of(name: str) -> int:
    """Return the number of steps that a run had made when it wrote the checkpoint of this name."""
    return int(name.removeprefix("step-"))

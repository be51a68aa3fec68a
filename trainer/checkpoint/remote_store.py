"""Checkpoints in an object store: the files first, the index last, which makes them a checkpoint."""

import contextlib
import fnmatch
import shutil
from pathlib import Path

from threetowers.cache.storage.remote import RemoteStorage
from threetowers.trainer.checkpoint.store import INDEX_FILE, STEP_PATTERN, CheckpointStore, step_name, step_of

FOLDER = "checkpoints"
OWNER = "checkpoint"


class RemoteCheckpoints(CheckpointStore):
    """Checkpoints below `checkpoints/` of a storage, by way of a staging folder on each machine.

    A checkpoint whose index is missing does not exist: the index is written after all files of all ranks, and removed
    before them. On a machine lie the files that its ranks are uploading, or one checkpoint that they resume from.
    """

    def __init__(self, storage: RemoteStorage, staging: Path) -> None:
        self._storage = storage
        self._staging = staging

    def _name(self, step: int, file: str = "") -> str:
        return f"{FOLDER}/{step_name(step)}/{file}".rstrip("/")

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, complete or not, in order."""
        entries = (entry.rstrip("/") for entry in self._storage.listdir(FOLDER))
        return [step_of(entry) for entry in entries if fnmatch.fnmatch(entry, STEP_PATTERN)]

    def _is_complete(self, step: int) -> bool:
        return self._storage.size(self._name(step, INDEX_FILE)) is not None

    def _remove(self, step: int) -> None:
        self._storage.delete(self._name(step, INDEX_FILE))  # first: what is left is no checkpoint
        for file in self._storage.walk(self._name(step)):
            self._storage.delete(self._name(step, file))

    def address(self, step: int) -> str:
        """Return the checkpoint's URL."""
        return self._storage.uri(self._name(step))

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint with an index, None where there is none."""
        return next((step for step in reversed(self._steps()) if self._is_complete(step)), None)

    def fetch(self, step: int) -> None:
        """Download the checkpoint into the staging folder."""
        folder = self.local_folder(step)
        for file in self._storage.walk(self._name(step)):
            self._storage.download(self._name(step, file), folder / file)

    def local_folder(self, step: int) -> Path:
        """Return where the checkpoint is staged."""
        return self._staging / step_name(step)

    def forget(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def remove_partial(self) -> None:
        """Remove the files of checkpoints without an index."""
        for step in self._steps():
            if not self._is_complete(step):
                self._remove(step)

    def begin(self, step: int) -> Path:
        """Create the folder in which the files are staged."""
        folder = self.local_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def add(self, step: int, file: Path) -> None:
        """Upload a rank's file and remove the staged one."""
        try:
            self._storage.upload(self._name(step, file.name), file)
        finally:
            file.unlink()
            with contextlib.suppress(OSError):  # not empty: other ranks stage theirs
                file.parent.rmdir()

    def complete(self, step: int, index: str, keep: int) -> None:
        """Write the index, then remove old checkpoints."""
        self._storage.put(self._name(step, INDEX_FILE), index.encode(), OWNER)
        steps = self._steps()
        kept = [step for step in steps if self._is_complete(step)][-keep:]
        for old in steps:
            if old not in kept:
                self._remove(old)

    def discard(self, step: int) -> None:
        """Remove what was uploaded of the checkpoint."""
        with contextlib.suppress(OSError):
            self._remove(step)

"""Where a run is kept: in a local folder, or at a URL by way of a local one."""

import contextlib
import hashlib
import logging
import os
import shutil
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

from threetowers.cache.storage.lease import Lease
from threetowers.cache.storage.remote import RemoteStorage
from threetowers.cache.storage.storage import Storage, is_url
from threetowers.trainer.checkpoint.remote_store import FOLDER, RemoteCheckpoints
from threetowers.trainer.checkpoint.store import CheckpointStore, LocalCheckpoints
from threetowers.trainer.run.run_folder import RunFolder
from threetowers.trainer.run.run_lease import LEASE_SECONDS, local_run_lease, remote_run_lease

logger = logging.getLogger(__name__)

OWN_FOLDERS = ("tokenizer/",)
PROGRESS_SECONDS = 60.0  # between two uploads of the metrics, besides those before each checkpoint


class RunStore(ABC):
    """A run's files, which are worked on in a local folder and kept where `output_dir` says.

    Attributes:
        folder: The local folder.
        checkpoints: Its checkpoints.
    """

    folder: RunFolder
    checkpoints: CheckpointStore

    @abstractmethod
    def lease(self, timeout: float = LEASE_SECONDS) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lease on the run inside the context. Raises RunInUse where another process holds it and lives."""

    @abstractmethod
    def fetch(self) -> None:
        """Make the local folder what is kept of the run, without weights and checkpoints. Once per machine."""

    @abstractmethod
    def publish(self) -> None:
        """Bring what was written into the local folder to where the run is kept. First rank alone."""

    @abstractmethod
    def publish_progress(self) -> None:
        """Publish, but not too often, and go on where that fails: the next checkpoint insists. First rank alone."""

    @abstractmethod
    def remove_results(self) -> None:
        """Remove what only a finished run has, because this one goes on. First rank alone."""

    @abstractmethod
    def forget(self) -> None:
        """Remove the local folder, if the run is kept elsewhere. Once per machine."""


class LocalRun(RunStore):
    """A run that is kept in a local folder, or one that all machines share."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.checkpoints = LocalCheckpoints(self.folder.checkpoints)

    def lease(self, timeout: float = LEASE_SECONDS) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lease on the folder inside the context."""
        return local_run_lease(self.folder.path, timeout)

    def fetch(self) -> None:
        """Do nothing: everything is in place."""

    def publish(self) -> None:
        """Do nothing: everything is in place."""

    def publish_progress(self) -> None:
        """Do nothing: everything is in place."""

    def remove_results(self) -> None:
        """Remove weights and summary."""
        self.folder.remove_results()

    def forget(self) -> None:
        """Do nothing: this is the run."""


class RemoteRun(RunStore):
    """A run that is kept at a URL.

    What is written to the local folder is uploaded before each checkpoint, so that a checkpoint finds what belongs to
    it, and at the end, the summary last. Local files are of this launch alone.
    """

    def __init__(self, url: str, staging: Path) -> None:
        """`staging`: the local folder, for this run alone."""
        self._storage = RemoteStorage(url)
        self.folder = RunFolder(staging, url)
        self.checkpoints = RemoteCheckpoints(self._storage, self.folder.checkpoints)
        self._published: dict[str, tuple[int, int]] = {}  # time and size of a file when it was uploaded, by name
        self._published_at = time.monotonic()

    def lease(self, timeout: float = LEASE_SECONDS) -> contextlib.AbstractContextManager[Lease]:
        """Hold the lease at the URL inside the context."""
        return remote_run_lease(self._storage, timeout)

    def fetch(self) -> None:
        """Download the run's own files; what an earlier launch left in the local folder is removed.

        A summary without weights is left out: that run is not finished.
        """
        shutil.rmtree(self.folder.path, ignore_errors=True)
        self.folder.path.mkdir(parents=True)
        weights, summary = self.folder.weights.name, self.folder.summary.name
        names = own_files(self._storage)
        for name in names:
            if name != weights and (name != summary or weights in names):
                self._storage.download(name, self.folder.path / name)
                self._published[name] = _version(self.folder.path / name)
        if weights in names and summary in names:
            self.folder.weights.touch()  # stands for the weights of a finished run, which training does not read
            self._published[weights] = _version(self.folder.weights)

    def publish(self) -> None:
        """Upload the files that were written since the last time, those that others wait for at last.

        Raises:
            StorageError: The store refuses one.
        """
        last = [self.folder.config.name, self.folder.weights.name, self.folder.summary.name]
        for name in sorted(self._files(), key=lambda name: (last.index(name) if name in last else -1, name)):
            version = _version(self.folder.path / name)
            if self._published.get(name) != version:
                self._storage.upload(name, self.folder.path / name)
                self._published[name] = version
        self._published_at = time.monotonic()

    def publish_progress(self) -> None:
        """Upload what was written in the last minute, with a warning where the store refuses it."""
        if time.monotonic() - self._published_at < PROGRESS_SECONDS:
            return
        try:
            self.publish()
        except OSError as error:
            self._published_at = time.monotonic()
            logger.warning("%s; tried again at the next checkpoint", error)

    def remove_results(self) -> None:
        """Remove summary and weights, here and there."""
        self.folder.remove_results()
        for path in (self.folder.summary, self.folder.weights):
            self._storage.delete(path.name)
            self._published.pop(path.name, None)

    def forget(self) -> None:
        """Remove the local folder."""
        shutil.rmtree(self.folder.path, ignore_errors=True)

    def _files(self) -> list[str]:
        """Return the files of the local folder, relative to it, without checkpoints and what is being written."""
        found = []
        for path in self.folder.path.rglob("*"):
            name = path.relative_to(self.folder.path)
            hidden = any(part.startswith(".") for part in name.parts)
            if name.parts[0] != FOLDER and not hidden and path.is_file() and not path.is_symlink():
                found.append(name.as_posix())
        return found


def own_files(storage: Storage) -> list[str]:
    """Return the files of a kept run without its checkpoints and what trackers have in it, relative to it."""
    entries = storage.listdir()
    names = [entry for entry in entries if not entry.endswith("/") and not entry.startswith(".")]
    for folder in OWN_FOLDERS:
        if folder in entries:
            names += [f"{folder}{file}" for file in storage.walk(folder)]
    return names


def run_store(output_dir: str | Path, staging_dir: str | None = None) -> RunStore:
    """Return where a run is kept.

    Args:
        output_dir: A local folder, or a URL for fsspec.
        staging_dir: The local folder in which those at URLs are worked on, in one folder for each run and machine;
            None: the one for temporary files.

    Raises:
        ValueError: fsspec does not know the URL's protocol, or the protocol's package is missing.
    """
    if not is_url(output_dir):
        return LocalRun(Path(str(output_dir).removeprefix("file://")))
    url = str(output_dir).rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = f"threetowers-run-{digest}-{socket.gethostname()}-{os.getuid()}"
    return RemoteRun(url, Path(staging_dir or tempfile.gettempdir()) / name)


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size

"""A run that is read, not trained: from its folder, or from a URL by way of a copy."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from threetowers.cache.storage.remote import RemoteStorage
from threetowers.cache.storage.storage import is_url
from threetowers.trainer.run.run_folder import RunFolder
from threetowers.trainer.run.run_store import own_files


def finished_run_folder(address: str | Path) -> RunFolder:
    """Return the folder of a finished run or an export, which may be absent.

    Of one at a URL it is a copy without checkpoints, made once per process and state of the run, in the folder for
    temporary files, and removed when the process ends.

    Args:
        address: A folder, or a URL for fsspec.

    Raises:
        StorageError: The store cannot be read.
        ValueError: fsspec does not know the URL's protocol, or the protocol's package is missing.
    """
    if not is_url(address):
        return RunFolder(Path(str(address).removeprefix("file://")))
    url = str(address).rstrip("/")
    storage = RemoteStorage(url)
    return _copy(url, tuple((name, storage.modified(name)) for name in own_files(storage)))


@functools.cache
def _copy(url: str, files: tuple[tuple[str, float | None], ...]) -> RunFolder:
    """Return a copy of the files of a run, which were last written at these times."""
    temporary = tempfile.mkdtemp(prefix="threetowers-run-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    folder = RunFolder(Path(temporary) / url.rpartition("/")[2], url)  # some names of models are those of folders
    storage = RemoteStorage(url)
    for name, _ in files:
        storage.download(name, folder.path / name)
    return folder

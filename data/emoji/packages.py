"""The npm packages the data set is built from: fetched with `npm pack`, checked by digest, read without unpacking."""

import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MAX_MEMBER_BYTES = 64 << 20  # the largest icons.json is 15 MB
MAX_PACKAGE_BYTES = 256 << 20


@dataclass(frozen=True)
class Package:
    """One npm package: its name, the pinned version and the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
EMOJILIB = Package("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303")
TWEMOJI = Package("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7")
NOTO = Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad")
NOTO_V1 = Package("@iconify-json/noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37")
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
)
OPENMOJI = Package("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")


def fetch(package: Package, folder: Path) -> Path:
    """Download the package's tarball into `folder` and return its path.

    Raises ValueError when npm is missing or fails, or when other bytes than the pinned ones came.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is not on the PATH; it fetches the icon sets, install Node.js to get it")
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), package.spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` failed with {done.returncode}: {done.stderr.strip()[-500:]}")
    path = folder / package.tarball
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{package.spec}: SHA-256 is {digest}, expected {package.sha256}; the pin is in {__file__}")
    return path


def read(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the regular files of an npm tarball that `wanted` picks, by path below its `package/` folder.

    Nothing is written to disk, so no member can leave its folder. Raises ValueError when the files are larger than an
    emoji set can be.
    """
    files: dict[str, bytes] = {}
    total = 0
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            if not member.isreg() or not wanted(name):
                continue
            total += member.size
            if member.size > MAX_MEMBER_BYTES or total > MAX_PACKAGE_BYTES:
                raise ValueError(
                    f"{path.name}: {name} has {member.size} bytes, {total} so far: too many for an icon set"
                )
            stream = tar.extractfile(member)
            assert stream is not None  # regular files always have one
            files[name] = stream.read()
    return files

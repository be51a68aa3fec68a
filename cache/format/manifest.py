"""What a cache promises: one backbone's raw features, under one preprocessing, of declared views, in one precision.

`manifest.json` holds the contract. It is written once, before any row, and never changed; everything that reads or adds
rows compares itself with it first. Which tars the rows are of is the matter of the tar table (`table.py`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import xxhash
from pydantic import ConfigDict

from threetowers.cache.format.dtypes import Precision, Tier, precision
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.schema import parse_as
from threetowers.cache.storage.storage import Storage

FORMAT = 2
MANIFEST = "manifest.json"
NOTED = ("weights", "versions")  # where they differ a reader is told; the digest of the weights is what binds
TEACHER = ("backbone", "weights_digest", "feature", "preprocessing", "dim")  # what makes two embeddings comparable
T = TypeVar("T")


class ManifestError(ValueError):
    """A cache that is not what its user expects: other contract, other tars, or rows that are missing or changed."""


@dataclass(frozen=True)
class Preprocessing:
    """The teacher's evaluation transform, in timm's terms. `input_size` is (height, width) in pixels, `decode` how the
    bytes of an image become its pixels."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    input_size: tuple[int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decode: Literal["pillow", "pillow-draft"] = "pillow"


@dataclass(frozen=True)
class Manifest:
    """The promise of a cache.

    Rows are addressed as `tar_id * slot + ordinal`, and checksummed in chunks of `chunk_rows` rows. `weights` is where
    the weights came from, `weights_digest` the sha256 of the state dict, `dtype` the precision tier, `dim` the width of
    a row, `compute` the numbers of the forward pass.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    backbone: str
    weights: str
    weights_digest: str
    preprocessing: Preprocessing
    dim: int
    dtype: Tier
    slot: int
    chunk_rows: int
    versions: dict[str, str]
    views: Views = CENTER
    compute: Literal["float32", "bfloat16"] = "float32"
    feature: Literal["pre_logits"] = "pre_logits"
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        """xxh3_128 over the whole contract: ties each tar's done record to this cache."""
        return xxhash.xxh3_128_hexdigest(to_json(self))

    @property
    def precision(self) -> Precision:
        """How rows are stored."""
        return precision(self.dtype)

    @property
    def n_chunks(self) -> int:
        """Chunks of a whole slot."""
        return self.slot // self.chunk_rows


def mismatch(expected: Manifest, found: Manifest) -> list[str]:
    """The fields in which two contracts bind differently, as "field: expected X, found Y"."""
    return _compare(expected, found, lambda name: name not in NOTED)


def teacher_mismatch(expected: Manifest, found: Manifest) -> list[str]:
    """The same over what makes a teacher alone: views, number format and layout may differ."""
    return _compare(expected, found, lambda name: name in TEACHER)


def notes(expected: Manifest, found: Manifest) -> list[str]:
    """Differences that a user should know of and that bind nobody: library versions, where the weights came from."""
    return _compare(expected, found, lambda name: name in NOTED)


def _compare(expected: Manifest, found: Manifest, wanted: Any) -> list[str]:
    a, b = dataclasses.asdict(expected), dataclasses.asdict(found)
    lines = []
    for name in filter(wanted, a):
        inner = [(f"{name}.{k}", a[name].get(k), b[name].get(k)) for k in a[name]] if isinstance(a[name], dict) else []
        for field, x, y in inner or [(name, a[name], b[name])]:
            if x != y:
                lines.append(f"{field}: expected {x}, found {y}")
    return lines


def to_json(value: Any) -> bytes:
    """A dataclass as indented JSON, the same bytes for the same value."""
    return (json.dumps(dataclasses.asdict(value), indent=1, ensure_ascii=False) + "\n").encode()


def from_json(kind: type[T], storage: Storage, name: str) -> T:
    """Read a dataclass back.

    Raises:
        FileNotFoundError: there is no such file.
        ContractError: the file does not hold exactly these fields, or holds values of other types.
    """
    data = storage.read(name)
    return parse_as(kind, data, ManifestError, f"{storage.uri(name)} is damaged, or of another version")


@dataclass(frozen=True)
class _Format:
    """The one field that manifests of all formats share."""

    format: int


def read_manifest(storage: Storage) -> Manifest:
    """The contract of a cache.

    Raises:
        ContractError: no cache there, one of another format, or a damaged manifest.
    """
    try:
        found = from_json(_Format, storage, MANIFEST).format
        if found != FORMAT:
            raise ManifestError(
                f"{storage}: cache of format {found}, this version reads format {FORMAT}: remove it and run "
                "`threetowers cache build` again, or build into another folder"
            )
        return from_json(Manifest, storage, MANIFEST)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{storage}: no cache here ({error.filename} is missing): run `threetowers cache build`"
        ) from None

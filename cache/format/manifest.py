"""The manifest: what a cache was built with.

`manifest.json` is written once, before any row, and never changed; everything that reads or adds rows compares itself
with it first. The tar table (`tar_table.py`) holds which tars the rows belong to.
"""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

import xxhash
from pydantic import ConfigDict

from threetowers.cache.format.dtypes import DtypeName, StorageDtype, storage_dtype
from threetowers.cache.format.views import CENTER, Views
from threetowers.cache.schema import parse_as
from threetowers.cache.storage.storage import Storage

FORMAT = 3
MANIFEST = "manifest.json"
# Fields that are only informative: the digest of the weights decides, not where they came from.
# Batch size and runtime change last bits.
INFORMATIVE_FIELDS = ("weights", "versions", "runtime", "batch_size")
# Fields that make two embeddings comparable.
TEACHER_FIELDS = ("backbone", "weights_digest", "feature", "preprocessing", "dim")

DecodeMode = Literal["pillow", "pillow-draft"]
TeacherPrecision = Literal["float32", "bfloat16"]
TeacherRuntime = Literal["torch", "onnx"]
T = TypeVar("T")


class ManifestError(ValueError):
    """A cache that is not the expected one: another manifest, other tars, or rows that are missing or changed."""


@dataclass(frozen=True)
class Preprocessing:
    """The teacher's evaluation transform, in timm's terms.

    `input_size` is (height, width) in pixels, `decode` how the bytes of an image become its pixels.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    input_size: tuple[int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decode: DecodeMode = "pillow"


@dataclass(frozen=True)
class Manifest:
    """What a cache was built with.

    Attributes:
        backbone: timm name of the teacher.
        weights: where its weights came from.
        weights_digest: sha256 of its state dict.
        preprocessing: its evaluation transform.
        dim: width D of a row.
        dtype: name of the storage dtype of the rows.
        rows_per_tar: rows reserved for each tar; row = tar id * rows_per_tar + ordinal.
        chunk_rows: rows that share a checksum.
        versions: of torch, timm and pillow, and of ONNX Runtime where it is the runtime.
        views: the views of each image.
        precision: arithmetic of the teacher's forward pass.
        feature: which features of the backbone are stored.
        image_member: extension of the member that is the image of a sample; None: its only image.
        runtime: what runs the forward pass.
        batch_size: images per forward pass.
        format: version of the format on disk.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    backbone: str
    weights: str
    weights_digest: str
    preprocessing: Preprocessing
    dim: int
    dtype: DtypeName
    rows_per_tar: int
    chunk_rows: int
    versions: dict[str, str]
    views: Views = CENTER
    precision: TeacherPrecision = "float32"
    feature: Literal["pre_logits"] = "pre_logits"
    image_member: str | None = None
    runtime: TeacherRuntime = "torch"
    batch_size: int = 64
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        """The xxh3_128 of the manifest, which ties each done record to this cache."""
        return xxhash.xxh3_128_hexdigest(to_json(self))

    @property
    def storage_dtype(self) -> StorageDtype:
        """How rows are stored."""
        return storage_dtype(self.dtype)

    @property
    def chunks_per_tar(self) -> int:
        """Chunks of all rows reserved for a tar."""
        return self.rows_per_tar // self.chunk_rows


def incompatibilities(expected: Manifest, found: Manifest) -> list[str]:
    """Return the fields in which two caches are incompatible, as "field: expected X, found Y"."""
    names = {field.name for field in dataclasses.fields(Manifest)}
    return _differences(expected, found, names.difference(INFORMATIVE_FIELDS))


def teacher_mismatch(expected: Manifest, found: Manifest) -> list[str]:
    """Return the differences between two teachers alone: views, storage dtype and layout may differ."""
    return _differences(expected, found, TEACHER_FIELDS)


def informative_differences(expected: Manifest, found: Manifest) -> list[str]:
    """Return the differences that are reported and tolerated, such as versions and where the weights came from."""
    return _differences(expected, found, INFORMATIVE_FIELDS)


def _differences(expected: Manifest, found: Manifest, names: Collection[str]) -> list[str]:
    """Compare some fields, and the fields in these, in the order of the manifest."""
    expected_fields = dataclasses.asdict(expected)
    found_fields = dataclasses.asdict(found)
    lines = []
    for name, value in expected_fields.items():
        if name not in names:
            continue
        if isinstance(value, dict):
            pairs = [(f"{name}.{key}", value[key], found_fields[name].get(key)) for key in value]
        else:
            pairs = [(name, value, found_fields[name])]
        lines += [f"{field}: expected {a}, found {b}" for field, a, b in pairs if a != b]
    return lines


def to_json(value: Any) -> bytes:
    """Return a dataclass as indented JSON: the same bytes for the same value."""
    return (json.dumps(dataclasses.asdict(value), indent=1, ensure_ascii=False) + "\n").encode()


def from_json(kind: type[T], storage: Storage, name: str) -> T:
    """Read a dataclass from a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ManifestError: the file has other fields, or values of other types.
    """
    data = storage.read(name)
    return parse_as(kind, data, ManifestError, f"{storage.uri(name)} is damaged, or of another version")


@dataclass(frozen=True)
class _Format:
    """The one field that manifests of all formats share."""

    format: int


def read_manifest(storage: Storage) -> Manifest:
    """Read the manifest of a cache.

    Raises:
        ManifestError: there is no cache, it has another format, or its manifest is damaged.
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

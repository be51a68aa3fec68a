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
from threetowers.cache.webdataset.captions import DEFAULT_SOURCES, CaptionFormat

FORMAT = 4
MANIFEST = "manifest.json"
# Fields that are only informative: the digest of the weights decides, not where they came from.
# Batch size and runtime change last bits.
INFORMATIVE_FIELDS = ("weights", "versions", "runtime", "batch_size")
# Fields that make two embeddings comparable.
TEACHER_FIELDS = ("of", "encoder", "weights_digest", "feature", "preprocessing", "text", "dim")

DecodeMode = Literal["pillow", "pillow-draft"]
EncoderPrecision = Literal["float32", "bfloat16"]
EncoderRuntime = Literal["torch", "onnx"]
Side = Literal["image", "text"]
MAX_SOURCES = 256  # a row names its source by one byte
T = TypeVar("T")


class ManifestError(ValueError):
    """A cache that is not the expected one: another manifest, other tars, or rows that are missing or changed."""


@dataclass(frozen=True)
class Preprocessing:
    """An encoder's evaluation transform, in timm's terms.

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
class TextProcessing:
    """How captions become an encoder's tokens, and its output a vector.

    Attributes:
        tokenizer_digest: sha256 of the tokenizer.
        prompt: put before each caption.
        max_length: tokens that a caption is cut to, special ones included.
        pooling: how the states of the tokens become one vector, in the model's own terms.
        normalize: whether the model's own last step scales the vector to unit norm.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    tokenizer_digest: str
    prompt: str
    max_length: int
    pooling: str
    normalize: bool


@dataclass(frozen=True)
class CaptionSources:
    """Which captions of a sample a cache of text holds, as `CaptionFormat` names them; no sources: its default."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    sources: tuple[str, ...] = ()
    caption_per_line: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for sources that are none, repeated, or too many."""
        if len(set(self.sources)) != len(self.sources) or len(self.sources) > MAX_SOURCES:
            raise ValueError(f"found the sources {self.sources}, expected up to {MAX_SOURCES}, each once")
        _ = self.caption_format

    @property
    def names(self) -> tuple[str, ...]:
        """The sources by the number that a row has for its own."""
        return self.sources or DEFAULT_SOURCES

    @property
    def caption_format(self) -> CaptionFormat:
        """What finds these captions in a sample, in the order of their rows."""
        return CaptionFormat(dict.fromkeys(self.sources, 1.0), self.caption_per_line)


@dataclass(frozen=True)
class Manifest:
    """What a cache was built with.

    Attributes:
        encoder: name of the teacher, as `timm:resnet50`, without its weights.
        weights: where its weights came from.
        weights_digest: sha256 of its state dict.
        feature: which of its features is stored.
        dim: width D of a row.
        dtype: name of the storage dtype of the rows.
        samples_per_tar: samples for which each tar has room.
        rows_per_tar: rows reserved for each tar: one a sample, or one a caption.
        chunk_rows: rows that share a checksum.
        versions: of the packages that decide what the teacher computes.
        of: which side of the samples is embedded.
        preprocessing: the teacher's evaluation transform of images; None in a cache of text.
        text: how it takes captions; None in a cache of images.
        captions: which captions are embedded; None in a cache of images.
        views: the views of each image.
        precision: arithmetic of the teacher's forward pass.
        image_member: extension of the member that is the image of a sample; None: its only image.
        runtime: what runs the forward pass.
        batch_size: images per forward pass.
        format: version of the format on disk.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    encoder: str
    weights: str
    weights_digest: str
    feature: str
    dim: int
    dtype: DtypeName
    samples_per_tar: int
    rows_per_tar: int
    chunk_rows: int
    versions: dict[str, str]
    of: Side = "image"
    preprocessing: Preprocessing | None = None
    text: TextProcessing | None = None
    captions: CaptionSources | None = None
    views: Views = CENTER
    precision: EncoderPrecision = "float32"
    image_member: str | None = None
    runtime: EncoderRuntime = "torch"
    batch_size: int = 64
    format: int = FORMAT

    def __post_init__(self) -> None:
        """Raise ValueError unless the manifest says how its side of the samples was embedded, and no more."""
        expected = {"image": (True, False, False), "text": (False, True, True)}[self.of]
        found = tuple(value is not None for value in (self.preprocessing, self.text, self.captions))
        if found != expected:
            raise ValueError(
                f"a manifest of {self.of} has preprocessing (image), or text and captions (text), found "
                f"{[name for name in ('preprocessing', 'text', 'captions') if getattr(self, name) is not None]}"
            )

    @property
    def image_preprocessing(self) -> Preprocessing:
        """The teacher's evaluation transform. Raises ManifestError for a cache of text."""
        if self.preprocessing is None:
            raise ManifestError(f"of: expected a cache of images, found one of {self.of} ({self.encoder})")
        return self.preprocessing

    @property
    def caption_sources(self) -> CaptionSources:
        """Which captions are embedded. Raises ManifestError for a cache of images."""
        if self.captions is None:
            raise ManifestError(f"of: expected a cache of text, found one of {self.of} ({self.encoder})")
        return self.captions

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
        found_value = found_fields[name]
        if isinstance(value, dict) and isinstance(found_value, dict):
            pairs = [(f"{name}.{key}", value[key], found_value.get(key)) for key in value]
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

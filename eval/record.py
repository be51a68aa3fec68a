"""The record of one evaluation: its spec (task, data, model, settings) with its result.

A record is a JSON file; a .npz file of the same name beside it holds the scores of single items.
"""

import hashlib
import json
import logging
import math
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from threetowers import __version__
from threetowers.cache.schema import parse_as
from threetowers.cache.storage.atomic import finish_partial, partial_path, write_atomic
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.eval.encoders.encoder import ModelInfo

logger = logging.getLogger(__name__)

RECORD_FORMAT = 4
ItemArrays = Mapping[str, NDArray[Any]]
LIBRARIES = (
    "torch",
    "timm",
    "open_clip_torch",
    "faiss-gpu",
    "faiss-cpu",
    "numpy",
    "sentencepiece",
    "zarr",
    "webdataset",
    "pillow",
)


class BadRecord(ValueError):
    """A record that cannot be read, or must not be written."""


@dataclass(frozen=True)
class TarRef:
    """One tar of the data: file name, fingerprint of its content or index, number of samples."""

    name: str
    fingerprint: str
    samples: int


@dataclass(frozen=True)
class EvalSpec:
    """An evaluation before it is run: everything that its result depends on.

    Attributes:
        task: retrieval, zeroshot, ...
        data: Name of the data set, or of one gallery of it.
        model: Name of the model.
        model_digest: Digest of its weights.
        step: Optimizer steps it was trained for; None: unknown.
        tars: The tars that the data comes from.
        preprocessing: Transform before the image tower, in words.
        precision: Of the towers' forward pass.
        cache_manifest: Digest of the cache's manifest, where the model reads cached rows.
        model_fingerprint: Of all that decides the model's embeddings (see `ModelInfo`).
        settings: Whatever else changes the numbers, such as the task's settings and the filter of the images.
    """

    task: str
    data: str
    model: str
    model_digest: str
    step: int | None
    tars: tuple[TarRef, ...]
    preprocessing: str
    precision: str
    cache_manifest: str | None = None
    model_fingerprint: str = ""
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: str,
        data: str,
        model: ModelInfo,
        tars: Iterable[TarIndex],
        settings: Mapping[str, str | int | float | bool | None],
    ) -> Self:
        """Return the spec of a task on some tars for a model."""
        return cls(
            task=task,
            data=data,
            model=model.name,
            model_digest=model.digest,
            step=model.step,
            tars=tuple(TarRef(tar.name, tar.fingerprint, len(tar.samples)) for tar in tars),
            preprocessing=model.preprocessing,
            precision=model.precision,
            cache_manifest=model.cache_manifest,
            model_fingerprint=model.fingerprint,
            settings=dict(settings),
        )

    def fingerprint(self) -> str:
        """Return 64 hex digits, equal for equal specs on any machine."""
        content = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """Name of the record's file: `<task>-<data>-<first 16 digits of the fingerprint>.json`."""
        readable = re.sub(r"[^A-Za-z0-9._]+", "_", f"{self.task}-{self.data}")[:80]
        return f"{readable}-{self.fingerprint()[:16]}.json"


@dataclass(frozen=True)
class ExampleItem:
    """One image or text of an example.

    Attributes:
        text: A caption, a class name, or the key of an image.
        thumbnail: For an image, its name in the `ThumbnailStore` beside the records.
        score: Cosine with the query.
        hit: Whether it matches the query.
    """

    text: str
    thumbnail: str | None = None
    score: float | None = None
    hit: bool | None = None


@dataclass(frozen=True)
class Example:
    """A query with a model's answers, best first.

    Attributes:
        heading: Such as "Caption → images"; the report shows examples of one heading together.
        query: The query.
        answers: What the model ranks highest.
        rank: Rank of the first match, from 1; None: unknown.
    """

    heading: str
    query: ExampleItem
    answers: tuple[ExampleItem, ...]
    rank: int | None = None


@dataclass(frozen=True)
class EvalResult:
    """The result of a task.

    Attributes:
        metrics: Metrics by name.
        counts: Of what was scored, tied, ...
        items: Arrays by name. For a metric that is a mean over items, the array of its name holds the summands (N,)
            float, NaN for an item that does not count; intervals and paired comparisons are computed from them. Items
            that are not independent have equal numbers in `<prefix>/group` (N,) int64, or in `group` for metrics
            without a prefix, such as the captions of one image; they are drawn together. Any other array is for a
            plot, see docs/evaluation.md.
        examples: Queries with the model's answers.
    """

    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    items: ItemArrays = field(default_factory=dict)
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class EvalRecord:
    """A spec with its result, as it is on disk.

    Attributes:
        spec: The spec.
        metrics: Metrics by name, all finite.
        counts: Of what was scored, tied, ...
        sample_ids: `digest` of the keys of the samples.
        texts: `digest` of the captions, prompts or class names. Two results are comparable where both digests agree.
        seconds: Wall time.
        recipe: Of the model: runs of one recipe differ in nothing but their seed.
        seed: Of the model.
        tokenizer: Of a run, by name and sha256.
        items: Names of the arrays in the .npz file.
        examples: Queries with the model's answers.
        left_out: Number of images that were left out, by reason (see `eval.left_out`).
        date: UTC, in ISO 8601.
        versions: Of the libraries that can change a result.
        format: Version of this format.
    """

    spec: EvalSpec
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    sample_ids: str
    texts: str
    seconds: float
    recipe: str | None = None
    seed: int | None = None
    tokenizer: str | None = None
    items: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    format: int = RECORD_FORMAT

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return self.spec.file_name


def digest(strings: Iterable[str]) -> str:
    """Return the SHA-256 (64 hex digits) of a collection of strings in any order; repeated strings count."""
    sha = hashlib.sha256()
    # Captions read from JSON may hold lone surrogates, which plain UTF-8 refuses.
    for encoded in sorted(string.encode("utf-8", "surrogatepass") for string in strings):
        sha.update(len(encoded).to_bytes(8, "little") + encoded)
    return sha.hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the installed libraries that can change a result."""
    versions = {"threetowers": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def load_or_compute(
    spec: EvalSpec,
    model: ModelInfo,
    folder: Path,
    compute: Callable[[], EvalResult],
    *,
    sample_ids: str,
    texts: str,
    left_out: Mapping[str, int] | None = None,
    overwrite: bool = False,
) -> EvalRecord:
    """Return the record of a spec: the one in `folder`, or a newly computed one, which is written there.

    Args:
        spec: The spec.
        model: The model of the spec.
        folder: Folder of records.
        compute: Computes the result.
        sample_ids: `digest` of the keys of the samples. A record of other samples or texts is computed again, and so
            is one that cannot be read.
        texts: `digest` of the captions or prompts.
        left_out: Number of images that were left out, by reason.
        overwrite: Compute the result even if it is recorded.
    """
    path = folder / spec.file_name
    if path.exists() and not overwrite:
        try:
            found = read_record(path)
            if (found.sample_ids, found.texts) == (sample_ids, texts):
                read_items(found, folder)
                return found
        except BadRecord as error:
            logger.warning("%s: computing it again", error)
    started = time.perf_counter()
    result = compute()
    record = EvalRecord(
        spec=spec,
        metrics=result.metrics,
        counts=result.counts,
        sample_ids=sample_ids,
        texts=texts,
        seconds=time.perf_counter() - started,
        recipe=model.recipe,
        tokenizer=model.tokenizer,
        seed=model.seed,
        items=tuple(result.items),
        examples=tuple(result.examples),
        left_out=dict(left_out or {}),
    )
    write_record(record, folder, result.items)
    return record


def read_items(record: EvalRecord, folder: Path) -> dict[str, NDArray[Any]]:
    """Return the item arrays of a record in `folder`. Raises BadRecord where their file is missing or damaged."""
    if not record.items:
        return {}
    path = (folder / record.file_name).with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in record.items}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BadRecord(f"{path} does not hold the items of {record.file_name}: {error}") from error


def write_record(record: EvalRecord, folder: Path, items: ItemArrays | None = None) -> Path:
    """Write a record into `folder` under its `file_name`, atomically, and return the path.

    Raises:
        BadRecord: A metric is not finite: a result that cannot be compared is a failure.
    """
    bad = {name: value for name, value in record.metrics.items() if not math.isfinite(value)}
    if bad:
        raise BadRecord(f"{record.spec.task} on {record.spec.data!r} gave {bad}: every metric must be finite")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    if items:
        temporary = partial_path(path.with_suffix(".npz"))
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(items))
        finish_partial(temporary, path.with_suffix(".npz"))  # before the record that lists them
    content = json.dumps(asdict(record), indent=2, allow_nan=False) + "\n"
    write_atomic(path, content)
    return path


def read_record(path: Path) -> EvalRecord:
    """Return the record in a file. Raises BadRecord, which names the file and the field, for anything else."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRecord(f"{path} cannot be read as JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != RECORD_FORMAT:
        raise BadRecord(f"{path} has record format {found!r}, this version reads {RECORD_FORMAT}: evaluate again")
    return parse_as(EvalRecord, content, BadRecord, f"{path} is not a record")

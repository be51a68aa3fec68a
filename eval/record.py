"""The result of one evaluation: what was asked, of which model, over exactly which data, and what came out.

A record is a JSON file; beside it, in a .npz file of the same name, are the scores of single items.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers import __version__
from threetowers.cache.schema import parse_as
from threetowers.cache.storage.atomic import finish_partial, write_atomic
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.eval.encoders.encoder import ModelInfo

log = logging.getLogger(__name__)

FORMAT = 2
Items = Mapping[str, NDArray[Any]]
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
    """A result record that cannot be read or should not be written."""


@dataclass(frozen=True)
class TarRef:
    """One tar of the evaluation set: file name, fingerprint of its content or index, number of samples."""

    name: str
    fingerprint: str
    samples: int


@dataclass(frozen=True)
class EvalSpec:
    """What an evaluation asks, complete before any embedding is computed.

    task: "retrieval", "zeroshot", ...            gallery: the part of the data, such as a split or an art style
    run: name of the model                        model: digest of its weights
    step: optimizer steps it had trained          preprocessing: image transform, in words
    precision: of the towers' forward pass        cache_contract: digest, where the run reads cached rows
    settings: whatever else changes the numbers (group field, captions per image, recall cut-offs)
    """

    task: str
    gallery: str
    run: str
    model: str
    step: int | None
    tars: tuple[TarRef, ...]
    preprocessing: str
    precision: str
    cache_manifest: str | None = None
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: str,
        gallery: str,
        facts: ModelInfo,
        tars: Iterable[TarIndex],
        settings: Mapping[str, str | int | float | bool | None],
    ) -> "EvalSpec":
        """The question of a task to a model."""
        return cls(
            task=task,
            gallery=gallery,
            run=facts.name,
            model=facts.digest,
            step=facts.step,
            tars=tuple(TarRef(tar.name, tar.fingerprint, len(tar.samples)) for tar in tars),
            preprocessing=facts.preprocessing,
            precision=facts.precision,
            cache_manifest=facts.cache_manifest,
            settings=dict(settings),
        )

    def fingerprint(self) -> str:
        """64 hex digits, equal for equal questions on any machine: what has an answer need not be computed again."""
        return hashlib.sha256(_json(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Shown:
    """A picture (its name in the `ThumbnailStore` beside the records) or a text that a reader is shown."""

    text: str
    picture: str | None = None
    score: float | None = None
    hit: bool | None = None


@dataclass(frozen=True)
class Example:
    """One query with what a model answered, best first. `rank`: of its first match, from 1, None if unknown."""

    heading: str  # "Text to image", "Classified", ...: examples of one heading stand together
    query: Shown
    answers: tuple[Shown, ...]
    rank: int | None = None


@dataclass(frozen=True)
class EvalResult:
    """What a task computes.

    `items` holds arrays by name. For a metric that is a mean over items, the array of its name holds the summands (N,)
    float, NaN for an item that does not count: intervals and paired comparisons are computed from them. Items that
    are not independent have `<prefix>/group` (N,) int64, or `group` for metrics without a prefix: equal numbers are
    drawn together, such as the captions of one picture. Any other array is for a plot: see docs/evaluation.md.
    """

    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    items: Items = field(default_factory=dict)
    examples: Sequence[Example] = ()


@dataclass(frozen=True)
class EvalRecord:
    """A question with its answer. `seconds` is wall time; `date` is UTC in ISO 8601.

    `sample_ids` and `texts` (captions, prompts or class names) are `digest`s: two results are comparable where both
    agree. `recipe` and `seed` are the model's: runs of one recipe differ in nothing but their seed.
    """

    question: EvalSpec
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    sample_ids: str
    texts: str
    seconds: float
    recipe: str | None = None
    seed: int | None = None
    items: tuple[str, ...] = ()  # names of the arrays in the file beside
    examples: tuple[Example, ...] = ()
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    format: int = FORMAT

    @property
    def file_name(self) -> str:
        """`<task>-<gallery>-<first 16 digits of the fingerprint>.json`."""
        return file_name(self.question)


def file_name(question: EvalSpec) -> str:
    """The name of the file that holds a question's record."""
    readable = re.sub(r"[^A-Za-z0-9._]+", "_", f"{question.task}-{question.gallery}")[:80]
    return f"{readable}-{question.fingerprint()[:16]}.json"


def digest(strings: Iterable[str]) -> str:
    """SHA-256 (64 hex digits) of a collection of strings, whatever their order; repeated strings count."""
    sha = hashlib.sha256()
    # Captions read from JSON may hold lone surrogates, which plain UTF-8 refuses.
    for encoded in sorted(string.encode("utf-8", "surrogatepass") for string in strings):
        sha.update(len(encoded).to_bytes(8, "little") + encoded)
    return sha.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that can change a result, of those installed."""
    versions = {"threetowers": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def answered(
    question: EvalSpec,
    facts: ModelInfo,
    folder: Path,
    compute: Callable[[], EvalResult],
    *,
    sample_ids: str,
    texts: str,
    again: bool = False,
) -> EvalRecord:
    """Return the record of a question: the one in `folder` if it is there, else computed and written.

    `sample_ids` and `texts`: `digest`s of the keys and of the captions or prompts. `again` computes in any case. A
    record that cannot be read, or is of other samples or texts, is computed again.
    """
    path = folder / file_name(question)
    if path.exists() and not again:
        try:
            found = read_record(path)
            if (found.sample_ids, found.texts) == (sample_ids, texts):
                read_items(found, folder)
                return found
        except BadRecord as error:
            log.warning("%s: computed again", error)
    started = time.perf_counter()
    answer = compute()
    record = EvalRecord(
        question=question,
        metrics=answer.metrics,
        counts=answer.counts,
        sample_ids=sample_ids,
        texts=texts,
        seconds=time.perf_counter() - started,
        recipe=facts.recipe,
        seed=facts.seed,
        items=tuple(answer.items),
        examples=tuple(answer.examples),
    )
    write_record(record, folder, answer.items)
    return record


def read_items(record: EvalRecord, folder: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record of `folder`. Raises BadRecord where their file is missing or damaged."""
    if not record.items:
        return {}
    path = (folder / record.file_name).with_suffix(".npz")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in record.items}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BadRecord(f"{path} does not hold the items of {record.file_name}: {error}") from error


def write_record(record: EvalRecord, folder: Path, items: Items | None = None) -> Path:
    """Write the record into `folder` under its `file_name`, whole or not at all, and return the path.

    Raises BadRecord for a metric that is not finite: a result nobody can compare is a failure, not a result.
    """
    bad = {name: value for name, value in record.metrics.items() if not math.isfinite(value)}
    if bad:
        raise BadRecord(
            f"{record.question.task} on {record.question.gallery!r} gave {bad}: every metric must be finite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    if items:
        temporary = path.with_suffix(".npz.partial")
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **dict(items))
        finish_partial(temporary, path.with_suffix(".npz"))  # before the record that promises them
    content = json.dumps(asdict(record), indent=2, allow_nan=False) + "\n"
    write_atomic(path, content)
    return path


def read_record(path: Path) -> EvalRecord:
    """Read one record. Raises BadRecord, naming the file and the field, for anything a record is not."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRecord(f"{path} cannot be read as JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise BadRecord(f"{path} has record format {found!r}, this version reads {FORMAT}: evaluate again")
    return parse_as(EvalRecord, content, BadRecord, f"{path} is not a result record")


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

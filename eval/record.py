"""The result of one evaluation: what was asked, of which model, over exactly which data, and what came out."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from threetowers import __version__
from threetowers.trainer.atomic import replace_text

FORMAT = 1
LIBRARIES = ("torch", "timm", "faiss-gpu", "faiss-cpu", "numpy", "sentencepiece", "zarr", "webdataset", "pillow")


class BadRecord(ValueError):
    """A result record that cannot be read or should not be written."""


@dataclass(frozen=True)
class TarRef:
    """One tar of the evaluation set: file name, fingerprint of its content or index, number of samples."""

    name: str
    fingerprint: str
    samples: int


@dataclass(frozen=True)
class Question:
    """What an evaluation asks, complete before any embedding is computed.

    task: "retrieval", "zeroshot", ...            gallery: the part of the data, such as a split or an art style
    run: name of the run                          model: digest of its weights
    step: optimizer steps it had trained          preprocessing: image transform, in words
    precision: of the towers' forward pass        cache_contract: digest, where the run reads cached rows
    settings: whatever else changes the numbers (group field, captions per image, recall cut-offs)
    """

    task: str
    gallery: str
    run: str
    model: str
    step: int
    tars: tuple[TarRef, ...]
    preprocessing: str
    precision: str
    cache_contract: str | None = None
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """64 hex digits, equal for equal questions on any machine: what has an answer need not be computed again."""
        return hashlib.sha256(_json(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """A question with its answer. `seconds` is wall time; `date` is UTC in ISO 8601.

    `sample_ids` and `captions` are `digest`s: two results are comparable where both agree.
    """

    question: Question
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    sample_ids: str
    captions: str
    seconds: float
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions())
    format: int = FORMAT

    @property
    def file_name(self) -> str:
        """`<task>-<gallery>-<first 16 digits of the fingerprint>.json`."""
        readable = re.sub(r"[^A-Za-z0-9._]+", "_", f"{self.question.task}-{self.question.gallery}")[:80]
        return f"{readable}-{self.question.fingerprint()[:16]}.json"


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


def write_record(record: Record, folder: Path) -> Path:
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
    content = json.dumps(asdict(record), indent=2, allow_nan=False) + "\n"
    replace_text(path, content)
    return path


def read_record(path: Path) -> Record:
    """Read one record. Raises BadRecord, naming the file and the field, for anything a record is not."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRecord(f"{path} cannot be read as JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise BadRecord(f"{path} has record format {found!r}, this version reads {FORMAT}: evaluate again")
    try:
        return TypeAdapter(Record).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRecord(f"{path} is not a result record: field {where!r}: {first['msg']}") from error


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)

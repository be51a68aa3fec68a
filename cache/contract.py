"""What a cache promises: one backbone's raw features, under one preprocessing, of one list of tars.

`manifest.json` holds the contract and `tars.json` the tar table. Both are written once, before any row, and never
changed; everything that reads or adds rows compares itself with them first.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from threetowers.cache.place import Place
from threetowers.cache.tars import TarIndex

FORMAT = 1
MANIFEST = "manifest.json"
TARS = "tars.json"
NOTED = ("weights", "versions")  # where they differ a reader is told; the digest of the weights is what binds
T = TypeVar("T")


class ContractError(ValueError):
    """A cache that is not what its user expects: other contract, other tars, or rows that are missing or changed."""


@dataclass(frozen=True)
class Preprocessing:
    """The teacher's evaluation transform, in timm's terms. `input_size` is (height, width) in pixels."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    input_size: tuple[int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Contract:
    """The promise of a cache.

    Rows are addressed as `tar_id * slot + ordinal`, and checksummed in chunks of `chunk_rows` rows. `weights` is where
    the weights came from, `weights_digest` the sha256 of the state dict, `tars_digest` that of the tar table.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    backbone: str
    weights: str
    weights_digest: str
    preprocessing: Preprocessing
    dim: int
    dtype: Literal["float16", "float32"]
    slot: int
    chunk_rows: int
    tars_digest: str
    versions: dict[str, str]
    feature: Literal["pre_logits"] = "pre_logits"
    view: Literal["center"] = "center"
    format: int = FORMAT

    @cached_property
    def digest(self) -> str:
        """xxh3_128 over the whole contract: ties each tar's done record to this cache."""
        return xxhash.xxh3_128_hexdigest(to_json(self))


@dataclass(frozen=True)
class TarEntry:
    """One tar of a cache: `path` relative to the table's root, size in bytes, fingerprint as in TarIndex."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: int
    path: str
    size: int
    n_samples: int
    fingerprint: str


@dataclass(frozen=True)
class TarTable:
    """The tars of a cache; `entries[i].id == i`. `root` is where they lay when the cache was begun."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    root: str
    entries: tuple[TarEntry, ...]

    @cached_property
    def digest(self) -> str:
        """xxh3_128 over fingerprints and sample counts in order; where the tars lie does not enter."""
        return xxhash.xxh3_128_hexdigest("".join(f"{e.fingerprint} {e.n_samples}\n" for e in self.entries).encode())

    @cached_property
    def by_fingerprint(self) -> dict[str, TarEntry]:
        return {entry.fingerprint: entry for entry in self.entries}

    def find(self, index: TarIndex) -> TarEntry:
        """The entry of a tar, by fingerprint, wherever the tar lies now.

        Raises:
            ContractError: there is none; says whether a tar of that name is there, packed differently.
        """
        entry = self.by_fingerprint.get(index.fingerprint)
        if entry is not None:
            return entry
        named = [e.fingerprint for e in self.entries if os.path.basename(e.path) == index.path.name]
        if named:
            raise ContractError(
                f"{index.path}: packed or downloaded again since the cache was begun: expected fingerprint "
                f"{' or '.join(named)}, found {index.fingerprint}. Build a new cache, or bring the old tar back"
            )
        raise ContractError(
            f"{index.path}: not among the {len(self.entries)} tars of this cache, by fingerprint ({index.fingerprint}) "
            "or by name. A cache is of a fixed list of tars: build a new one"
        )

    @classmethod
    def of(cls, indexes: Sequence[TarIndex]) -> TarTable:
        """The table of these tars, in this order.

        Raises:
            ContractError: two of them are copies of each other.
        """
        root = common_root([index.path for index in indexes])
        entries = tuple(
            TarEntry(i, os.path.relpath(index.path, root), index.size, len(index.samples), index.fingerprint)
            for i, index in enumerate(indexes)
        )
        table = cls(root, entries)
        if len(table.by_fingerprint) != len(entries):
            for entry in entries:
                other = table.by_fingerprint[entry.fingerprint]
                if other is not entry:
                    raise ContractError(
                        f"tars {entry.path} and {other.path} are copies of each other: name one of them"
                    )
        return table


def common_root(paths: Sequence[Path]) -> str:
    """The deepest folder that holds all the files, absolute."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def difference(expected: Contract, found: Contract) -> list[str]:
    """The fields in which two contracts bind differently, as "field: expected X, found Y"."""
    return _compare(expected, found, lambda name: name not in NOTED)


def notes(expected: Contract, found: Contract) -> list[str]:
    """Differences that a user should know of and that bind nobody: library versions, where the weights came from."""
    return _compare(expected, found, lambda name: name in NOTED)


def _compare(expected: Contract, found: Contract, wanted: Any) -> list[str]:
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


def from_json(kind: type[T], place: Place, name: str) -> T:
    """Read a dataclass back.

    Raises:
        FileNotFoundError: there is no such file.
        ContractError: the file does not hold exactly these fields, or holds values of other types.
    """
    try:
        return TypeAdapter(kind).validate_json(place.read(name))
    except ValidationError as error:
        first = error.errors()[0]
        raise ContractError(
            f"{place.at(name)}: damaged, or of another version: {first['msg']} at {first['loc'] or 'the top'}"
        ) from error


def read_contract(place: Place) -> tuple[Contract, TarTable]:
    """The contract and the tar table of a cache.

    Raises:
        ContractError: no cache there, one of another format, or a manifest and a table that do not belong together.
    """
    try:
        contract, table = from_json(Contract, place, MANIFEST), from_json(TarTable, place, TARS)
    except FileNotFoundError as error:
        raise ContractError(
            f"{place}: no cache here ({error.filename} is missing): run `threetowers cache build`"
        ) from None
    if contract.format != FORMAT:
        raise ContractError(f"{place}: cache of format {contract.format}, this version reads format {FORMAT}")
    if table.digest != contract.tars_digest:
        raise ContractError(
            f"{place}: {TARS} does not belong to {MANIFEST}: expected digest {contract.tars_digest}, "
            f"found {table.digest}"
        )
    return contract, table

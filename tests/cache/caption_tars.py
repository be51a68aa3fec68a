"""Tars with captions of every kind for tests, and the runs of a cache of text as any reader of Zarr sees them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.manifest import read_manifest
from threetowers.cache.storage.storage import open_storage

WORDS = ["red", "green", "blue", "dog", "cat", "bird", "tree", "house", "of", "on", "a", "the"]
Members = dict[str, bytes]


class CaptionedSample(NamedTuple):
    """A sample: its key, its members, and its captions by source as they should be found by default."""

    key: str
    members: Members
    captions: Mapping[str, Sequence[str]]


class Row(NamedTuple):
    """A row of a run."""

    caption_hash: int
    source: int
    embedding_D: np.ndarray


def captioned(n: int, seed: int, image: Callable[[int], bytes] | None = None) -> list[CaptionedSample]:
    """N samples with 1 to 8 captions of 1 to 7 words, many of them equal, in a text member or in the json member.

    Of every eight, one has no caption.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        captions = [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(rng.integers(1, 9))]
        captions += captions[:1] if rng.random() < 0.3 else []
        members: Members = {}
        found: Mapping[str, Sequence[str]]
        match i % 8:
            case 0 | 1 | 2:
                members["txt"] = f"  {captions[0]}\n".encode()
                found = {"txt": captions[:1]}
            case 3:
                members["json"] = json.dumps({"captions": [*captions, "  "], "id": i}).encode()
                found = {"json.captions": captions}
            case 4:
                members["json"] = b'{"caption": null}'
                found = {}
            case 5:
                members["json"] = json.dumps({"caption": captions[0]}).encode()
                found = {"json.caption": captions[:1]}
            case _:
                members["txt"] = captions[0].encode()
                members["json"] = json.dumps({"captions": captions}).encode()
                found = {"txt": captions[:1]}
        if image is not None:
            members["png"] = image(1000 * seed + i)
        samples.append(CaptionedSample(f"{seed}/{i:04}", members, found))
    return samples


def runs(folder: str | Path, tar_id: int, n: int) -> tuple[list[list[Row]], list[int]]:
    """The run of each of the n samples of a tar, and their statuses."""
    manifest = read_manifest(open_storage(folder))
    group: Any = zarr.open_group(folder, path="store.zarr", mode="r")
    samples = slice(tar_id * manifest.samples_per_tar, tar_id * manifest.samples_per_tar + n)
    ends = [0, *group["row_end"][samples].tolist()]
    rows = slice(tar_id * manifest.rows_per_tar, tar_id * manifest.rows_per_tar + ends[-1])
    dtype = storage_dtype(manifest.dtype)
    emb_rD = dtype.decode(group["emb"][rows], group["scale"][rows] if dtype.scaled else None)
    hash_r = group["caption_hash"][rows].tolist()
    source_r = group["caption_source"][rows].tolist()
    found = [[Row(hash_r[r], source_r[r], emb_rD[r]) for r in range(*ends[i : i + 2])] for i in range(n)]
    return found, group["status"][samples].tolist()

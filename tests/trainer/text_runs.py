"""Runs with cached text towers, as plain trees, on small tars whose captions have several sources."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import COLOURS, THINGS, picture, write_tar
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.encoders.live import embed_captions
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.done_record import done_record_name
from threetowers.cache.format.dtypes import storage_dtype
from threetowers.cache.format.layout import RowStatus, text_room
from threetowers.cache.format.manifest import CaptionSources, Manifest, to_json
from threetowers.cache.format.row_buffer import Provenance
from threetowers.cache.format.store import fit_to_table
from threetowers.cache.format.tar_table import extend
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.storage.storage import open_storage
from threetowers.cache.webdataset.sample import read_annotation
from threetowers.cache.webdataset.tar_index import index_tar

SOURCES = ("txt", "json.alt")
Samples = list[tuple[str, dict[str, bytes]]]


def captioned(start: int, count: int) -> Samples:
    """Pictures with one to three captions: one in txt, and none to two in json.alt."""
    made = []
    for number in range(start, start + count):
        colour, thing = list(COLOURS)[number % 4], THINGS[number % 5]
        alt = [f"{thing} {number}, {colour}", f"number {number}"][: number % 3]
        fields = {"concept": f"{colour} {thing}"} | ({"alt": alt} if alt else {})
        members = {
            "png": picture(colour, thing, number),
            "txt": f"a {colour} {thing} {number}".encode(),
            "json": json.dumps(fields).encode(),
        }
        made.append((f"s{number:04d}", members))
    return made


def write_tars(folder: Path) -> list[Path]:
    """Two tars of unequal length."""
    folder.mkdir(exist_ok=True)
    return [write_tar(folder / "a.tar", captioned(0, 25)), write_tar(folder / "b.tar", captioned(25, 20))]


def build_text(
    folder: Path,
    tars: Sequence[Path],
    name: str = "text",
    *,
    sources: Sequence[str] = SOURCES,
    per_line: bool = False,
    dtype: Any = "float16",
    encoder: str = "test:bag",
    left_out: Collection[int] = (),
    before: Sequence[Path] | None = None,
) -> Path:
    """A cache of text by an encoder of the tests; the samples at the ordinals `left_out` of each tar have no row.

    Where tars `before` are given, it holds the captions of these instead, as if they had been changed afterwards.
    """
    loaded = load_frozen_encoder(encoder)
    text = loaded.side("text")
    dim = text.width("pooled")
    manifest = Manifest(
        loaded.name,
        loaded.weights,
        loaded.weights_digest,
        "pooled",
        dim,
        dtype,
        *text_room(storage_dtype(dtype).row_bytes(dim), 64, 256),
        versions={},
        of="text",
        text=text.processing,
        captions=CaptionSources(tuple(sources), per_line),
    )
    storage = open_storage(folder / name)
    indexes = [index_tar(tar) for tar in tars]
    entries = extend(storage, indexes, manifest.samples_per_tar).entries
    fit_to_table(storage, manifest)
    storage.put("manifest.json", to_json(manifest), owner="manifest")
    captions = manifest.caption_sources.caption_format
    for entry, index, read in zip(entries, indexes, map(index_tar, before or tars), strict=True):
        rows = TextRowBuffer(index, manifest)
        for ordinal in range(entry.n_samples):
            found = read_annotation(read, ordinal, captions=captions, captions_required=False).captions_by_source
            if found and ordinal not in left_out:
                rows.set_captions(ordinal, found)
            else:
                rows.reject(ordinal, RowStatus.NO_CAPTION, "no caption")
        rows.set_embeddings(range(len(rows.captions)), embed_captions(text, rows.captions, "pooled"))
        rows.check_complete()
        record = rows.write(storage, entry, "", Provenance("teacher", 1, "cpu", 0.0))
        storage.put(done_record_name(entry.id), to_json(record), owner="test")
    return folder / name


def build_images(folder: Path, tars: Sequence[Path], name: str = "images", **options: Any) -> Path:
    """Build a cache of images by the encoder `test:pair`."""
    out = folder / name
    options = {"encoder": "test:pair"} | options
    build_cache(BuildConfig(tars=[str(tar) for tar in tars], output_dir=out, device="cpu", **options))
    return out


def towers_of(**caches: Path | str) -> dict[str, Any]:
    """Cached towers by name: `text...` of text, others of images."""
    return {
        name: {"kind": "cache", "path": str(path), "of": "text" if "text" in name else "image"}
        for name, path in caches.items()
    }


def run_of(clip: dict[str, Any], tars: Sequence[Path], weights: dict[str, float] | None = None) -> dict[str, Any]:
    """The CLIP run on these tars, with captions drawn from both sources."""
    data = clip["data"] | {"tars": [str(tar) for tar in tars], "captions": weights or {"json.alt": 3.0, "txt": 1.0}}
    return clip | {"data": data}


def three_text(run: dict[str, Any], text: Path) -> dict[str, Any]:
    """CLIP with a third, cached text tower."""
    heads = {"f_t": {"of": "f"}, "g_t": {"of": "g"}, "t_f": {"of": "text_third"}, "t_g": {"of": "text_third"}}
    terms = {"image-text-third": {"x": "f_t", "y": "t_f"}, "text-text-third": {"x": "g_t", "y": "t_g"}}
    return run | {
        "towers": run["towers"] | towers_of(text_third=text),
        "heads": run["heads"] | heads,
        "terms": run["terms"] | terms,
    }


def lift(run: dict[str, Any], text: Path) -> dict[str, Any]:
    """An image tower against cached text: no tokenizer."""
    towers = {"image": run["towers"]["image"]} | towers_of(text=text)
    return run | {"data": run["data"] | {"tokenizer": None}, "towers": towers}


def sharelock(run: dict[str, Any], images: Path, text: Path) -> dict[str, Any]:
    """Both sides cached: no tokenizer, no image size."""
    data = run["data"] | {"tokenizer": None, "image_size": None, "group_field": None}
    heads = {"f": {"of": "image", "kind": "mlp"}, "g": {"of": "text", "kind": "mlp"}}
    return run | {"data": data, "towers": towers_of(image=images, text=text), "heads": heads}

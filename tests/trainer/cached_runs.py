"""Caches of both sides of a small encoder, and the configs of runs whose deployed heads stand on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threetowers.cache.builder.build import build_caches
from threetowers.cache.builder.build_config import BuildConfig


def pair_caches(tars: list[Path], folder: Path, **options: Any) -> Mapping[str, Path]:
    """Caches of the images and of the captions of some tars, by `test:pair`."""
    caches = {"image": folder / "image", "text": folder / "text"}
    build_caches(
        BuildConfig(
            tars=[str(tar) for tar in tars],
            output_dir=list(caches.values()),
            of=list(caches),
            **({"encoder": "test:pair", "device": "cpu", "threads": 1} | options),
        )
    )
    return caches


def cached_text(clip: dict[str, Any], caches: Mapping[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A run of an image tower of its own on cached text (LIFT), as a plain tree."""
    towers = {"image": clip["towers"]["image"], "words": {"kind": "cache", "of": "text", "path": str(caches["text"])}}
    tree = _on(clip, towers, tmp_path / "cached-text")
    return tree | {"data": tree["data"] | {"image_size": 32}}


def both_cached(clip: dict[str, Any], caches: Mapping[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A run that sees neither images nor words (ShareLock), as a plain tree."""
    towers = {side: {"kind": "cache", "of": side, "path": str(path)} for side, path in caches.items()}
    towers = {"image": towers["image"], "words": towers["text"]}
    return _on(clip, towers, tmp_path / "both-cached")


def _on(clip: dict[str, Any], towers: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    data = {key: value for key, value in clip["data"].items() if key not in ("tokenizer", "image_size")}
    heads = {"f": {"of": "image"}, "g": {"of": "words", "kind": "mlp"}}
    return clip | {"output_dir": str(output_dir), "data": data, "towers": towers, "heads": heads}

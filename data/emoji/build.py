"""Builds the emoji image-text set: several art styles of each emoji with its captions, as webdataset tars.

python data/emoji/build.py                                      # the five styles that are committed here
python data/emoji/build.py --styles openmoji --out runs/openmoji  # another style of the same concepts, same splits

Needs npm, and `pip install resvg_py pillow numpy`. The same packages and tool versions give the same bytes.
"""

import argparse
import hashlib
import importlib.metadata
import io
import json
import math
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from captions import captions, without_shared
from packages import EMOJIBASE, EMOJILIB, fetch, read
from PIL import Image, features
from splits import SALT, alike_pairs, plan
from styles import DEFAULT_STYLES, STYLES, bare, drawings, encode, packages_of, render

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")
QUALITY = 75  # of the lossy WebP
SAMPLES_PER_TAR = 1000
COMPONENTS = "component"  # emojibase's group of skin tone and hair swatches
FAINT = 6.0  # standard deviation in grey levels under which a drawing on white shows nothing: a white square


@dataclass(frozen=True)
class Concept:
    """One emoji without skin tone: its code points, its place in Unicode's grouping and its captions."""

    hexcode: str
    label: str
    group: str
    subgroup: str
    captions: list[str]


def read_concepts(folder: Path) -> tuple[dict[str, Concept], dict[str, int]]:
    """Fetch the text packages; return the concepts by hexcode, and what was left out, counted."""
    base = read(fetch(EMOJIBASE, folder), lambda path: path in ("en/data.json", "meta/groups.json"))
    lib = read(fetch(EMOJILIB, folder), lambda path: path == "dist/emoji-en-US.json")
    tree = json.loads(base["meta/groups.json"])
    keywords = {
        bare("-".join(f"{ord(char):x}" for char in emoji)): terms
        for emoji, terms in json.loads(lib["dist/emoji-en-US.json"]).items()
    }
    entries = json.loads(base["en/data.json"])
    whole = [e for e in entries if "group" in e and tree["groups"][str(e["group"])] != COMPONENTS]
    texts = {e["hexcode"]: captions(e["label"], e["tags"], keywords.get(bare(e["hexcode"]), [])) for e in whole}
    texts, shared = without_shared(texts)
    concepts = {
        e["hexcode"]: Concept(
            e["hexcode"],
            e["label"],
            tree["groups"][str(e["group"])],
            tree["subgroups"][str(e["subgroup"])],
            texts[e["hexcode"]],
        )
        for e in whole
    }
    return concepts, {"components (letters, swatches)": len(entries) - len(whole), "captions of two concepts": shared}


def draw(name: str, folder: Path, labels: Mapping[str, str]) -> tuple[dict[str, Image.Image], dict[str, int]]:
    """Fetch one style and return its images by hexcode, and how many were left out and why."""
    style = STYLES[name]
    sources, ambiguous = drawings(style, read(fetch(style.package, folder), style.wanted), dict(labels))
    images = {code: render(source) for code, source in sources.items()}
    visible = {code: image for code, image in images.items() if np.asarray(image).std() >= FAINT}
    return visible, {
        "images of an ambiguous name": len(ambiguous),
        "images too faint on white": len(images) - len(visible),
    }


def settle_splits(styles: Sequence[str], images: Mapping[str, Mapping[str, Image.Image]], out: Path) -> dict[str, str]:
    """Return the split of every concept.

    The five default styles settle it, into splits.json; any other choice of styles reads the file that is kept here.
    """
    if set(styles) != set(DEFAULT_STYLES):
        settled: dict[str, str] = json.loads((HERE / "splits.json").read_text())
        return settled
    concepts = sorted({code for drawn in images.values() for code in drawn})
    splits = plan(concepts, [pair for drawn in images.values() for pair in alike_pairs(drawn)])
    (out / "splits.json").write_text(json.dumps(splits, indent=0, sort_keys=True) + "\n")
    return splits


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append one file with a header that holds nothing of this machine or moment."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no names, mode 0644
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tars(
    out: Path, split: str, samples: Sequence[tuple[Concept, str]], images: Mapping[str, Mapping[str, Image.Image]]
) -> list[int]:
    """Write one split's samples, in the given order, over tars of nearly equal counts; return the tars' sizes."""
    for stale in out.glob(f"{split}-*.tar"):
        stale.unlink()
    count = math.ceil(len(samples) / SAMPLES_PER_TAR)
    sizes = []
    for index in range(count):
        path = out / f"{split}-{index:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for concept, style in samples[len(samples) * index // count : len(samples) * (index + 1) // count]:
                key = f"{concept.hexcode}-{style}"
                record = {
                    "captions": concept.captions,
                    "concept": concept.hexcode,
                    "label": concept.label,
                    "style": style,
                    "group": concept.group,
                    "subgroup": concept.subgroup,
                }
                add_member(tar, f"{key}.webp", encode(images[style][concept.hexcode], QUALITY))
                add_member(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
        sizes.append(path.stat().st_size)
    return sizes


def split_stats(samples: Sequence[tuple[Concept, str]], styles: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the counts of one split."""
    concepts = {concept.hexcode: concept for concept, _ in samples}
    return {
        "tars": len(sizes),
        "bytes": sum(sizes),
        "concepts": len(concepts),
        "captions": sum(len(concept.captions) for concept in concepts.values()),
        "images": {style: sum(used == style for _, used in samples) for style in styles},
    }


def table(stats: Mapping[str, Any]) -> str:
    """Return the counts as the Markdown table of the README."""
    styles = stats["styles"]
    lines = [
        f"| split | tars | concepts | captions | {' | '.join(styles)} | images |",
        f"| --- |{' ---: |' * (len(styles) + 4)}",
    ]
    for split, row in stats["splits"].items():
        per_style = [row["images"][style] for style in styles]
        cells = [row["tars"], row["concepts"], row["captions"], *per_style, sum(per_style)]
        lines.append(f"| {split} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    return "\n".join(lines)


def build(styles: Sequence[str], out: Path) -> dict[str, Any]:
    """Build the set into `out` and return its stats, which are also written to stats.json."""
    packages = [EMOJIBASE, EMOJILIB, *packages_of(styles)]
    out.mkdir(parents=True, exist_ok=True)
    images = {}
    with tempfile.TemporaryDirectory() as name:
        concepts, left_out = read_concepts(Path(name))
        labels = {code: concept.label for code, concept in concepts.items()}
        for style in styles:
            images[style], dropped = draw(style, Path(name), labels)
            left_out = {why: left_out.get(why, 0) + dropped.get(why, 0) for why in left_out | dropped}
    splits = settle_splits(styles, images, out)
    drawn = [(concepts[code], style) for style in styles for code in images[style]]
    drawn.sort(key=lambda sample: hashlib.sha256(f"{SALT}:{sample[0].hexcode}:{sample[1]}".encode()).digest())
    by_split: dict[str, list[tuple[Concept, str]]] = {split: [] for split in (*SPLITS, "dropped")}
    for sample in drawn:
        by_split[splits.get(sample[0].hexcode, "dropped")].append(sample)
    left_out["look-alike concepts"] = len({concept.hexcode for concept, _ in by_split["dropped"]})
    left_out["images of look-alike concepts"] = len(by_split["dropped"])
    stats = {
        "styles": list(styles),
        "tools": {
            "resvg_py": importlib.metadata.version("resvg_py"),
            "pillow": importlib.metadata.version("pillow"),
            "libwebp": features.version("webp"),
        },
        "packages": {package.spec: package.sha256 for package in packages},
        "quality": QUALITY,
        "splits": {
            split: split_stats(by_split[split], styles, write_tars(out, split, by_split[split], images))
            for split in SPLITS
        },
        "left_out": left_out,
    }
    (out / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--styles", nargs="+", default=list(DEFAULT_STYLES), choices=sorted(STYLES), metavar="STYLE")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the tars (default: beside this script)")
    arguments = parser.parse_args()
    styles = [style for style in STYLES if style in arguments.styles]
    if set(styles) != set(DEFAULT_STYLES) and arguments.out.resolve() == HERE:
        parser.error("only the five default styles belong beside this script; name another folder with --out")
    start = time.perf_counter()
    try:
        stats = build(styles, arguments.out)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(stats), "", "Left out:", *(f"- {why}: {n}" for why, n in stats["left_out"].items()), sep="\n")
    megabytes = sum(row["bytes"] for row in stats["splits"].values()) / 1e6
    print(f"\n{megabytes:.1f} MB in {arguments.out}, {time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

"""The art styles: which package holds each, how a concept is found in it, and how a drawing becomes pixels."""

import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from packages import FLUENT_3D, FLUENT_FLAT, NOTO, NOTO_V1, OPENMOJI, TWEMOJI, Package
from PIL import Image

SIZE = 128  # pixels, both sides


@dataclass(frozen=True)
class Style:
    """One art style. `icons` is "iconify" (one icons.json) or the folder that holds a file a code point sequence."""

    name: str
    package: Package
    licence: str
    icons: str = "iconify"

    def wanted(self, path: str) -> bool:
        """Whether the package's file is needed to draw this style."""
        return path in ("icons.json", "chars.json") if self.icons == "iconify" else path.startswith(self.icons)


STYLES = {
    style.name: style
    for style in (
        Style("twemoji", TWEMOJI, "CC-BY-4.0"),
        Style("noto", NOTO, "Apache-2.0"),
        Style("noto-v1", NOTO_V1, "Apache-2.0"),
        Style("fluent-3d", FLUENT_3D, "MIT", icons="assets/"),
        Style("fluent-flat", FLUENT_FLAT, "MIT"),
        Style("openmoji", OPENMOJI, "CC-BY-SA-4.0", icons="color/svg/"),
    )
}
DEFAULT_STYLES = ("twemoji", "noto", "noto-v1", "fluent-3d", "fluent-flat")  # openmoji's licence is share-alike


def bare(hexcode: str) -> str:
    """The code point sequence in lower case without variation selectors, which the sets write inconsistently."""
    return "-".join(code for code in hexcode.lower().split("-") if code != "fe0f")


def slug(label: str) -> str:
    """The name the icon sets derive from a label: ASCII words joined by hyphens."""
    plain = (
        unicodedata.normalize("NFKD", label.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", ""))
        .encode("ascii", "ignore")
        .decode()
    )
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def drawings(style: Style, files: dict[str, bytes], labels: dict[str, str]) -> tuple[dict[str, bytes], list[str]]:
    """Return the style's SVG or WebP source of every concept it draws; `labels` maps hexcode to label.

    Second come the concepts left out because their icon is known by its name alone and that name also fits another.
    """
    if style.icons != "iconify":
        by_code = {bare(path.rsplit("/", 1)[1].rsplit(".", 1)[0]): path for path in files}
        return {code: files[by_code[bare(code)]] for code in labels if bare(code) in by_code}, []
    icons: dict[str, Any] = json.loads(files["icons.json"])
    by_char = {bare(code): name for code, name in json.loads(files["chars.json"]).items()}
    known = icons["icons"].keys() | icons["aliases"].keys()
    # noto-v1 ships an empty chars.json, so its icons are found by name; "cricket" is both an insect and a game there.
    named = {code: slug(label) for code, label in labels.items() if bare(code) not in by_char}
    named = {code: name for code, name in named.items() if name in known}
    drawn_by = {code: icons["aliases"].get(name, {}).get("parent", name) for code, name in named.items()}
    uses = Counter(drawn_by.values())
    ambiguous = [code for code in named if uses[drawn_by[code]] > 1]
    coded = {code: by_char[bare(code)] for code in labels if bare(code) in by_char}
    names = {code: (coded | named)[code] for code in labels if code in coded or code in named}
    return {code: iconify_svg(icons, name) for code, name in names.items() if code not in ambiguous}, ambiguous


def iconify_svg(icons: dict[str, Any], name: str) -> bytes:
    """Return one icon of an Iconify set as a standalone SVG document; raises ValueError on a rotated alias."""
    transform = ""
    alias = icons["aliases"].get(name)
    icon = icons["icons"][alias["parent"] if alias else name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    if alias:
        extra = alias.keys() - {"parent", "hFlip", "hidden"}
        if extra:
            raise ValueError(f"{icons['prefix']}: alias {name!r} has {sorted(extra)}; only hFlip is understood")
        transform = f' transform="translate({width} 0) scale(-1 1)"' if alias.get("hFlip") else ""
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}"><g{transform}>{icon["body"]}</g></svg>'.encode()


def render(source: bytes) -> Image.Image:
    """Draw one SVG or WebP source on white and return a SIZE x SIZE RGB image."""
    if source[:4] == b"RIFF":
        image = Image.open(io.BytesIO(source), formats=["WEBP"]).convert("RGBA")
    else:
        image = Image.open(io.BytesIO(svg_rasteriser()(source.decode())), formats=["PNG"]).convert("RGBA")
    # Scaling before compositing keeps the edges free of a halo; thumbnail sizes only shrink.
    scale = SIZE / max(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return canvas.convert("RGB")


def svg_rasteriser() -> Callable[[str], bytes]:
    """Return a function from SVG text to PNG bytes whose longer side is SIZE; raises ValueError on external content."""
    import resvg_py

    def rasterise(svg: str) -> bytes:
        outside = re.search(r'<(?:text|image|foreignObject)\b|href="(?!#)', svg)
        if outside:
            raise ValueError(f"the drawing needs fonts or other files: {svg[outside.start() :][:80]!r}")
        return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))

    return rasterise


def encode(image: Image.Image, quality: int) -> bytes:
    """Return the image as lossy WebP."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=6)
    return stream.getvalue()


def packages_of(names: Iterable[str]) -> list[Package]:
    """The packages of the named styles; raises ValueError on an unknown name."""
    unknown = sorted(set(names) - STYLES.keys())
    if unknown:
        raise ValueError(f"unknown styles {unknown}; known: {sorted(STYLES)}")
    return [STYLES[name].package for name in names]

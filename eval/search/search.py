"""Free text answered with pictures from a gallery: for a terminal, and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np

from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.encoder import Encoder, NoTextTower
from threetowers.eval.report.thumbnails import ThumbnailStore, thumbnail
from threetowers.eval.search.index import Device, build_index, exact_search

UPPER_HALF = "▀"


@dataclass(frozen=True)
class Found:
    """One picture that a query found, and its cosine."""

    picture: EvalImage
    score: float


@dataclass(frozen=True)
class Findings:
    """What each query found, best first."""

    model: str
    data: ImageSet
    queries: tuple[str, ...]
    found: list[list[Found]]
    exact: bool

    def text(self, columns: int = 0) -> str:
        """Keys, scores and captions; with `columns` > 0 also the pictures, that wide, in the terminal's colours."""
        lines = []
        for query, found in zip(self.queries, self.found, strict=True):
            lines.append(f"“{query}”")
            for storage, one in enumerate(found, 1):
                p = one.picture
                captions = " | ".join(p.captions[:2])
                lines.append(
                    f"{storage:4d}  {one.score:6.3f}  {self.data.tars[p.tar].name}:{p.key}  {captions}".rstrip()
                )
                if columns:
                    lines += ["      " + row for row in half_blocks(self.data.encoded(p), columns)]
        how = "exact" if self.exact else "approximate"
        return "\n".join([*lines, f"{self.model}, {how} search of {len(self.data.images):,} pictures"])

    def write(self, out: Path) -> Path:
        """Write `search.html` into a folder, without any outside request, and return its path."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        source = files("threetowers.eval.search").joinpath("search.html").read_text(encoding="utf-8")
        thumbnails = ThumbnailStore(out / "thumbnails")
        shown = [
            (query, [(thumbnails.data_uri(thumbnails.add(self.data.encoded(one.picture))), one) for one in found])
            for query, found in zip(self.queries, self.found, strict=True)
        ]
        page = environment.from_string(source).render(findings=self, shown=shown, size=len(self.data.images))
        out.mkdir(parents=True, exist_ok=True)
        path = out / "search.html"
        path.write_text(page, encoding="utf-8", errors="replace")
        return path


def find(
    encoder: Encoder,
    data: ImageSet,
    queries: Sequence[str],
    k: int,
    *,
    index: str = "Flat",
    parameters: str = "",
    device: Device = "auto",
) -> Findings:
    """The k pictures nearest to each text. Exact search reads the gallery from disk where it is kept there.

    Raises NoTextTower for a model that sees images only, and ValueError for k beyond the gallery.
    """
    if not encoder.sees_text:
        raise NoTextTower(f"{encoder.info.name} sees images only: search by text needs a text tower")
    if not 1 <= k <= len(data.images):
        raise ValueError(f"k must be between 1 and the {len(data.images)} pictures of the gallery, got {k}")
    if empty := [query for query in queries if not query.strip()]:
        raise ValueError(f"{len(empty)} of {len(queries)} queries are empty: say what to look for")
    text_MD, image_ND = encoder.texts(list(queries)), encoder.images(data, data.images)
    if index == "Flat":
        neighbours = exact_search(image_ND, text_MD, k, device=device)
    else:
        neighbours = build_index(image_ND, index, parameters=parameters, device=device).search(text_MD, k)
    found = [
        [Found(data.images[i], float(score)) for i, score in zip(ids, scores, strict=True) if i >= 0]
        for ids, scores in zip(neighbours.ids_NK.tolist(), neighbours.scores_NK, strict=True)
    ]
    return Findings(encoder.info.name, data, tuple(queries), found, index == "Flat")


def half_blocks(image: bytes, columns: int) -> list[str]:
    """A picture as lines of text, two pixels a character, in 24-bit colour (ANSI)."""
    from PIL import Image

    with Image.open(BytesIO(thumbnail(image)), formats=("WEBP",)) as small:
        rows = max(2, round(columns * small.height / small.width / 2) * 2)
        pixels = np.asarray(small.convert("RGB").resize((columns, rows)))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m{UPPER_HALF}"
            for a, b in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return lines

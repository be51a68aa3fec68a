"""Search of a gallery of images by free text, shown in a terminal or as a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np

from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.encoder import Encoder, NoTextTower
from threetowers.eval.left_out import left_out_text
from threetowers.eval.report.thumbnails import ThumbnailStore, thumbnail
from threetowers.eval.search.index import build_index, exact_search

UPPER_HALF = "▀"
DEFAULT_K = 10
MAX_CAPTION_SHOWN = 200  # characters in the terminal


@dataclass(frozen=True)
class SearchHit:
    """An image that a query found, and its cosine to the query."""

    image: EvalImage
    score: float


@dataclass(frozen=True)
class SearchResults:
    """The images nearest to each query, best first; `exact` tells whether the search was exhaustive."""

    model: str
    data: ImageSet
    queries: tuple[str, ...]
    hits: list[list[SearchHit]]
    exact: bool

    @property
    def left_out(self) -> str:
        """What of the gallery could not be searched, and why."""
        return left_out_text(len(self.data.images), self.data.left_out)

    def text(self, columns: int = 0) -> str:
        """Return keys, scores and captions, with `columns` > 0 also the images, that many characters wide."""
        lines = []
        for query, hits in zip(self.queries, self.hits, strict=True):
            lines.append(f"“{query}”")
            for rank, hit in enumerate(hits, 1):
                tar = self.data.tars[hit.image.tar].name
                captions = " | ".join(map(_one_line, hit.image.captions[:2]))
                lines.append(f"{rank:4d}  {hit.score:6.3f}  {tar}:{hit.image.key}  {captions}".rstrip())
                if columns:
                    lines += [
                        "      " + row
                        for row in half_blocks(self.data.encoded(hit.image), columns, self.data.max_pixels)
                    ]
        kind = "exact" if self.exact else "approximate"
        lines.append(f"{self.model}, {kind} search of {len(self.data.images):,} images; left out: {self.left_out}")
        return "\n".join(lines)

    def write(self, out: Path) -> Path:
        """Write `search.html`, a page without any outside request, into a folder, and return its path."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        source = files("threetowers.eval.search").joinpath("search.html").read_text(encoding="utf-8")
        thumbnails = ThumbnailStore(out / "thumbnails", self.data.max_pixels)
        sections = []
        for query, hits in zip(self.queries, self.hits, strict=True):
            uris = [thumbnails.data_uri(thumbnails.add(self.data.encoded(hit.image))) for hit in hits]
            sections.append((query, list(zip(uris, hits, strict=True))))
        page = environment.from_string(source).render(results=self, sections=sections, size=len(self.data.images))
        out.mkdir(parents=True, exist_ok=True)
        path = out / "search.html"
        path.write_text(page, encoding="utf-8", errors="replace")
        return path


def find(
    encoder: Encoder,
    data: ImageSet,
    queries: Sequence[str],
    k: int | None = None,
    *,
    index: str = "Flat",
    parameters: str = "",
) -> SearchResults:
    """Return the k images nearest to each text.

    Exact search reads the image embeddings from disk where they are stored. The search runs where the model does.

    Args:
        encoder: The model.
        data: The gallery.
        queries: The texts.
        k: Number of images a text; None: ten, or all if there are fewer.
        index: FAISS factory string (see `build_index`).
        parameters: Search settings of the index.

    Raises:
        NoTextTower: For a model that encodes images only.
        ValueError: For an empty query, and for k beyond the gallery.
    """
    if not encoder.sees_text:
        raise NoTextTower(f"{encoder.info.name} sees images only: search by text needs a text tower")
    if k is None:
        k = min(DEFAULT_K, len(data.images))
    if not 1 <= k <= len(data.images):
        raise ValueError(f"--k: found {k}, expected 1 to {len(data.images)}, the images of the gallery")
    if empty := [query for query in queries if not query.strip()]:
        raise ValueError(f"{len(empty)} of {len(queries)} queries are empty: expected text in each --query")
    text_ND = encoder.texts(list(queries))
    image_MD = encoder.images(data, data.images)
    if index == "Flat":
        neighbours = exact_search(image_MD, text_ND, k, device=encoder.search_device)
    else:
        vectors = build_index(image_MD, index, parameters=parameters, device=encoder.search_device)
        neighbours = vectors.search(text_ND, k)
    hits: list[list[SearchHit]] = []
    for ids, scores in zip(neighbours.ids_NK.tolist(), neighbours.scores_NK.tolist(), strict=True):
        # An approximate index pads with -1 where it found fewer than k.
        hits.append([SearchHit(data.images[i], score) for i, score in zip(ids, scores, strict=True) if i >= 0])
    return SearchResults(encoder.info.name, data, tuple(queries), hits, index == "Flat")


def _one_line(caption: str) -> str:
    """Return a caption for the terminal: on one line, the end of a long one left out."""
    line = " ".join(caption.split())
    return line if len(line) <= MAX_CAPTION_SHOWN else f"{line[: MAX_CAPTION_SHOWN - 1]}…"


def half_blocks(image: bytes, columns: int, max_pixels: int = MAX_PIXELS) -> list[str]:
    """Return an encoded image as lines of text, two pixels a character, in 24-bit colour (ANSI)."""
    from PIL import Image

    with Image.open(BytesIO(thumbnail(image, max_pixels)), formats=("WEBP",)) as small:
        rows = max(2, round(columns * small.height / small.width / 2) * 2)
        pixels = np.asarray(small.convert("RGB").resize((columns, rows)))
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = ""
        for a, b in zip(upper, lower, strict=True):
            # The upper pixel is the foreground of a half block, the lower one its background.
            line += f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m{UPPER_HALF}"
        lines.append(line + "\x1b[0m")
    return lines

"""A comparison of runs as one self-contained HTML page and as Markdown."""

import base64
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from threetowers.eval import tables
from threetowers.eval.curves import (
    DASH_ARRAYS,
    RUN_COLOURS,
    SMOOTHING,
    Panel,
    gallery_panel,
    read_metrics,
    training_panels,
)
from threetowers.eval.record import Record
from threetowers.eval.tables import RunRecords, Table, markdown_text

THUMBNAIL_PIXELS = 192
INLINE_BYTES = 24_000  # larger images become thumbnails: a page of photographs must still load
MAX_PIXELS = 50_000_000
SIGNATURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff", "image/webp": b"RIFF"}


@dataclass(frozen=True)
class RetrievedImage:
    """One image a caption retrieved: encoded bytes (PNG, JPEG or WebP), its score, and whether it matches."""

    image: bytes
    score: float
    hit: bool
    label: str = ""


@dataclass(frozen=True)
class RetrievedCaption:
    """One caption an image retrieved, its score, and whether it matches."""

    caption: str
    score: float
    hit: bool


@dataclass(frozen=True)
class TextExample:
    """A caption as query with what it retrieved, best first. `rank`: of its first match, from 1, None if unknown."""

    query: str
    gallery: str
    retrieved: Sequence[RetrievedImage]
    rank: int | None = None


@dataclass(frozen=True)
class ImageExample:
    """An image as query with what it retrieved, best first. `rank`: of its first match, from 1, None if unknown."""

    query: bytes
    gallery: str
    retrieved: Sequence[RetrievedCaption]
    label: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class RunResult:
    """All a report tells of one run; everything but `name`, `method` and `records` may be missing.

    `records`: one a gallery (the report computes the mean), and those of other tasks. `metrics_file`: the run's
    `metrics.jsonl`. `stage_seconds`: wall seconds by stage, in order. Examples of several runs with the same query are
    shown side by side. `note`: one line on how the run differs.
    """

    name: str
    method: str
    records: Sequence[Record]
    metrics_file: Path | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    text_examples: Sequence[TextExample] = ()
    image_examples: Sequence[ImageExample] = ()
    note: str = ""


@dataclass(frozen=True)
class ReportPaths:
    """Where the report was written."""

    html: Path
    markdown: Path


def render(
    results: Sequence[RunResult], out_dir: Path, *, title: str = "Retrieval report", description: str = ""
) -> ReportPaths:
    """Write `report.html` (no script, no outside request) and `report.md` into `out_dir`, replacing older ones.

    Means are over the galleries that every run with retrieval records was evaluated on; what is missing or not
    comparable is said at the top. Raises ValueError for no runs, runs of the same name, two records of one gallery, and
    example images that are not PNG, JPEG or WebP.
    """
    view = _View(results, title, description)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(out_dir / "report.html", out_dir / "report.md")
    # A caption may hold what UTF-8 cannot; that must not cost the report.
    paths.html.write_text(_html(view), encoding="utf-8", errors="replace")
    paths.markdown.write_text(_markdown(view), encoding="utf-8", errors="replace")
    return paths


class _View:
    """What both forms of the report show, computed once."""

    def __init__(self, results: Sequence[RunResult], title: str, description: str) -> None:
        names = [result.name for result in results]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a report needs at least one run and a different name for each, got {names}")
        self.results, self.title, self.description = results, title, description
        self.runs = [tables.by_gallery(result.name, result.method, result.records) for result in results]
        self.galleries = list(dict.fromkeys(name for run in self.runs for name in run.galleries))
        scored = [run for run in self.runs if run.galleries]
        self.shared = [name for name in self.galleries if all(name in run.galleries for run in scored)]
        self.warnings = _warnings(self.runs, self.galleries, self.shared)
        self.comparison = tables.comparison_table(self.runs, self.shared)
        self.by_gallery = tables.gallery_table(self.runs, self.galleries)
        self.stages = tables.stage_table(names, [result.stage_seconds for result in results])
        self.data = tables.data_table(self.runs, self.galleries)
        self.ties = tables.tie_table(self.runs, self.galleries)
        self.others = tables.other_table(names, [result.records for result in results])
        self.error = tables.standard_error(self.runs, self.galleries)
        self.provenance = [_provenance(result.records) for result in results]

    def gallery_panels(self) -> list[Panel]:
        """R@1 in both directions, gallery by gallery; nothing to draw for fewer than two galleries."""
        if len(self.galleries) < 2:
            return []
        panels = []
        for direction, text in tables.DIRECTIONS.items():
            values = [[_metric(run, name, f"{direction}/recall@1") for name in self.galleries] for run in self.runs]
            chance = [
                next((_metric(run, name, f"{direction}/chance@1") for run in self.runs if name in run.galleries), 0.0)
                for name in self.galleries
            ]
            panels.append(gallery_panel(text, self.galleries, values, [0.0 if math.isnan(c) else c for c in chance]))
        return panels


def _metric(run: RunRecords, gallery: str, key: str) -> float:
    record = run.galleries.get(gallery)
    return math.nan if record is None else record.metrics.get(key, math.nan)


def _warnings(runs: Sequence[RunRecords], galleries: Sequence[str], shared: Sequence[str]) -> list[str]:
    """What a reader must know before comparing the rows."""
    warnings = []
    for run in runs:
        missing = [name for name in galleries if name not in run.galleries]
        if missing and run.galleries:
            warnings.append(f"{run.name} was not evaluated on {', '.join(missing)}; the means leave these out.")
        elif not run.galleries:
            warnings.append(f"{run.name} has no retrieval result.")
    if galleries and not shared:
        warnings.append("No gallery is shared by all runs, so there are no means to compare.")
    for name in galleries:
        records = [run.galleries[name] for run in runs if name in run.galleries]
        for what, digests in (
            ("samples", {record.sample_ids for record in records}),
            ("captions", {record.texts for record in records}),
        ):
            if len(digests) > 1:
                warnings.append(f"The runs saw different {what} of {name}: their numbers are not comparable.")
        for run in runs:
            for direction, text in tables.DIRECTIONS.items():
                gap = tables.tie_gap(run, name, direction)
                if gap > 0.005:
                    warnings.append(
                        f"Ties decide {100 * gap:.1f} points of {run.name}'s recall of {name}, {text.lower()}; "
                        "they count against it."
                    )
    return warnings


def _provenance(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Facts that identify a run's results, each once."""
    facts: dict[str, list[str]] = {}
    for record in records:
        asked = record.question
        found = {
            "model digest": asked.model,
            "step": "" if asked.step is None else f"{asked.step:,}",
            "precision": asked.precision,
            "preprocessing": asked.preprocessing,
            "cache contract": asked.cache_contract or "none",
            "settings": ", ".join(f"{key} = {value}" for key, value in asked.settings.items()),
            "evaluated": record.date,
            "versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
        }
        for tar in asked.tars:
            facts.setdefault("tars", []).append(f"{tar.name} ({tar.samples:,} samples, {tar.fingerprint[:12]})")
        for name, value in found.items():
            facts.setdefault(name, []).append(value)
    return [(name, "; ".join(dict.fromkeys(value for value in values if value))) for name, values in facts.items()]


def _html(view: _View) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = lambda panel: Markup(panel.svg)
    template = environment.from_string(files("threetowers.eval").joinpath("report.html").read_text(encoding="utf-8"))
    metrics = [None if result.metrics_file is None else read_metrics(result.metrics_file) for result in view.results]
    unreadable = [(result.name, m.unreadable) for result, m in zip(view.results, metrics, strict=True) if m]
    return template.render(
        view=view,
        run_colours=RUN_COLOURS,
        dashes=DASH_ARRAYS,
        gallery_panels=view.gallery_panels(),
        sections=training_panels(metrics),
        window=f"1/{SMOOTHING}",
        unreadable=[(name, lines) for name, lines in unreadable if lines],
        text_groups=_text_groups(view.results),
        image_groups=_image_groups(view.results),
    )


def _text_groups(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Text queries, each once, with the answers of every run that was asked it."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for index, result in enumerate(results):
        for example in result.text_examples:
            group = groups.setdefault(
                (example.gallery, example.query), {"query": example.query, "gallery": example.gallery, "answers": []}
            )
            images = [(_data_uri(found.image), found) for found in example.retrieved]
            group["answers"].append((index, result.name, example.rank, images))
    return list(groups.values())


def _image_groups(results: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Image queries, each once, with the answers of every run that was asked it."""
    groups: dict[tuple[str, bytes], dict[str, Any]] = {}
    for index, result in enumerate(results):
        for example in result.image_examples:
            group = groups.setdefault(
                (example.gallery, hashlib.sha256(example.query).digest()),
                {
                    "image": _data_uri(example.query),
                    "label": example.label,
                    "gallery": example.gallery,
                    "answers": [],
                },
            )
            group["answers"].append((index, result.name, example.rank, example.retrieved))
    return list(groups.values())


def _data_uri(image: bytes) -> str:
    media = next((media for media, start in SIGNATURES.items() if image.startswith(start)), None)
    if media is None or (media == "image/webp" and image[8:12] != b"WEBP"):
        raise ValueError(
            f"an example image must be the bytes of a PNG, JPEG or WebP file, "
            f"got {len(image)} bytes starting {image[:12]!r}"
        )
    if len(image) > INLINE_BYTES:
        media, image = "image/webp", _thumbnail(image)
    return f"data:{media};base64,{base64.b64encode(image).decode()}"


def _thumbnail(image: bytes) -> bytes:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(image), formats=("PNG", "JPEG", "WEBP")) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"an example image of {picture.width} by {picture.height} pixels is above the limit of {MAX_PIXELS:,}: "
                "leave it out or scale it down"
            )
        small: Image.Image = ImageOps.exif_transpose(picture)
        small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        small = small.convert("RGBA" if small.has_transparency_data else "RGB")
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=80)
        return buffer.getvalue()


def _markdown(view: _View) -> str:
    parts = [f"# {markdown_text(view.title)}"]
    if view.description:
        parts.append(markdown_text(view.description))
    parts.append("\n".join(_run_line(result) for result in view.results))
    if view.warnings:
        parts.append("\n".join(f"> {markdown_text(warning)}" for warning in view.warnings))
    sections: list[tuple[str, Table | None]] = [
        (f"Retrieval, mean of {len(view.shared)} galleries" if len(view.shared) > 1 else "Retrieval", view.comparison),
        ("By gallery", view.by_gallery),
        ("Other results", view.others),
        ("Time by stage", view.stages),
        ("Ties", view.ties),
        ("Data", view.data),
    ]
    for heading, table in sections:
        if table is not None:
            parts += [f"## {heading}", table.markdown()]
            if heading.startswith("Retrieval") and view.error is not None:
                parts.append(f"Recalls in percent; one standard error of R@1 is at most {100 * view.error:.1f} points.")
    for result, facts in zip(view.results, view.provenance, strict=True):
        if facts:
            lines = [f"- {name}: {markdown_text(value)}" for name, value in facts]
            parts += [f"## Run {markdown_text(result.name)}", "\n".join(lines)]
    parts.append("Curves, examples and definitions are in report.html.")
    return "\n\n".join(parts) + "\n"


def _run_line(result: RunResult) -> str:
    note = f": {markdown_text(result.note)}" if result.note else ""
    return f"- **{markdown_text(result.name)}** ({markdown_text(result.method)}){note}"

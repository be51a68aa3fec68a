"""A comparison of models as one self-contained HTML page and as Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from threetowers.eval.left_out import evaluated_images, is_complete, left_out_text
from threetowers.eval.metrics.significance import significance
from threetowers.eval.record import EvalRecord, ExampleItem
from threetowers.eval.report import plots, tables
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.svg import DASH_ARRAYS, RUN_COLOURS, Panel
from threetowers.eval.report.tables import RunRecords, Table, markdown_text
from threetowers.eval.report.training_curves import SMOOTHING, gallery_panel, training_panels


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report."""

    html: Path
    markdown: Path


def render(
    results: Sequence[RunResult],
    output_dir: Path,
    *,
    title: str = "Evaluation",
    description: str = "",
    notes: Sequence[str] = (),
) -> ReportPaths:
    """Write `report.html` (no script, no outside request) and `report.md` into a folder, replacing older ones.

    Means are over the galleries that every model with retrieval records was evaluated on; what is missing or not
    comparable is listed at the top.

    Args:
        results: One per model.
        output_dir: Folder of the report.
        title: Of the page.
        description: A sentence on what is compared.
        notes: Tasks that could not be done, and the like, for the top of the page.

    Raises:
        ValueError: There are no models, two of one name, or two records of one model for one gallery.
    """
    page = _Page(results, title, description, notes)
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = ReportPaths(output_dir / "report.html", output_dir / "report.md")
    # A caption may hold what UTF-8 cannot encode; that must not cost the report.
    paths.html.write_text(_html(page), encoding="utf-8", errors="replace")
    paths.markdown.write_text(_markdown(page), encoding="utf-8", errors="replace")
    return paths


class _Page:
    """What both forms of the report show, computed once."""

    def __init__(self, results: Sequence[RunResult], title: str, description: str, notes: Sequence[str]) -> None:
        names = [result.name for result in results]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a report needs at least one run and a different name for each, got {names}")
        self.results = results
        self.title = title
        self.description = description

        # Retrieval, gallery by gallery; means are over the galleries that all runs share.
        self.runs = [tables.by_gallery(result.name, result.method, result.records) for result in results]
        self.galleries = list(dict.fromkeys(name for run in self.runs for name in run.galleries))
        scored = [run for run in self.runs if run.galleries]
        self.shared = [name for name in self.galleries if all(name in run.galleries for run in scored)]
        self.warnings = [*notes, *_left_out(results), *_warnings(self.runs, self.galleries, self.shared)]

        self.comparison = tables.comparison_table(self.runs, self.shared)
        self.by_gallery = tables.gallery_table(self.runs, self.galleries)
        self.stages = tables.stage_table(names, [result.stage_seconds for result in results])
        self.data = tables.data_table(self.runs, self.galleries)
        self.ties = tables.tie_table(self.runs, self.galleries)
        self.others = tables.other_table(names, [result.records for result in results])
        self.significance = significance(results)
        self.provenance = [_provenance(result.records) for result in results]

    def gallery_panels(self) -> list[Panel]:
        """Return plots of R@1 in both directions, gallery by gallery; none for fewer than two galleries."""
        if len(self.galleries) < 2:
            return []
        panels = []
        for direction, text in tables.DIRECTIONS.items():
            values = [[_metric(run, name, f"{direction}/recall@1") for name in self.galleries] for run in self.runs]
            chances = [self._chance(name, direction) for name in self.galleries]
            panels.append(gallery_panel(text, self.galleries, values, chances))
        return panels

    def recall_panels(self) -> list[Panel]:
        """Return plots of recall against k in both directions."""
        panels = []
        for direction, text in tables.DIRECTIONS.items():
            ranks = [self._ranks(index, direction) for index in range(len(self.runs))]
            side = "images" if direction == "text_to_image" else "captions"
            sizes = []
            for run in self.runs:
                sizes += [run.galleries[name].counts[side] for name in self.shared if name in run.galleries]
            if any(ranks):
                panels.append(plots.recall_panel(text, ranks, sizes))
        return panels

    def task_panels(self) -> list[Panel]:
        """Return few-shot curves and calibration plots, for each data set that has them."""
        pairs: dict[tuple[str, str], None] = {}
        for result in self.results:
            for record in result.records:
                if record.spec.task != tables.RETRIEVAL:
                    pairs[record.spec.task, record.spec.data] = None
        panels: list[Panel | None] = []
        for task, data in pairs:
            records = [self._record(index, task, data) for index in range(len(self.results))]
            if task == "fewshot":
                metrics = [None if record is None else record.metrics for record in records]
                panels.append(plots.fewshot_panel(f"Few-shot, {data}", metrics))
            if task == "zeroshot":
                outcomes = [self._outcomes(index, record) for index, record in enumerate(records)]
                panels.append(plots.calibration_panel(f"Calibration of {task}, {data}", outcomes))
        return [panel for panel in panels if panel is not None]

    def map_panels(self) -> list[Panel]:
        """Return each model's images and captions of the first shared gallery, on their two main axes."""
        panels = []
        for index, run in enumerate(self.runs):
            items = self._items(index, run.galleries.get(self.shared[0]) if self.shared else None)
            if "map/images" in items:
                arrays = (items[f"map/{name}"] for name in ("images", "texts", "explained"))
                panels.append(plots.map_panel(run.name, index, *arrays))
        return panels

    def _chance(self, gallery: str, direction: str) -> float:
        """Return the recall@1 by chance that the first run with this gallery recorded; 0 if there is none."""
        for run in self.runs:
            if gallery in run.galleries:
                chance = _metric(run, gallery, f"{direction}/chance@1")
                return 0.0 if math.isnan(chance) else chance
        return 0.0

    def _ranks(self, index: int, direction: str) -> list[Any]:
        """Return the ranks of a run's queries in each shared gallery; empty where some are missing."""
        ranks = []
        for name in self.shared:
            items = self._items(index, self.runs[index].galleries.get(name))
            if f"{direction}/rank" not in items:
                return []
            ranks.append(items[f"{direction}/rank"])
        return ranks

    def _outcomes(self, index: int, record: EvalRecord | None) -> tuple[Any, Any] | None:
        """Return the confidence of each image, and whether it is right; None where they are missing."""
        items = self._items(index, record)
        if "confidence" not in items or "top1" not in items:
            return None
        return items["confidence"], items["top1"]

    def _record(self, index: int, task: str, data: str) -> EvalRecord | None:
        for record in self.results[index].records:
            if (record.spec.task, record.spec.data) == (task, data):
                return record
        return None

    def _items(self, index: int, record: EvalRecord | None) -> dict[str, Any]:
        return {} if record is None else dict(self.results[index].items_of(record))


def _metric(run: RunRecords, gallery: str, key: str) -> float:
    record = run.galleries.get(gallery)
    return math.nan if record is None else record.metrics.get(key, math.nan)


def _warnings(runs: Sequence[RunRecords], galleries: Sequence[str], shared: Sequence[str]) -> list[str]:
    """Return what a reader must know before comparing the rows."""
    warnings = []
    for run in runs:
        missing = [name for name in galleries if name not in run.galleries]
        if missing and run.galleries:
            warnings.append(f"{run.name} was not evaluated on {', '.join(missing)}; the means leave these out.")
        elif missing:
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


def _left_out(results: Sequence[RunResult]) -> list[str]:
    """Return what was left out of each data set and why, each text once."""
    lines: dict[str, None] = {}
    for result in results:
        for record in result.records:
            if not is_complete(record.left_out):
                text = left_out_text(evaluated_images(record.counts), record.left_out)
                lines[f"Left out of {record.spec.data}, {record.spec.task}: {text}."] = None
    return list(lines)


def _provenance(records: Sequence[EvalRecord]) -> list[tuple[str, str]]:
    """Return what identifies a model's results, by name, each value once."""
    values: dict[str, list[str]] = {}
    for record in records:
        spec = record.spec
        tars = [f"{tar.name} ({tar.samples:,} samples, {tar.fingerprint[:12]})" for tar in spec.tars]
        found = {
            "model digest": [spec.model_digest],
            "step": [] if spec.step is None else [f"{spec.step:,}"],
            "precision": [spec.precision],
            "preprocessing": [spec.preprocessing],
            "cache manifest": [spec.cache_manifest or "none"],
            "tokenizer": [record.tokenizer or ""],
            "settings": [", ".join(f"{key} = {value}" for key, value in spec.settings.items())],
            "evaluated": [record.date],
            "versions": [", ".join(f"{name} {number}" for name, number in record.versions.items())],
            "tars": tars,
        }
        for name, texts in found.items():
            values.setdefault(name, []).extend(text for text in texts if text)
    return [(name, "; ".join(dict.fromkeys(texts))) for name, texts in values.items()]


def _html(page: _Page) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = lambda panel: Markup(panel.svg)
    template = environment.from_string(
        files("threetowers.eval.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    metrics = [result.metrics for result in page.results]
    unreadable = []
    for result in page.results:
        if result.metrics is not None and result.metrics.unreadable:
            unreadable.append((result.name, result.metrics.unreadable))
    return template.render(
        page=page,
        run_colours=RUN_COLOURS,
        dashes=DASH_ARRAYS,
        gallery_panels=page.gallery_panels(),
        recall_panels=page.recall_panels(),
        task_panels=page.task_panels(),
        map_panels=page.map_panels(),
        sections=training_panels(metrics),
        window=f"1/{SMOOTHING}",
        unreadable=unreadable,
        examples=_examples(page.results),
    )


def _examples(results: Sequence[RunResult]) -> dict[str, list[dict[str, Any]]]:
    """Return by heading each query once, with the answers of every run that was given it."""
    headings: dict[str, dict[tuple[str, str, str | None], dict[str, Any]]] = {}
    for index, result in enumerate(results):
        for record in result.records:
            for example in record.examples:
                query = example.query
                queries = headings.setdefault(example.heading, {})
                key = (record.spec.data, query.text, query.thumbnail)
                if key not in queries:
                    queries[key] = {
                        "text": query.text,
                        "image": _data_uri(result, query),
                        "gallery": record.spec.data,
                        "answers": [],
                    }
                queries[key]["answers"].append(
                    {
                        "run": index,
                        "name": result.name,
                        "rank": example.rank,
                        "ranked": [(_data_uri(result, item), item) for item in example.answers],
                        "are_images": any(item.thumbnail is not None for item in example.answers),
                    }
                )
    return {heading: list(queries.values()) for heading, queries in headings.items()}


def _data_uri(result: RunResult, item: ExampleItem) -> str | None:
    return None if item.thumbnail is None else result.thumbnails.get(item.thumbnail)


def _markdown(page: _Page) -> str:
    parts = [f"# {markdown_text(page.title)}"]
    if page.description:
        parts.append(markdown_text(page.description))
    parts.append("\n".join(_run_line(result) for result in page.results))
    if page.warnings:
        parts.append("\n".join(f"> {markdown_text(warning)}" for warning in page.warnings))
    sections: list[tuple[str, Table | None]] = [
        (f"Retrieval, mean of {len(page.shared)} galleries" if len(page.shared) > 1 else "Retrieval", page.comparison),
        ("Which differences are real", page.significance.differences),
        ("Intervals", page.significance.intervals),
        ("By gallery", page.by_gallery),
        ("Other results", page.others),
        ("Time by stage", page.stages),
        ("Ties", page.ties),
        ("Data", page.data),
    ]
    for heading, table in sections:
        if table is not None:
            parts += [f"## {heading}", table.markdown()]
            if table is page.significance.differences:
                parts.append("Percentage points, 95 % bootstrap intervals; p adjusted for all rows (Holm).")
    for result, provenance in zip(page.results, page.provenance, strict=True):
        if provenance:
            lines = [f"- {name}: {markdown_text(value)}" for name, value in provenance]
            parts += [f"## Run {markdown_text(result.name)}", "\n".join(lines)]
    parts.append("Curves, examples and definitions are in report.html.")
    return "\n\n".join(parts) + "\n"


def _run_line(result: RunResult) -> str:
    note = f": {markdown_text(result.note)}" if result.note else ""
    return f"- **{markdown_text(result.name)}** ({markdown_text(result.method)}){note}"

"""A comparison of models as one self-contained HTML page and as Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from threetowers.eval.metrics.significance import significance
from threetowers.eval.record import EvalRecord, Example
from threetowers.eval.report import plots, tables
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.svg import DASH_ARRAYS, RUN_COLOURS, Panel
from threetowers.eval.report.tables import RunRecords, Table, markdown_text
from threetowers.eval.report.training_curves import SMOOTHING, gallery_panel, training_panels


@dataclass(frozen=True)
class ReportPaths:
    """Where the report was written."""

    html: Path
    markdown: Path


def render(
    results: Sequence[RunResult], out_dir: Path, *, title: str = "Evaluation", description: str = ""
) -> ReportPaths:
    """Write `report.html` (no script, no outside request) and `report.md` into `out_dir`, replacing older ones.

    Means are over the galleries that every run with retrieval records was evaluated on; what is missing or not
    comparable is said at the top. Raises ValueError for no runs, runs of the same name and two records of one gallery.
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
        self.significance = significance(results)
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

    def recall_panels(self) -> list[Panel]:
        """Recall against k in both directions."""
        panels = []
        for direction, text in tables.DIRECTIONS.items():
            ranks = [
                [self._items(index, run.galleries[name])[f"{direction}/rank"] for name in self.shared]
                if all(f"{direction}/rank" in self._items(index, run.galleries.get(name)) for name in self.shared)
                else []
                for index, run in enumerate(self.runs)
            ]
            side = "images" if direction == "text_to_image" else "captions"
            sizes = [run.galleries[n].counts[side] for run in self.runs for n in self.shared if n in run.galleries]
            if any(ranks):
                panels.append(plots.recall_panel(text, ranks, sizes))
        return panels

    def task_panels(self) -> list[Panel]:
        """Few-shot curves and calibration, for each gallery that has them."""
        found: list[Panel | None] = []
        for task, gallery in dict.fromkeys(self._others()):
            records = [self._record(index, task, gallery) for index in range(len(self.results))]
            items = [self._items(index, record) for index, record in enumerate(records)]
            shots = [None if record is None else record.metrics for record in records]
            judged = [(i["confidence"], i["top1"]) if {"confidence", "top1"} <= i.keys() else None for i in items]
            if task == "fewshot":
                found.append(plots.fewshot_panel(f"Few-shot, {gallery}", shots))
            if task == "zeroshot":
                found.append(plots.calibration_panel(f"Calibration of {task}, {gallery}", judged))
        return [panel for panel in found if panel is not None]

    def map_panels(self) -> list[Panel]:
        """Each model's images and captions of the first shared gallery, on their two main axes."""
        panels = []
        for index, run in enumerate(self.runs):
            items = self._items(index, run.galleries.get(self.shared[0]) if self.shared else None)
            if "map/images" in items:
                arrays = (items[f"map/{name}"] for name in ("images", "texts", "explained"))
                panels.append(plots.map_panel(run.name, index, *arrays))
        return panels

    def _others(self) -> list[tuple[str, str]]:
        found = [r.question for result in self.results for r in result.records if r.question.task != tables.RETRIEVAL]
        return [(question.task, question.gallery) for question in found]

    def _record(self, index: int, task: str, gallery: str) -> EvalRecord | None:
        found = (r for r in self.results[index].records if (r.question.task, r.question.gallery) == (task, gallery))
        return next(found, None)

    def _items(self, index: int, record: EvalRecord | None) -> dict[str, Any]:
        return {} if record is None else dict(self.results[index].items_of(record))


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


def _provenance(records: Sequence[EvalRecord]) -> list[tuple[str, str]]:
    """Facts that identify a run's results, each once."""
    facts: dict[str, list[str]] = {}
    for record in records:
        asked = record.question
        found = {
            "model digest": asked.model,
            "step": "" if asked.step is None else f"{asked.step:,}",
            "precision": asked.precision,
            "preprocessing": asked.preprocessing,
            "cache contract": asked.cache_manifest or "none",
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
    template = environment.from_string(
        files("threetowers.eval.report").joinpath("report.html").read_text(encoding="utf-8")
    )
    metrics = [result.metrics for result in view.results]
    unreadable = [(result.name, m.unreadable) for result, m in zip(view.results, metrics, strict=True) if m]
    return template.render(
        view=view,
        run_colours=RUN_COLOURS,
        dashes=DASH_ARRAYS,
        gallery_panels=view.gallery_panels(),
        recall_panels=view.recall_panels(),
        task_panels=view.task_panels(),
        map_panels=view.map_panels(),
        sections=training_panels(metrics),
        window=f"1/{SMOOTHING}",
        unreadable=[(name, lines) for name, lines in unreadable if lines],
        examples=_examples(view.results),
    )


def _examples(results: Sequence[RunResult]) -> dict[str, list[dict[str, Any]]]:
    """By heading: each query once, with the answers of every run that was asked it."""
    headings: dict[str, dict[tuple[str, str, str | None], dict[str, Any]]] = {}
    for index, result in enumerate(results):
        for record in result.records:
            for example in record.examples:
                group = headings.setdefault(example.heading, {}).setdefault(
                    (record.question.gallery, example.query.text, example.query.picture),
                    {
                        "text": example.query.text,
                        "picture": example.query.picture and result.pictures.get(example.query.picture),
                        "gallery": record.question.gallery,
                        "answers": [],
                    },
                )
                group["answers"].append(_answer(index, result, example))
    return {heading: list(groups.values()) for heading, groups in headings.items()}


def _answer(index: int, result: RunResult, example: Example) -> dict[str, Any]:
    shown = [(shown.picture and result.pictures.get(shown.picture), shown) for shown in example.answers]
    pictures = any(shown.picture is not None for shown in example.answers)
    return {"run": index, "name": result.name, "rank": example.rank, "shown": shown, "pictures": pictures}


def _markdown(view: _View) -> str:
    parts = [f"# {markdown_text(view.title)}"]
    if view.description:
        parts.append(markdown_text(view.description))
    parts.append("\n".join(_run_line(result) for result in view.results))
    if view.warnings:
        parts.append("\n".join(f"> {markdown_text(warning)}" for warning in view.warnings))
    sections: list[tuple[str, Table | None]] = [
        (f"Retrieval, mean of {len(view.shared)} galleries" if len(view.shared) > 1 else "Retrieval", view.comparison),
        ("Which differences are real", view.significance.differences),
        ("Intervals", view.significance.intervals),
        ("By gallery", view.by_gallery),
        ("Other results", view.others),
        ("Time by stage", view.stages),
        ("Ties", view.ties),
        ("Data", view.data),
    ]
    for heading, table in sections:
        if table is not None:
            parts += [f"## {heading}", table.markdown()]
            if table is view.significance.differences:
                parts.append("Percentage points, 95 % bootstrap intervals; p adjusted for all rows (Holm).")
    for result, facts in zip(view.results, view.provenance, strict=True):
        if facts:
            lines = [f"- {name}: {markdown_text(value)}" for name, value in facts]
            parts += [f"## Run {markdown_text(result.name)}", "\n".join(lines)]
    parts.append("Curves, examples and definitions are in report.html.")
    return "\n\n".join(parts) + "\n"


def _run_line(result: RunResult) -> str:
    note = f": {markdown_text(result.note)}" if result.note else ""
    return f"- **{markdown_text(result.name)}** ({markdown_text(result.method)}){note}"

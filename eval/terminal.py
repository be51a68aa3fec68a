"""The results of an evaluation as text for a terminal."""

from collections.abc import Sequence

from threetowers.eval.left_out import NOTHING, evaluated_images, left_out_share, left_out_text
from threetowers.eval.metrics.significance import group_by_recipe
from threetowers.eval.record import EvalRecord
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.tables import LEFT_OUT, NO_VALUE, Table, TableRow, by_gallery, comparison_table
from threetowers.eval.suite import SuiteResult
from threetowers.eval.tasks.registry import TASKS

STAGE_ORDER = ("cache", "training", "evaluation")
EXPLANATION = (
    "A hit at k: a match among the k best; recalls are means over the galleries, in percent; ties count "
    "against the model.\nSeconds of a cache count in full for each run that reads it, though it is built once."
)


def suite_text(result: SuiteResult) -> str:
    """Return the leading metrics of each task and data set, in percent, with a column for each model.

    Each row ends in how many images were left out; below it says why, which tasks could not be done, and which defaults
    were changed to fit a data set.
    """
    models = list(dict.fromkeys(record.spec.model for record in result.records))
    rows: dict[str, dict[str, float]] = {}
    shares: dict[str, str] = {}
    for record in result.records:
        for name, value in headline_metrics(record).items():
            row = f"{record.spec.data}  {record.spec.task}  {name}"
            rows.setdefault(row, {})[record.spec.model] = value
            shares[row] = left_out_share(evaluated_images(record.counts), record.left_out)

    head_width = max((len(row) for row in rows), default=0)
    widths = {model: max(len(model), 6) for model in models}
    lines = [" " * head_width + "".join(f"  {model:>{widths[model]}}" for model in models) + f"  {LEFT_OUT}"]
    for row, values in rows.items():
        line = f"{row:<{head_width}}"
        for model in models:
            cell = f"{100 * values[model]:.1f}" if model in values else "-"
            line += f"  {cell:>{widths[model]}}"
        lines.append(f"{line}  {shares[row]:>{len(LEFT_OUT)}}")
    notes = [
        "in percent; ties count against the model",
        *left_out_lines(result.records),
        *_skipped(result),
        *sample_notes(result.records),
        *result.notes,
        *result.left_out,
        *(f"not done: {line}" for line in result.refused),
    ]
    return "\n".join([*lines, *notes, f"report: {result.report.html}"])


def left_out_lines(records: Sequence[EvalRecord]) -> list[str]:
    """Return for each data set and task what was left out and why; one line that nothing was, where that is so."""
    lines: dict[str, None] = {}
    for record in records:
        text = left_out_text(evaluated_images(record.counts), record.left_out)
        if text != NOTHING:
            lines[f"left out of {record.spec.data}, {record.spec.task}: {text}"] = None
    return list(lines) or [f"left out: {NOTHING}"]


def _skipped(result: SuiteResult) -> list[str]:
    """Return the first of the samples and tars that cannot be used."""
    return [f"the first of {len(result.skipped):,} problems: {result.skipped[0]}"] if result.skipped else []


def headline_metrics(record: EvalRecord) -> dict[str, float]:
    """Return the metrics of a record that tables lead with: the data set's own, or top1 in tasks that lack it."""
    found: dict[str, float] = {}
    for metric in (str(record.spec.settings.get("metric", "top1")), "top1"):
        endings = tuple(ending.format(metric=metric) for ending in TASKS[record.spec.task].headline)
        found = {name: value for name, value in record.metrics.items() if name.endswith(endings)}
        if found:
            break
    return found


def sample_notes(records: Sequence[EvalRecord]) -> list[str]:
    """Return what cannot be used of the samples of each data set, with the number of images."""
    lines = []
    for record in records:
        for name, count in record.counts.items():
            if "notes/" in name:
                lines.append(f"{record.spec.data}: noted: {name.replace('notes/', '')}, in {count:,} images")
    return list(dict.fromkeys(lines))


def retrieval_text(result: SuiteResult) -> str:
    """Return the comparison of models by retrieval, what was compared and left out, and the costs of their caches."""
    galleries = list(dict.fromkeys(record.spec.data for record in result.records))
    caches = dict.fromkeys(str(cache) for run in result.results for cache in run.caches)
    counts = []
    for record in result.results[0].records:
        if record.spec.task == "retrieval" and record.spec.data in galleries:
            counts.append(
                f"{record.spec.data}: {record.counts['images']:,} images, {record.counts['captions']:,} captions, "
                f"{record.counts['groups']:,} groups; {record.counts['captions_merged']:,} further captions equal one "
                f"of their group, {record.counts['captions_beyond_limit']:,} are beyond the limit; duplicates: "
                f"{record.counts['image_duplicates']} images, {record.counts['caption_duplicates']} captions; "
                f"ids {record.sample_ids[:12]}"
            )
    seeds = [model.name for model in group_by_recipe(result.results) if len(model.members) > 1]
    means = [f"means over seeds, with intervals, are in the report: {', '.join(seeds)}"] if seeds else []
    refused = [f"not done: {line}" for line in result.refused]
    notes = "\n".join(
        [
            EXPLANATION,
            *means,
            *caches,
            *counts,
            *left_out_lines(result.records),
            *_skipped(result),
            *sample_notes(result.records),
            *refused,
        ]
    )
    table = _retrieval_table(result.results, galleries)
    return "\n\n".join([table.text(), notes, f"report: {result.report.html}"])


def _retrieval_table(results: Sequence[RunResult], galleries: Sequence[str]) -> Table:
    """Return a row for each model: recalls, median ranks, seconds of each stage, bytes and rate of its caches."""
    runs = [by_gallery(run.name, run.method, run.records) for run in results]
    shared = [name for name in galleries if all(name in run.galleries for run in runs)]
    table = comparison_table(runs, shared)
    if table is None:  # a model could not be evaluated on some gallery
        return Table(("Run",), (), tuple(TableRow((run.name,), ()) for run in results))
    timed = {stage for run in results for stage in run.stage_seconds}
    stages = sorted(timed, key=STAGE_ORDER.index)
    seconds: dict[int, list[str]] = {}
    costs: dict[int, list[str]] = {}
    for number, run in enumerate(results):
        seconds[number] = []
        for stage in stages:
            took = run.stage_seconds.get(stage)
            seconds[number].append(NO_VALUE if took is None else f"{took:.0f}")
        cache_bytes = sum(cache.bytes for cache in run.caches)
        cache_rows = sum(cache.rows for cache in run.caches)
        cache_seconds = sum(cache.seconds for cache in run.caches)
        costs[number] = [NO_VALUE, NO_VALUE]
        if cache_seconds:
            costs[number] = [f"{cache_bytes / 1e6:.1f}", f"{cache_rows / cache_seconds:.0f}"]
    return table.widened("Seconds", stages, seconds).widened("Cache", ["MB", "rows/s"], costs)

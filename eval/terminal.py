"""The results of an evaluation as text for a terminal."""

from collections.abc import Sequence

from threetowers.eval.record import EvalRecord
from threetowers.eval.report.results import RunResult
from threetowers.eval.report.tables import NO_VALUE, Table, by_gallery, comparison_table
from threetowers.eval.suite import SuiteResult
from threetowers.eval.tasks.registry import TASKS

STAGE_ORDER = ("cache", "training", "evaluation")
EXPLANATION = (
    "A hit at k: a match among the k best; recalls are means over the galleries, in percent; ties count "
    "against the model.\nSeconds of a cache count in full for each run that reads it, though it is built once."
)


def suite_text(result: SuiteResult) -> str:
    """Return the leading metrics of each task and data set, in percent, with a column for each model."""
    models = list(dict.fromkeys(record.spec.model for record in result.records))
    rows: dict[str, dict[str, float]] = {}
    for record in result.records:
        for name, value in headline_metrics(record).items():
            row = f"{record.spec.data}  {record.spec.task}  {name}"
            rows.setdefault(row, {})[record.spec.model] = value

    head_width = max((len(row) for row in rows), default=0)
    widths = {model: max(len(model), 6) for model in models}
    lines = [" " * head_width + "".join(f"  {model:>{widths[model]}}" for model in models)]
    for row, values in rows.items():
        line = f"{row:<{head_width}}"
        for model in models:
            cell = f"{100 * values[model]:.1f}" if model in values else "-"
            line += f"  {cell:>{widths[model]}}"
        lines.append(line)
    notes = [
        "in percent; ties count against the model",
        *result.left_out,
        *sample_notes(result.records),
        f"report: {result.report.html}",
    ]
    return "\n".join([*lines, *notes])


def headline_metrics(record: EvalRecord) -> dict[str, float]:
    """Return the metrics of a record that tables lead with."""
    metric = str(record.spec.settings.get("metric", "top1"))
    endings = tuple(ending.format(metric=metric) for ending in TASKS[record.spec.task].headline)
    return {name: value for name, value in record.metrics.items() if name.endswith(endings)}


def sample_notes(records: Sequence[EvalRecord]) -> list[str]:
    """Return what cannot be used of the samples of each data set, with the number of images."""
    lines = []
    for record in records:
        for name, count in record.counts.items():
            if "notes/" in name:
                lines.append(f"{record.spec.data}: noted: {name.replace('notes/', '')}, in {count:,} images")
    return list(dict.fromkeys(lines))


def retrieval_text(result: SuiteResult) -> str:
    """Return the comparison of models by retrieval, what was compared, and the costs of their caches."""
    galleries = list(dict.fromkeys(record.spec.data for record in result.records))
    caches = dict.fromkeys(str(cache) for run in result.results for cache in run.caches)
    counts = []
    for record in result.results[0].records:
        if record.spec.task == "retrieval" and record.spec.data in galleries:
            counts.append(
                f"{record.spec.data}: {record.counts['images']:,} images, {record.counts['captions']:,} captions, "
                f"{record.counts['groups']:,} groups; duplicates: {record.counts['image_duplicates']} images, "
                f"{record.counts['caption_duplicates']} captions; ids {record.sample_ids[:12]}"
            )
    skipped = []
    if result.skipped:
        skipped.append(f"{len(result.skipped)} samples left out; the first: {result.skipped[0]}")
    notes = "\n".join([EXPLANATION, *caches, *counts, *skipped, *sample_notes(result.records)])
    table = _retrieval_table(result.results, galleries)
    return "\n\n".join([table.text(), notes, f"report: {result.report.html}"])


def _retrieval_table(results: Sequence[RunResult], galleries: Sequence[str]) -> Table:
    """Return a row for each model: recalls, median ranks, seconds of each stage, bytes and rate of its caches."""
    table = comparison_table([by_gallery(run.name, run.method, run.records) for run in results], galleries)
    assert table is not None  # every model was evaluated on every gallery
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
        cache_samples = sum(cache.samples for cache in run.caches)
        cache_seconds = sum(cache.seconds for cache in run.caches)
        costs[number] = [NO_VALUE, NO_VALUE]
        if cache_seconds:
            costs[number] = [f"{cache_bytes / 1e6:.1f}", f"{cache_samples / cache_seconds:.0f}"]
    return table.widened("Seconds", stages, seconds).widened("Cache", ["MB", "img/s"], costs)

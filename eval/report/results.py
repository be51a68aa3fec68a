"""The records of evaluation folders, gathered by model: everything that a report is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from threetowers.eval.record import EvalRecord, read_items, read_record
from threetowers.eval.report.cache_costs import CacheCost
from threetowers.eval.report.model_metadata import ModelMetadata, read_model_metadata
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.report.training_curves import TrainingMetrics

RECORDS_FOLDER = "records"
MODELS_FOLDER = "models"
THUMBNAILS_FOLDER = "thumbnails"


@dataclass(frozen=True)
class RunResult:
    """What a report tells of one model; all but `name`, `method` and `records` may be missing.

    Attributes:
        name: Name of the model.
        method: Its loss terms, or its kind.
        records: One per task and data set.
        items: The arrays of each record, by its file name.
        thumbnails: Data URIs of the images in examples, by name.
        metrics: Training curves.
        stage_seconds: Wall seconds by stage, in order.
        caches: The caches it was trained with.
        note: One line on how the model differs.
    """

    name: str
    method: str
    records: Sequence[EvalRecord]
    items: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    thumbnails: Mapping[str, str] = field(default_factory=dict)
    metrics: TrainingMetrics | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    caches: Sequence[CacheCost] = ()
    note: str = ""

    def items_of(self, record: EvalRecord) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of one of the records."""
        return self.items.get(record.file_name, {})


def load_results(
    folders: Sequence[Path], models: Sequence[str] = (), preferred: Sequence[EvalRecord] = ()
) -> list[RunResult]:
    """Gather the records of evaluation folders by model.

    Of several records of one task and data set by models of one name (other weights, other settings) the preferred one
    counts, else the newest, and the note tells of it.

    Args:
        folders: Folders that `eval` commands wrote.
        models: Names of models, in this order; by default all.
        preferred: Records that count whatever their date.

    Raises:
        ValueError: A folder holds no record, or there is none of a model.
        BadRecord: A record is damaged.
    """
    preferred_files = {record.file_name for record in preferred}
    best: dict[tuple[str, str, str], tuple[EvalRecord, Path]] = {}
    superseded: dict[str, int] = {}
    metadata: dict[tuple[str, str], ModelMetadata] = {}
    for folder in folders:
        paths = sorted((folder / RECORDS_FOLDER).glob("*.json"))
        if not paths:
            raise ValueError(
                f"{folder} holds no records: expected a folder that `threetowers eval` wrote with --output-dir"
            )
        metadata |= read_model_metadata(folder / MODELS_FOLDER)
        for path in paths:
            record = read_record(path)
            key = (record.spec.model, record.spec.task, record.spec.data)
            if key in best:
                superseded[record.spec.model] = superseded.get(record.spec.model, 0) + 1
                other, _ = best[key]
                if (other.file_name in preferred_files, other.date) > (
                    record.file_name in preferred_files,
                    record.date,
                ):
                    continue
            best[key] = (record, folder)

    found = sorted({model for model, _, _ in best})
    order = list(models) or found
    if missing := [name for name in order if name not in found]:
        raise ValueError(f"no record of {missing} in {[str(folder) for folder in folders]}; found {found}")
    results = []
    for name in order:
        records = [entry for (model, _, _), entry in best.items() if model == name]
        results.append(_result(name, records, metadata, superseded.get(name, 0)))
    return results


def _result(
    name: str,
    entries: Sequence[tuple[EvalRecord, Path]],
    metadata: Mapping[tuple[str, str], ModelMetadata],
    superseded: int,
) -> RunResult:
    records = [record for record, _ in entries]
    digests = {record.spec.model_digest for record in records}
    known = next((metadata[name, digest] for digest in digests if (name, digest) in metadata), None)
    notes = []
    if superseded:
        notes.append(f"{superseded} other results of the same tasks are left out")
    if len(digests) > 1:
        notes.append("its results are of different weights")
    stage_seconds = dict(known.stage_seconds) if known else {}
    stage_seconds["evaluation"] = sum(record.seconds for record in records)
    return RunResult(
        name=name,
        method=known.method if known else "",
        records=records,
        items={record.file_name: read_items(record, folder / RECORDS_FOLDER) for record, folder in entries},
        thumbnails=_thumbnails(entries),
        metrics=known.metrics() if known else None,
        stage_seconds=stage_seconds,
        caches=known.caches if known else (),
        note="; ".join(notes),
    )


def _thumbnails(entries: Sequence[tuple[EvalRecord, Path]]) -> dict[str, str]:
    """Return the data URIs of the images that examples show, by name."""
    uris: dict[str, str] = {}
    for record, folder in entries:
        store = ThumbnailStore(folder / THUMBNAILS_FOLDER)
        for example in record.examples:
            for item in (example.query, *example.answers):
                if item.thumbnail is None or item.thumbnail in uris:
                    continue
                uri = store.data_uri(item.thumbnail)
                if uri is not None:
                    uris[item.thumbnail] = uri
    return uris

"""What evaluations left in their folders, gathered by model: all that a report is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from threetowers.eval.record import EvalRecord, read_items, read_record
from threetowers.eval.report.cache_costs import CacheFacts
from threetowers.eval.report.model_metadata import Card, read_cards
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.report.training_curves import TrainingMetrics

RECORDS, MODELS, PICTURES = "records", "models", "pictures"


@dataclass(frozen=True)
class RunResult:
    """All a report tells of one model; everything but `name`, `method` and `records` may be missing.

    `records`: one a task and gallery. `items`: the arrays of each record, by its file name. `pictures`: data URIs of
    the pictures in examples, by name. `metrics`: training curves. `stage_seconds`: wall seconds by stage, in order.
    `note`: one line on how the model differs.
    """

    name: str
    method: str
    records: Sequence[EvalRecord]
    items: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    metrics: TrainingMetrics | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    caches: Sequence[CacheFacts] = ()
    note: str = ""

    def items_of(self, record: EvalRecord) -> Mapping[str, NDArray[Any]]:
        """The arrays of one of the records."""
        return self.items.get(record.file_name, {})


def load_results(
    folders: Sequence[Path], names: Sequence[str] = (), asked: Sequence[EvalRecord] = ()
) -> list[RunResult]:
    """Gather the records of evaluation folders by model: those of `names`, in that order, or all.

    Of several answers to one task and gallery by a model of one name (other weights, other settings) the one that was
    `asked` for counts, else the newest, and the note says so. Raises ValueError where a folder holds no record, and
    BadRecord for a damaged one.
    """
    wanted = {record.file_name for record in asked}
    newest: dict[tuple[str, str, str], tuple[EvalRecord, Path]] = {}
    superseded: dict[str, int] = {}
    cards: dict[tuple[str, str], Card] = {}
    for folder in folders:
        found = sorted((folder / RECORDS).glob("*.json"))
        if not found:
            raise ValueError(f"{folder} holds no records: expected a folder that `threetowers eval` wrote with --out")
        cards |= read_cards(folder / MODELS)
        for path in found:
            record = read_record(path)
            key = (record.question.run, record.question.task, record.question.gallery)
            if key in newest:
                superseded[key[0]] = superseded.get(key[0], 0) + 1
            rank = (record.file_name in wanted, record.date)
            if key not in newest or (newest[key][0].file_name in wanted, newest[key][0].date) <= rank:
                newest[key] = (record, folder)
    order = list(names) or sorted(dict.fromkeys(run for run, _, _ in newest))
    if missing := [name for name in order if name not in {run for run, _, _ in newest}]:
        raise ValueError(
            f"no record of {missing} in {[str(f) for f in folders]}; found {sorted({n[0] for n in newest})}"
        )
    return [
        _result(name, [found for key, found in newest.items() if key[0] == name], cards, superseded.get(name, 0))
        for name in order
    ]


def _result(
    name: str, found: Sequence[tuple[EvalRecord, Path]], cards: Mapping[tuple[str, str], Card], superseded: int
) -> RunResult:
    records = [record for record, _ in found]
    digests = {record.question.model for record in records}
    card = next((cards[name, digest] for digest in digests if (name, digest) in cards), None)
    pictures: dict[str, str] = {}
    for record, folder in found:
        thumbnails = ThumbnailStore(folder / PICTURES)
        shown = [s for e in record.examples for s in (e.query, *e.answers) if s.picture is not None]
        wanted = {s.picture for s in shown if s.picture is not None}
        pictures |= {picture: uri for picture in wanted if (uri := thumbnails.data_uri(picture)) is not None}
    notes = []
    if superseded:
        notes.append(f"{superseded} other results of the same tasks are left out")
    if len(digests) > 1:
        notes.append("its results are of different weights")
    return RunResult(
        name=name,
        method=card.method if card else "",
        records=records,
        items={record.file_name: read_items(record, folder / RECORDS) for record, folder in found},
        pictures=pictures,
        metrics=card.metrics() if card else None,
        stage_seconds={
            **(card.stage_seconds if card else {}),
            "evaluation": sum(record.seconds for record in records),
        },
        caches=card.caches if card else (),
        note="; ".join(notes),
    )

"""All that the descriptions of some data sets ask of some models: one record an answer, none computed twice."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from threetowers.eval.datasets.config import Description, Settings, Tasks
from threetowers.eval.datasets.dataset import OpenSet, Part, Reader, as_gallery, load_description, open_set
from threetowers.eval.datasets.prompts import fill, prompts_hash
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.record import EvalRecord, EvalSpec, answered, digest
from threetowers.eval.report.model_metadata import card_of, write_card
from threetowers.eval.report.page import ReportPaths, render
from threetowers.eval.report.results import MODELS, PICTURES, RECORDS, load_results
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.tasks import TASKS, Showing, check, needs_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """One task of one open set."""

    task: str
    opened: OpenSet
    settings: Settings


@dataclass(frozen=True)
class Suite:
    """What came out. `left_out`: tasks that a model cannot answer, each with the reason."""

    records: list[EvalRecord]
    left_out: list[str]
    report: ReportPaths

    def text(self) -> str:
        """What a terminal shows: each set's tasks with the metrics they lead with, a column a model."""
        models = list(dict.fromkeys(record.question.run for record in self.records))
        rows: dict[str, dict[str, float]] = {}
        for record in self.records:
            for name, value in headlines(record).items():
                row = f"{record.question.gallery}  {record.question.task}  {name}"
                rows.setdefault(row, {})[record.question.run] = value
        width = max((len(row) for row in rows), default=0)
        columns = [max(len(model), 6) for model in models]
        lines = [" " * width + "".join(f"  {model:>{size}}" for model, size in zip(models, columns, strict=True))]
        for row, values in rows.items():
            cells = [f"{100 * values[model]:.1f}" if model in values else "-" for model in models]
            lines.append(f"{row:<{width}}" + "".join(f"  {c:>{size}}" for c, size in zip(cells, columns, strict=True)))
        notes = ["in percent; ties count against the model", *self.left_out, f"report: {self.report.html}"]
        return "\n".join([*lines, *notes])


def headlines(record: EvalRecord) -> dict[str, float]:
    """The metrics that a table leads with: of `metric`, and what else a task is run for."""
    metric = str(record.question.settings.get("metric", "top1"))
    wanted = {
        "zeroshot": (metric,),
        "probe": (metric,),
        "knn": (f"/{metric}",),
        "fewshot": ("-shot/top1",),
        "shift": (f"/{metric}", f"/{metric}_drop", "/recall@1", "/recall@1_drop"),
        "ood": ("/auroc",),
        "retrieval": ("/recall@1",),
    }[record.question.task]
    return {name: value for name, value in record.metrics.items() if name.endswith(wanted)}


def run_suite(
    models: Sequence[str | Path],
    sets: Sequence[str | Path],
    out: Path,
    *,
    tasks: Sequence[str] | None = None,
    loading: LoadOptions | None = None,
    again: bool = False,
) -> Suite:
    """Answer the tasks that the sets' descriptions name (or those given) for each model.

    Records go to `out`, and a report on these models, with what else `out` holds of them. Every description, set and
    model is opened and checked before the first embedding is computed. Raises ValueError for what is wrong with them.
    """
    if not models or not sets:
        raise ValueError(f"expected at least one model and one data set, got {list(models)} and {list(sets)}")
    read = Reader()
    asked = [one for path in sets for one in questions_of(path, tasks, read)]
    called = [(one.opened.source.description.name, one.task) for one in asked]
    if twice := sorted({name for name, task in called if called.count((name, task)) > 1}):
        raise ValueError(f"several of the data sets are called {twice[0]!r}: give each a name of its own")
    loading = loading or LoadOptions(embeddings=out / "embeddings")
    encoders = [load_encoder(model, loading) for model in models]
    names = [encoder.facts.name for encoder in encoders]
    if len(set(names)) != len(names):
        raise ValueError(f"models must have different names, got {names}")
    records, left_out = [], []
    show = Showing(ThumbnailStore(out / PICTURES))
    for model, encoder in zip(models, encoders, strict=True):
        write_card(card_of(model, encoder), out / MODELS)
        for one in asked:
            if needs_text(one.task) and not encoder.sees_text:
                left_out.append(f"{encoder.facts.name}: no {one.task}, as it sees images only")
                continue
            records.append(answer(one, encoder, out / RECORDS, show, again))
    if not records:
        raise ValueError(f"no model can answer what is asked: {'; '.join(left_out)}")
    answered_by = list(dict.fromkeys(record.question.run for record in records))
    title = f"Evaluation: {', '.join(answered_by)}"
    return Suite(records, left_out, render(load_results([out], answered_by, records), out, title=title))


def questions_of(path: str | Path, tasks: Sequence[str] | None = None, read: Reader | None = None) -> list[Asked]:
    """Open a described set, and return what is asked of it. Raises ValueError where a task cannot be answered on it."""
    source = load_description(path)
    own = source.description.tasks
    wanted = {name: getattr(own, name) for name in asdict(Tasks()) if getattr(own, name) is not None}
    if tasks is not None:
        wanted = {name: wanted.get(name) or _default(name) for name in tasks}
    if not wanted:
        raise ValueError(f"{path}: names no task: list them under tasks, or ask for one")
    read = read or Reader()
    asked = [Asked(task, open_set(source, task, settings, read), settings) for task, settings in wanted.items()]
    for one in asked:
        try:
            check(one.opened, one.settings)
        except ValueError as error:
            raise ValueError(f"{path}: {one.task}: {error}") from error
    return asked


def _default(task: str) -> Any:
    kinds = {f"{name}": kind for name, kind in Tasks.__annotations__.items()}
    if task not in kinds:
        raise ValueError(f"{task!r} is no task; tasks are {sorted(kinds)}")
    (kind,) = (k for k in kinds[task].__args__ if k is not type(None))
    return kind()


def answer(one: Asked, encoder: Encoder, folder: Path, show: Showing, again: bool = False) -> EvalRecord:
    """The record of what is asked of a model: the one in `folder` if it is there, else computed and written."""
    opened = one.opened
    parts = dict(_parts(opened))
    tars = {tar.location: tar for part in parts.values() for tar in part.data.tars}
    description = opened.source.description
    texts = _texts(one)
    question = EvalSpec.of(
        one.task,
        description.name,
        encoder.facts,
        tars.values(),
        {
            "metric": description.metric,
            "settings": json.dumps(asdict(one.settings), sort_keys=True),
            "pictures": json.dumps(_selection(description), sort_keys=True),
            "texts": prompts_hash(texts),
            "classes": prompts_hash(opened.names),
        },
    )
    log.info("%s: %s on %s", encoder.facts.name, one.task, description.name)
    return answered(
        question,
        encoder.facts,
        folder,
        lambda: TASKS[one.task](encoder, opened, one.settings, show),
        sample_ids=digest(_ids(parts)),
        texts=digest(texts),
        again=again,
    )


def _parts(opened: OpenSet) -> Iterator[tuple[str, Part]]:
    yield "test", opened.test
    if opened.learn is not None:
        yield "learn", opened.learn
    yield from opened.shifted.items()
    yield from opened.outliers.items()


def _ids(parts: Mapping[str, Part]) -> Iterator[str]:
    for name, part in parts.items():
        for picture in part.pictures():
            yield f"{name}/{part.data.tars[picture.tar].name}/{picture.key}"


def _texts(one: Asked) -> list[str]:
    """Every text that the answer depends on: prompts, or captions."""
    settings: Any = one.settings
    if one.task == "shift" and settings.of == "retrieval":
        settings = settings.retrieval
    elif one.task != "retrieval":
        return fill(one.opened.templates, one.opened.names) if one.opened.templates else list(one.opened.names)
    data = as_gallery(one.opened.test, settings.group_field, settings.max_captions)
    return [caption for picture in data.pictures for caption in picture.captions]


def _selection(description: Description) -> dict[str, Any]:
    """What of the tars is read, as far as it is not in the tars themselves."""
    keys = ("where", "label", "split")

    def of(part: Any) -> dict[str, Any]:
        return {key: getattr(part, key) for key in keys}

    parts = {"test": description, "learn": description.learn, **description.shifted, **description.outliers}
    return {name: of(part) for name, part in parts.items() if part is not None}

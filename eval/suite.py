"""Evaluation of models on data sets: one path from specs over records to a report."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from threetowers.cache.webdataset.tar_list import OnBad
from threetowers.eval.datasets.dataset import EvalDataset, load_dataset_config, open_dataset
from threetowers.eval.datasets.dataset_config import DatasetConfig, DatasetError, UnfitForTask
from threetowers.eval.datasets.image_set import ImageReader
from threetowers.eval.datasets.prompts import fill_templates, prompts_hash
from threetowers.eval.encoders.embedding_store import images_digest
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.load import check_options, load_encoder
from threetowers.eval.left_out import left_out_text
from threetowers.eval.metrics.classification import telling_ks
from threetowers.eval.record import EvalRecord, EvalSpec, digest, load_or_compute
from threetowers.eval.report.model_metadata import model_metadata, write_model_metadata
from threetowers.eval.report.page import ReportPaths, render
from threetowers.eval.report.results import MODELS_FOLDER, RECORDS_FOLDER, THUMBNAILS_FOLDER, RunResult, load_results
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.registry import TASKS
from threetowers.eval.tasks.retrieval import Gallery, captioned, split_galleries
from threetowers.eval.tasks.settings import RetrievalSettings, ShiftSettings

logger = logging.getLogger(__name__)

EMBEDDINGS_FOLDER = "embeddings"


@dataclass(frozen=True)
class PlannedEvaluation:
    """One task on one opened data set.

    Attributes:
        task: Name of the task.
        dataset: The data set, or one gallery of it.
        settings: Settings of the task.
        skipped: The samples and tars that are left out, each with the reason.
    """

    task: str
    dataset: EvalDataset
    settings: Any
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvaluationPlan:
    """What is to be evaluated of a data set.

    Attributes:
        evaluations: Each task that can be done, on the data set or on each of its galleries.
        refused: Tasks that cannot be done on it, each with the reason.
        notes: Defaults that were changed to fit it.
    """

    evaluations: list[PlannedEvaluation]
    refused: list[str]
    notes: list[str]


@dataclass(frozen=True)
class SuiteResult:
    """The results of some models on some data sets.

    Attributes:
        records: One per model, task and data set.
        results: All that the report tells of each model, among it what earlier evaluations left in the folder.
        left_out: Tasks that a model cannot do as it sees images only, each with the reason.
        skipped: Samples and tars that were left out, each with the reason.
        report: The files of the report.
        refused: Tasks that could not be done, each with the reason.
        notes: Defaults that were changed to fit a data set.
    """

    records: list[EvalRecord]
    results: list[RunResult]
    left_out: list[str]
    skipped: list[str]
    report: ReportPaths
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or 1 where a task could not be done."""
        return 1 if self.refused else 0


def evaluate(
    models: Sequence[str | Path],
    datasets: Sequence[str | Path | DatasetConfig],
    output_dir: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    options: LoadOptions | None = None,
    ensembles: Sequence[EnsembleOptions] = (),
    title: str = "Evaluation",
    overwrite: bool = False,
    on_bad: OnBad | None = None,
) -> SuiteResult:
    """Evaluate models on the tasks of data sets, and write a record for each result and a report of all.

    All models and data sets are opened and checked before the first embedding is computed.

    Args:
        models: See `load_encoder`.
        datasets: YAML files, folders or URLs in CLIP_benchmark's layout, or configs.
        output_dir: Folder of records/, embeddings/, models/, thumbnails/, report.html and report.md. What is recorded
            there is not computed again.
        tasks: Tasks to run; by default those that each data set names.
        options: How models are loaded and run; embeddings are kept in `output_dir` unless they name another folder.
        ensembles: Evaluate each model also with its third tower mixed in, in each of these ways.
        title: Of the report, before the names of the models.
        overwrite: Compute what is recorded, too.
        on_bad: What is done with samples and tars that cannot be used (see `DatasetConfig`); None: what each data set
            says.

    Returns:
        The records, whose metrics are fractions in 0..1, and the paths of the report.

    Raises:
        ValueError: A model or a data set cannot be used, models or data sets share a name, or no model can do any task.
            A task that cannot be done beside others that can is named in `refused` instead.

    Examples:
        >>> import io, json, tarfile, tempfile, timm, numpy as np
        >>> from PIL import Image
        >>> from safetensors.torch import save_file
        >>> folder = tempfile.mkdtemp()
        >>> weights = f"{folder}/weights.safetensors"
        >>> save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), weights)
        >>> with tarfile.open(f"{folder}/a.tar", "w") as tar:
        ...     for number in range(24):
        ...         pixels = np.full((32, 32, 3), 10 * number, np.uint8)
        ...         png = io.BytesIO()
        ...         Image.fromarray(pixels).save(png, "PNG")
        ...         for extension, data in (("png", png.getvalue()), ("cls", str(number // 12).encode())):
        ...             member = tarfile.TarInfo(f"s{number}.{extension}")
        ...             member.size = len(data)
        ...             tar.addfile(member, io.BytesIO(data))
        >>> greys = DatasetConfig(
        ...     name="greys", tars=[f"{folder}/a.tar"], classes=["dark", "light"], train={"tars": [f"{folder}/a.tar"]}
        ... )
        >>> model = f"timm:test_resnet@32:{weights}"
        >>> result = evaluate([model], [greys], f"{folder}/out", tasks=["knn"], options=LoadOptions(workers=0))
        >>> [(record.spec.task, record.spec.data, record.counts["images"]) for record in result.records]
        [('knn', 'greys', 24)]
    """
    output_dir = Path(output_dir)
    if not models or not datasets:
        raise ValueError(f"expected at least one model and one data set, got {list(models)} and {list(datasets)}")

    # Open and check everything before the long work, so that the last cannot fail it.
    options = options or LoadOptions()
    reader = ImageReader(options.max_pixels)
    planned: list[PlannedEvaluation] = []
    refused: list[str] = []
    notes: list[str] = []
    for dataset in datasets:
        plan = plan_evaluations(dataset, tasks, reader, on_bad)
        planned += plan.evaluations
        refused += plan.refused
        notes += plan.notes
    if not planned:
        raise DatasetError("\n".join(refused))
    _check_names(planned)
    if options.embeddings is None:
        options = replace(options, embeddings=output_dir / EMBEDDINGS_FOLDER)
    encoders: list[tuple[str | Path, Encoder]] = []
    for model in models:
        for ensemble in (None, *ensembles):
            encoders.append((model, load_encoder(model, options, ensemble)))
    check_options([encoder for _, encoder in encoders], options)
    _check_models([encoder for _, encoder in encoders], planned)

    # Evaluate each model on each task, or read its record. What fails does not take the others with it.
    records: list[EvalRecord] = []
    left_out: list[str] = []
    failures: list[ValueError] = []
    for model, encoder in encoders:
        write_model_metadata(model_metadata(model, encoder), output_dir / MODELS_FOLDER)
        for one in planned:
            if TASKS[one.task].needs_text and not encoder.sees_text:
                left_out.append(f"{encoder.info.name}: no {one.task}, as it sees images only")
                continue
            try:
                records.append(run_evaluation(one, encoder, output_dir, overwrite))
            except ValueError as error:
                refused.append(f"{encoder.info.name}: {one.dataset.name}: {one.task}: {error}")
                failures.append(error)
    if not records:
        if len(failures) == 1:
            raise failures[0]
        raise ValueError("\n".join(refused))

    # Report on these models, with what else the folder holds of them.
    evaluated = {record.spec.model for record in records}
    names = [encoder.info.name for _, encoder in encoders if encoder.info.name in evaluated]
    results = load_results([output_dir], names, records)
    report = render(
        results,
        output_dir,
        title=f"{title}: {', '.join(names)}",
        description=_description(planned),
        notes=[*(f"Not done: {line}" for line in refused), *left_out, *notes],
    )
    skipped = list(dict.fromkeys(message for one in planned for message in one.skipped))
    return SuiteResult(records, results, left_out, skipped, report, refused, notes)


def plan_evaluations(
    dataset: str | Path | DatasetConfig,
    tasks: Sequence[str] | None = None,
    reader: ImageReader | None = None,
    on_bad: OnBad | None = None,
) -> EvaluationPlan:
    """Open a data set for each of its tasks; retrieval is planned for each of its galleries.

    Args:
        dataset: A YAML file, a folder or URL in CLIP_benchmark's layout, or a config.
        tasks: Tasks to plan, by default those that the data set names.
        reader: Reads images; share it among calls, so that each image is read once.
        on_bad: What is done with samples and tars that cannot be used; None: what the data set says.

    Returns:
        The tasks that can be done, and why others cannot.

    Raises:
        DatasetError: The data set cannot be used.
    """
    if isinstance(dataset, DatasetConfig):
        config = dataset
        label = ", ".join(config.tars) or str(config.root)
    else:
        config = load_dataset_config(dataset)
        label = str(dataset)
    if on_bad is not None:
        config = replace(config, on_bad=on_bad)
    wanted: dict[str, Any] = {}
    for task in TASKS if tasks is None else tasks:
        if task not in TASKS:
            raise ValueError(f"{task!r} is not a task; tasks are {sorted(TASKS)}")
        settings = getattr(config.tasks, task)
        if settings is not None or tasks is not None:
            wanted[task] = settings or TASKS[task].settings()
    if not wanted:
        raise DatasetError(f"{label}: names no task: list them under tasks, or select some with --tasks")

    reader = reader or ImageReader()
    plan = EvaluationPlan([], [], [])
    for task, settings in wanted.items():
        try:
            opened = open_dataset(config, task, settings, reader)
            evaluations, notes = _fitted(task, opened, settings)
        except UnfitForTask as error:
            plan.refused.append(f"{label}: {task}: {error}")
        except ValueError as error:
            raise DatasetError(f"{label}: {task}: {error}") from error
        else:
            plan.evaluations.extend(evaluations)
            plan.notes.extend(f"{label}: {task}: {note}" for note in notes)
    return plan


def _fitted(task: str, opened: EvalDataset, settings: Any) -> tuple[list[PlannedEvaluation], list[str]]:
    """Return a task on an opened data set, gallery by gallery, and the defaults that were changed to fit it.

    Raises:
        UnfitForTask: The task cannot be done on it.
        DatasetError: An image cannot be used, and `on_bad` is `error`.
    """
    try:
        settings, notes = TASKS[task].fit(opened, settings)
    except ValueError as error:
        raise UnfitForTask(str(error)) from error
    _check_metric(task, opened)
    skipped = [message for part in opened.parts().values() for message in part.data.skipped]
    if task == "retrieval":
        galleries, problems = split_galleries(opened, settings)
        return [PlannedEvaluation(task, one, share, (*skipped, *problems)) for one, share in galleries], notes
    if isinstance(settings, ShiftSettings) and settings.of == "retrieval":
        opened, problems = captioned(opened, settings.retrieval)
        skipped += problems
    return [PlannedEvaluation(task, opened, settings, tuple(skipped))], notes


def _check_metric(task: str, dataset: EvalDataset) -> None:
    """Raise UnfitForTask where the config asks for a metric that says nothing, or is not defined, on the data set."""
    classes = len(dataset.class_names)
    if task not in ("zeroshot", "probe", "shift") or not classes:
        return
    if dataset.config.metric == "top5" and 5 not in telling_ks(classes):
        raise UnfitForTask(
            f"metric: top5 of {classes} classes: every prediction would be right; expected top1 or mean_per_class"
        )
    if dataset.config.metric == "mean_average_precision" and not dataset.test.multi_label:
        raise UnfitForTask(
            "metric: mean_average_precision needs images with several labels, found one each; expected top1, top5 or "
            "mean_per_class"
        )


def run_evaluation(
    planned: PlannedEvaluation, encoder: Encoder, output_dir: Path, overwrite: bool = False
) -> EvalRecord:
    """Return the record of a planned evaluation of a model: the one in `output_dir`, or a newly computed one.

    Args:
        planned: Task, data set and settings.
        encoder: The model.
        output_dir: Folder of records/ and thumbnails/.
        overwrite: Compute the result even if it is recorded.
    """
    dataset = planned.dataset
    tars = {}
    sample_names = []
    for name, part in dataset.parts().items():
        tars.update({tar.location: tar for tar in part.data.tars})
        for image in part.images():
            sample_names.append(f"{name}/{part.data.tars[image.tar].name}/{image.key}")
    galleries = _galleries(planned)
    texts = _texts(planned, galleries)
    spec = EvalSpec.of(
        planned.task,
        dataset.name,
        encoder.info,
        tars.values(),
        {
            "metric": dataset.metric,
            "settings": json.dumps(asdict(planned.settings), sort_keys=True),
            "images": json.dumps(_selection(dataset.config), sort_keys=True),
            "data": _data_digest(dataset, galleries),
            "texts": prompts_hash(texts),
            "classes": prompts_hash(dataset.class_names),
        },
    )
    logger.info("%s: %s on %s", encoder.info.name, planned.task, dataset.name)
    thumbnails = ThumbnailStore(output_dir / THUMBNAILS_FOLDER, dataset.test.data.max_pixels)
    return load_or_compute(
        spec,
        encoder.info,
        output_dir / RECORDS_FOLDER,
        lambda: TASKS[planned.task].run(encoder, dataset, planned.settings, thumbnails),
        sample_ids=digest(sample_names),
        texts=digest(texts),
        left_out=dataset.left_out(),
        overwrite=overwrite,
    )


def _check_names(planned: Sequence[PlannedEvaluation]) -> None:
    """Raise ValueError where two data sets of one task share a name: their records could not be told apart."""
    seen = set()
    for one in planned:
        key = (one.task, one.dataset.name)
        if key in seen:
            raise ValueError(f"several of the data sets are called {one.dataset.name!r}: give each a different name")
        seen.add(key)


def _check_models(encoders: Sequence[Encoder], planned: Sequence[PlannedEvaluation]) -> None:
    """Raise ValueError for models of one name, and for a model that can do none of the tasks."""
    names = [encoder.info.name for encoder in encoders]
    if len(set(names)) != len(names):
        raise ValueError(f"models must have different names, got {names}: rename the folder of one")
    if all(TASKS[one.task].needs_text for one in planned):
        blind = [encoder.info.name for encoder in encoders if not encoder.sees_text]
        if blind:
            tasks = sorted({one.task for one in planned})
            raise ValueError(f"{blind} see images only, but {', '.join(tasks)} needs a text tower: leave them out")


def _galleries(planned: PlannedEvaluation) -> list[Gallery]:
    """Return what is searched in, part by part; empty for tasks that search nothing."""
    settings = planned.settings
    if isinstance(settings, ShiftSettings) and settings.of == "retrieval":
        settings = settings.retrieval
    if not isinstance(settings, RetrievalSettings):
        return []
    return [Gallery.of(part, settings) for part in planned.dataset.parts().values()]


def _texts(planned: PlannedEvaluation, galleries: Sequence[Gallery]) -> list[str]:
    """Return every text that the result depends on: captions, prompts or class names."""
    dataset = planned.dataset
    if galleries:
        return [caption for gallery in galleries for caption in gallery.captions]
    if dataset.templates:
        return fill_templates(dataset.templates, dataset.class_names)
    return list(dataset.class_names)


def _data_digest(dataset: EvalDataset, galleries: Sequence[Gallery]) -> str:
    """Return a digest of what the tars gave: the images of each part with labels and groups, and what was left out."""
    sha = hashlib.sha256()
    for name, part in dataset.parts().items():
        sha.update(f"{name} {images_digest(part.data, part.images())} {part.multi_label}\n".encode())
        for array in (part.labels_NL, part.candidate_classes, part.group_N):
            sha.update(b"none" if array is None else f"{array.shape}".encode() + array.tobytes())
    for gallery in galleries:
        sha.update(gallery.image_group_N.tobytes() + gallery.text_group_M.tobytes())
        sha.update(json.dumps(gallery.groups).encode())
        sha.update(json.dumps(gallery.caption_counts(), sort_keys=True).encode())
    sha.update(json.dumps(dataset.left_out(), sort_keys=True).encode())
    return sha.hexdigest()


def _selection(config: DatasetConfig) -> dict[str, Any]:
    """Return which samples of the tars are used, and as what."""
    selection: dict[str, dict[str, Any]] = {}
    for name, part in {"test": config.test, **config.parts()}.items():
        selection[name] = {"filter": part.filter, "label": part.label, "split": part.split}
        if part.image_member is not None:
            selection[name]["image_member"] = part.image_member
    return selection


def _description(planned: Sequence[PlannedEvaluation]) -> str:
    """Return what is compared, where it is the retrieval of one data set; else nothing."""
    first = planned[0]
    if any(one.task != "retrieval" or one.dataset.config is not first.dataset.config for one in planned):
        return ""
    settings: RetrievalSettings = first.settings
    images = sum(len(one.dataset.test.rows) for one in planned)
    tars = len(first.dataset.test.data.tars)
    split = f", one gallery per {settings.gallery_field!r}" if settings.gallery_field else ""
    match = f"of one {settings.group_field!r}" if settings.group_field else "of one sample"
    limit = f"at most {settings.max_captions} captions" if settings.max_captions else "all captions"
    each = ", each as often as it is there" if settings.duplicate_captions == "each" else ""
    return (
        f"{images:,} images in {tars} tars{split}. An image and a caption match if they are {match}; {limit} per "
        f"sample{each}. Left out: {left_out_text(images, first.dataset.left_out())}."
    )

"""The retrieval evaluation of runs: embed, index, rank, record, report."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from threetowers.cache.tars import expand, index_tar
from threetowers.eval.cost import CacheFacts, caches_of
from threetowers.eval.embed import EvaluationSet, evaluation_set
from threetowers.eval.encoder import Encoder, Loading, load_encoder
from threetowers.eval.gallery import Gallery, encoded, galleries_of
from threetowers.eval.record import Question, Record, TarRef, digest, write_record
from threetowers.eval.report import ImageExample, ReportPaths, RunResult, TextExample, render
from threetowers.eval.search import GallerySearch
from threetowers.eval.tables import ABSENT, Table, by_gallery, comparison_table
from threetowers.trainer.folder import RunFolder
from threetowers.trainer.trained import TrainedModel

STAGES = ["cache", "training", "evaluation"]


@dataclass(frozen=True)
class Settings:
    """How an evaluation set is read and searched."""

    group_field: str | None = None
    part_field: str | None = None
    max_captions: int = 5
    index: str = "Flat"
    examples: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """What came out: one result per run, the records' folder and the report."""

    results: list[RunResult]
    galleries: list[Gallery]
    skipped: list[str]
    caches: list[list[CacheFacts]]  # of each run
    records: Path
    report: ReportPaths

    def text(self) -> str:
        """What a terminal shows: the comparison, what was compared, and where the rest is."""
        counts = [
            f"{record.question.gallery}: {record.counts['images']:,} images, {record.counts['captions']:,} captions, "
            f"{record.counts['groups']:,} groups; duplicates: {record.counts['image_duplicates']} images, "
            f"{record.counts['caption_duplicates']} captions; ids {record.sample_ids[:12]}"
            for record in self.results[0].records
        ]
        explained = (
            "A hit at k: a match among the k best; recalls are means over the galleries, in percent; ties count "
            "against the model.\nSeconds of a cache count in full for each run that reads it, though it is built once."
        )
        skipped = [f"{len(self.skipped)} samples left out; the first: {self.skipped[0]}"] if self.skipped else []
        caches = list(dict.fromkeys(str(cache) for run in self.caches for cache in run))
        notes = "\n".join([explained, *caches, *counts, *skipped])
        return "\n\n".join([self._table().text(), notes, f"report: {self.report.html}"])

    def _table(self) -> Table:
        """One row a run: recalls, median ranks, seconds of each stage, bytes and rate of its caches."""
        runs = [by_gallery(result.name, result.method, result.records) for result in self.results]
        table = comparison_table(runs, [gallery.name for gallery in self.galleries])
        assert table is not None  # every run was evaluated on every gallery
        stages = sorted({stage for result in self.results for stage in result.stage_seconds}, key=STAGES.index)
        seconds = {
            number: [f"{result.stage_seconds[s]:.0f}" if s in result.stage_seconds else ABSENT for s in stages]
            for number, result in enumerate(self.results)
        }
        costs = {}
        for number, caches in enumerate(self.caches):
            size, samples, took = (sum(getattr(c, name) for c in caches) for name in ("bytes", "samples", "seconds"))
            costs[number] = [f"{size / 1e6:.1f}", f"{samples / took:.0f}"] if took else [ABSENT, ABSENT]
        return table.widened("Seconds", stages, seconds).widened("Cache", ["MB", "img/s"], costs)


def compare(
    runs: Sequence[Path],
    tars: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    caches: Mapping[str, Path] | None = None,
    live_teacher: bool = False,
) -> Comparison:
    """Evaluate the retrieval of trained runs on held-out tars; write a JSON record per run and gallery, and a report.

    Raises ValueError for runs that are not finished or share a name, for tars or samples that cannot be read, and for a
    LiT run whose teacher's rows for these tars are nowhere to be had.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) != len(names):
        raise ValueError(f"expected at least one run, each folder with a name of its own; got {names}")
    data = evaluation_set(
        [index_tar(path) for path in expand(tars)],
        group_field=settings.group_field,
        part_field=settings.part_field,
        max_captions=settings.max_captions,
    )
    galleries = galleries_of(data)
    models = [TrainedModel.load(path) for path in runs]
    loading = Loading(caches=caches or {}, live_teacher=live_teacher, embeddings=out / "embeddings")
    results = [
        _evaluate(path, model, load_encoder(path, loading), data, galleries, out / "records", settings, live_teacher)
        for path, model in zip(runs, models, strict=True)
    ]
    facts = [caches_of(model.run) for model in models]
    title = f"Retrieval on held-out data: {', '.join(names)}"
    report = render(results, out, title=title, description=_description(data, settings))
    return Comparison(results, galleries, data.skipped, facts, out / "records", report)


def _evaluate(
    path: Path,
    model: TrainedModel,
    encoder: Encoder,
    data: EvaluationSet,
    galleries: Sequence[Gallery],
    records_folder: Path,
    settings: Settings,
    live_teacher: bool,
) -> RunResult:
    started = time.perf_counter()
    records: list[Record] = []
    texts: list[TextExample] = []
    images: list[ImageExample] = []
    for number, gallery in enumerate(galleries):
        began = time.perf_counter()
        image_ND = encoder.images(data, gallery.pictures)
        text_MD = encoder.texts(gallery.captions)
        search = GallerySearch(gallery, image_ND, text_MD, settings.index)
        question = _question(encoder, data, gallery, settings, live_teacher)
        record = _record(question, data, gallery, search, time.perf_counter() - began)
        write_record(record, records_folder)
        records.append(record)
        share = settings.examples // len(galleries) + (number < settings.examples % len(galleries))
        texts += search.text_examples(data, share, settings.seed)
        images += search.image_examples(data, share, settings.seed)
    return RunResult(
        name=path.name,
        method=" + ".join(model.run.terms) + (" on cached rows" if model.sees_cached_rows else ""),
        records=records,
        metrics_file=RunFolder(path).metrics if RunFolder(path).metrics.exists() else None,
        stage_seconds=_stages(path, model, time.perf_counter() - started),
        text_examples=texts,
        image_examples=images,
    )


def _question(
    encoder: Encoder, data: EvaluationSet, gallery: Gallery, settings: Settings, live_teacher: bool
) -> Question:
    facts = encoder.facts
    return Question(
        task="retrieval",
        gallery=gallery.name,
        run=facts.name,
        model=facts.digest,
        step=facts.step,
        tars=tuple(TarRef(tar.name, tar.fingerprint, len(tar.samples)) for tar in data.tars),
        preprocessing=facts.preprocessing,
        precision=facts.precision,
        cache_contract=facts.cache_contract,
        settings={
            "group_field": settings.group_field,
            "part_field": settings.part_field,
            "max_captions": settings.max_captions,
            "index": settings.index,
            "live_teacher": live_teacher,
        },
    )


def _record(question: Question, data: EvaluationSet, gallery: Gallery, search: GallerySearch, seconds: float) -> Record:
    image_hashes = [xxhash.xxh3_64_intdigest(encoded(data, picture)) for picture in gallery.pictures]
    metrics, counts = search.metrics(image_hashes, gallery.captions)
    return Record(
        question=question,
        metrics=metrics,
        counts=counts | {"skipped samples": len(data.skipped)},
        sample_ids=digest(picture.key for picture in gallery.pictures),
        texts=digest(gallery.captions),
        seconds=seconds,
    )


def _stages(path: Path, model: TrainedModel, evaluating: float) -> dict[str, float]:
    """Wall seconds of each stage; building a cache counts in full for each run that reads it."""
    building = [cache.seconds for cache in caches_of(model.run)]
    summary = json.loads(RunFolder(path).summary.read_text())
    stages = {"cache": sum(building)} if building else {}
    return stages | {"training": float(summary["seconds"]), "evaluation": evaluating}


def _description(data: EvaluationSet, settings: Settings) -> str:
    match = f"of one {settings.group_field!r}" if settings.group_field else "of one sample"
    split = f", one gallery per {settings.part_field!r}" if settings.part_field else ""
    skipped = f" {len(data.skipped)} samples could not be read and are left out." if data.skipped else ""
    return (
        f"{len(data.pictures):,} images in {len(data.tars)} tars{split}. An image and a caption match if they are "
        f"{match}; at most {settings.max_captions} captions a sample.{skipped}"
    )

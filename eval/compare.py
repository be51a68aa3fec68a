"""The retrieval evaluation of models: embed, index, rank, record, report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from threetowers.cache.webdataset.tar_index import expand, index_tar
from threetowers.eval.datasets.evaluation_set import EvaluationSet, evaluation_set
from threetowers.eval.datasets.gallery import Gallery, galleries_of
from threetowers.eval.encoders.encoder import Encoder, LoadOptions
from threetowers.eval.encoders.ensemble import Mixing
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.record import EvalRecord, EvalResult, EvalSpec, answered, digest
from threetowers.eval.report.model_metadata import card_of, write_card
from threetowers.eval.report.page import ReportPaths, render
from threetowers.eval.report.results import MODELS, PICTURES, RECORDS, RunResult, load_results
from threetowers.eval.report.tables import NO_VALUE, Table, by_gallery, comparison_table
from threetowers.eval.report.thumbnails import ThumbnailStore
from threetowers.eval.tasks.gallery_search import GallerySearch

STAGES = ["cache", "training", "evaluation"]
EMBEDDINGS = "embeddings"


@dataclass(frozen=True)
class Settings:
    """How an evaluation set is read and searched."""

    group_field: str | None = None
    part_field: str | None = None
    max_captions: int = 5
    index: str = "Flat"
    index_parameters: str = ""
    examples: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Comparison:
    """What came out: one result per model, the records' folder and the report."""

    results: list[RunResult]
    galleries: list[Gallery]
    skipped: list[str]
    records: Path
    report: ReportPaths

    def text(self) -> str:
        """What a terminal shows: the comparison, what was compared, and where the rest is."""
        shown = {gallery.name for gallery in self.galleries}
        counts = [
            f"{record.question.gallery}: {record.counts['images']:,} images, {record.counts['captions']:,} captions, "
            f"{record.counts['groups']:,} groups; duplicates: {record.counts['image_duplicates']} images, "
            f"{record.counts['caption_duplicates']} captions; ids {record.sample_ids[:12]}"
            for record in self.results[0].records
            if record.question.task == "retrieval" and record.question.gallery in shown
        ]
        explained = (
            "A hit at k: a match among the k best; recalls are means over the galleries, in percent; ties count "
            "against the model.\nSeconds of a cache count in full for each run that reads it, though it is built once."
        )
        skipped = [f"{len(self.skipped)} samples left out; the first: {self.skipped[0]}"] if self.skipped else []
        caches = list(dict.fromkeys(str(cache) for result in self.results for cache in result.caches))
        notes = "\n".join([explained, *caches, *counts, *skipped])
        return "\n\n".join([self._table().text(), notes, f"report: {self.report.html}"])

    def _table(self) -> Table:
        """One row a model: recalls, median ranks, seconds of each stage, bytes and rate of its caches."""
        runs = [by_gallery(result.name, result.method, result.records) for result in self.results]
        table = comparison_table(runs, [gallery.name for gallery in self.galleries])
        assert table is not None  # every model was evaluated on every gallery
        stages = sorted({stage for result in self.results for stage in result.stage_seconds}, key=STAGES.index)
        seconds = {
            number: [f"{result.stage_seconds[s]:.0f}" if s in result.stage_seconds else NO_VALUE for s in stages]
            for number, result in enumerate(self.results)
        }
        costs = {}
        for number, result in enumerate(self.results):
            size, samples, took = (
                sum(getattr(c, name) for c in result.caches) for name in ("bytes", "samples", "seconds")
            )
            costs[number] = [f"{size / 1e6:.1f}", f"{samples / took:.0f}"] if took else [NO_VALUE, NO_VALUE]
        return table.widened("Seconds", stages, seconds).widened("Cache", ["MB", "img/s"], costs)


def compare(
    models: Sequence[str | Path],
    tars: Sequence[str],
    out: Path,
    settings: Settings,
    *,
    loading: LoadOptions | None = None,
    mixings: Sequence[Mixing] = (),
    again: bool = False,
) -> Comparison:
    """Evaluate the retrieval of models on held-out tars; write a JSON record per model and gallery, and a report.

    What `out` already answers is not computed again, unless `again`. With `mixings`, a model with such a third tower is
    evaluated once more for each. Raises ValueError for models that cannot be loaded, see no text or share a name, for
    tars or samples that cannot be read, and for a LiT run whose teacher's rows for these tars are nowhere to be had.
    """
    data = evaluation_set(
        [index_tar(path) for path in expand(tars)],
        group_field=settings.group_field,
        part_field=settings.part_field,
        max_captions=settings.max_captions,
    )
    galleries = galleries_of(data)
    loading = replace(loading or LoadOptions(), embeddings=out / EMBEDDINGS)
    encoders = [
        (spec, load_encoder(spec, loading, mixing)) for spec in models for mixing in (None, *mixings)
    ]  # all before the long work, so that the last cannot fail it
    names = [encoder.facts.name for _, encoder in encoders]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one run, each folder with a name of its own; got {names}")
    if blind := [encoder.facts.name for _, encoder in encoders if not encoder.sees_text]:
        raise ValueError(
            f"{blind} see images only: retrieval between images and captions needs a text tower; leave out"
        )
    answers = []
    for spec, encoder in encoders:
        write_card(card_of(spec, encoder), out / MODELS)
        for number, gallery in enumerate(galleries):
            share = settings.examples // len(galleries) + (number < settings.examples % len(galleries))
            answers.append(_answer(encoder, data, gallery, replace(settings, examples=share), loading, out, again))
    results = load_results([out], names, answers)
    title = f"Retrieval on held-out data: {', '.join(names)}"
    report = render(results, out, title=title, description=_description(data, settings))
    return Comparison(results, galleries, data.skipped, out / RECORDS, report)


def _answer(
    encoder: Encoder,
    data: EvaluationSet,
    gallery: Gallery,
    settings: Settings,
    loading: LoadOptions,
    out: Path,
    again: bool,
) -> EvalRecord:
    def compute() -> EvalResult:
        image_ND = encoder.images(data, gallery.pictures)
        search = GallerySearch(
            gallery, image_ND, encoder.texts(gallery.captions), settings.index, settings.index_parameters
        )
        answer = search.answer(data, ThumbnailStore(out / PICTURES), settings.examples, settings.seed)
        return replace(answer, counts={**answer.counts, "skipped samples": len(data.skipped)})

    asked = asdict(settings) | {"live_teacher": loading.live_teacher}
    return answered(
        EvalSpec.of("retrieval", gallery.name, encoder.facts, data.tars, asked),
        encoder.facts,
        out / RECORDS,
        compute,
        sample_ids=digest(picture.key for picture in gallery.pictures),
        texts=digest(gallery.captions),
        again=again,
    )


def _description(data: EvaluationSet, settings: Settings) -> str:
    match = f"of one {settings.group_field!r}" if settings.group_field else "of one sample"
    split = f", one gallery per {settings.part_field!r}" if settings.part_field else ""
    skipped = f" {len(data.skipped)} samples could not be read and are left out." if data.skipped else ""
    return (
        f"{len(data.pictures):,} images in {len(data.tars)} tars{split}. An image and a caption match if they are "
        f"{match}; at most {settings.max_captions} captions a sample.{skipped}"
    )

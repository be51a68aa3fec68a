"""The commands of `threetowers eval`: typed functions, whose flags and help come from their signatures.

Heavy modules are imported inside the functions, so that `threetowers --help` is quick.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.tar_list import OnBad

if TYPE_CHECKING:
    from threetowers.eval.encoders.encoder import LoadOptions
    from threetowers.eval.encoders.ensemble import EnsembleOptions

Tars = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAR...")]
Captions = Annotated[tuple[str, ...], tyro.conf.arg(metavar="SOURCE...")]
Datasets = Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATASET...")]


@dataclass(frozen=True)
class EvalFlags:
    """The flags of every command that evaluates models.

    Attributes:
        models: A run or export folder or its URL, a frozen encoder KIND:NAME[@SIZE][:WEIGHTS], as
            open_clip:ViT-B-32:openai, or cache:PATH.
        output_dir: Folder for report.html, report.md, records/ and embeddings/; what is recorded there is not computed
            again.
        ensemble: TOWER=WEIGHT[,WEIGHT...]: evaluate each run also with its third tower's image embedding mixed in by
            that weight, as in third=0.1,0.3,0.5.
        ensemble_space: Mix embeddings, or logits: then captions are compared with the third tower by their own head.
        cache: TOWER=PATH of a cache with the images, or with the captions, for runs with a cached tower (as LiT).
        live_teacher: For such runs, compute the rows of other towers by the teacher itself, and those of class names,
            prompts and queries.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one.
        precision: Of the towers; mixed: float32 weights, products in bfloat16. By default that in which a run was
            trained, float32 for other models.
        runtime: What runs the image side of frozen encoders: torch, or onnx (an extra of that name; on the CPU).
        workers: Processes that read and decode images; 0: none.
        max_pixels: Images with more pixels are left out, a protection against decompression bombs.
        on_bad: What is done with what cannot be read. error: stop at the first; skip: leave out such samples, and
            count them beside every number; skip_tars: leave out whole tars that cannot be read, too. By default what
            the data set says, else skip.
        overwrite: Compute what is already recorded, too.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    output_dir: Path
    ensemble: tuple[str, ...] = ()
    ensemble_space: Literal["embedding", "logit"] = "embedding"
    cache: tuple[str, ...] = ()
    live_teacher: bool = False
    device: str = "auto"
    precision: Literal["float32", "mixed", "bfloat16", "float16"] | None = None
    runtime: Literal["torch", "onnx"] = "torch"
    workers: int = 1
    max_pixels: int = MAX_PIXELS
    on_bad: OnBad | None = None
    overwrite: bool = False

    def load_options(self) -> "LoadOptions":
        """Return how the models are loaded."""
        from threetowers.eval.encoders.encoder import LoadOptions

        return LoadOptions(
            caches=parse_caches(self.cache),
            live_teacher=self.live_teacher,
            device=self.device,
            precision=self.precision,
            runtime=self.runtime,
            workers=self.workers,
            max_pixels=self.max_pixels,
        )


Flags = Annotated[EvalFlags, tyro.conf.arg(name="")]


def retrieval(
    flags: Flags,
    tars: Tars,
    group_field: str | None = None,
    gallery_field: str | None = None,
    captions: Captions = (),
    caption_per_line: bool = False,
    image_member: str | None = None,
    max_captions: int | None = 5,
    duplicate_captions: Literal["once", "each"] = "once",
    index: str = "Flat",
    index_parameters: str = "",
    examples: int = 6,
    seed: int = 0,
) -> int:
    """Compare models by image-text retrieval on held-out tars. Exit code 1 if a part of it could not be done.

    `--max-captions None --duplicate-captions each` is clip-benchmark's protocol.

    Args:
        tars: Held-out tars, globs or brace ranges.
        group_field: JSON field of the group of an image; images and captions of one group match. Without it, a caption
            matches its own image only.
        gallery_field: JSON field that splits the images into galleries, such as an art style.
        captions: Sources of captions, in order: the extension of a text member (txt, cap), or json.FIELD. All captions
            of all of them count. By default those of the first of txt, json.captions, json.caption that has some.
        caption_per_line: Take each line of a text member as a caption; by default the member is one caption.
        image_member: The member that is the image of a sample, by its extension, as jpg or left.jpg; by default its
            only image.
        max_captions: Captions used per sample, the first ones; None: all.
        duplicate_captions: Equal captions of one image or group: search for each text once, or for each caption.
        index: FAISS factory string of the index that is searched; the recalls in the table are exact in any case.
        index_parameters: Its search parameters, such as nprobe=16.
        examples: Queries of each kind that the report shows.
        seed: Of the choice of examples.
    """
    from threetowers.cache.webdataset.captions import CaptionFormat
    from threetowers.eval.datasets.dataset_config import DatasetConfig
    from threetowers.eval.suite import evaluate
    from threetowers.eval.tasks.settings import RetrievalSettings, TasksConfig
    from threetowers.eval.terminal import retrieval_text

    settings = RetrievalSettings(
        group_field=group_field,
        gallery_field=gallery_field,
        max_captions=max_captions,
        duplicate_captions=duplicate_captions,
        index=index,
        index_parameters=index_parameters,
        examples=examples,
        seed=seed,
    )
    dataset = DatasetConfig(
        name="" if gallery_field else "all",  # galleries are named by the values of their field alone
        tars=list(tars),
        captions=dict(CaptionFormat.parse(captions).sources),
        caption_per_line=caption_per_line,
        image_member=image_member,
        tasks=TasksConfig(retrieval=settings),
    )
    result = evaluate(
        flags.models,
        [dataset],
        flags.output_dir,
        options=flags.load_options(),
        ensembles=parse_ensembles(flags.ensemble, flags.ensemble_space),
        title="Retrieval on held-out data",
        overwrite=flags.overwrite,
        on_bad=flags.on_bad,
    )
    print(retrieval_text(result))
    return result.exit_code


def search(
    model: tyro.conf.Positional[str],
    tars: Tars,
    query: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...")],
    output_dir: Path | None = None,
    k: int | None = None,
    index: str = "Flat",
    index_parameters: str = "",
    cache: tuple[str, ...] = (),
    live_teacher: bool = False,
    device: str = "auto",
    workers: int = 1,
    image_member: str | None = None,
    max_pixels: int = MAX_PIXELS,
    on_bad: OnBad = "skip",
    image_width: int = 0,
    captions: Captions = (),
    caption_per_line: bool = False,
) -> None:
    """Search images by free text: prints keys, scores and captions, and writes a page.

    Args:
        model: The folder of a run or an export, or a frozen encoder of images and text.
        tars: The gallery: tars, globs or brace ranges. Its images need no captions.
        query: Texts to search for.
        output_dir: Folder for search.html and the gallery's embeddings, which are then computed once. Without it,
            nothing is written.
        k: Images per query; by default ten, or all if there are fewer.
        index: FAISS factory string; Flat searches exactly.
        index_parameters: Its search parameters, such as nprobe=16.
        cache: TOWER=PATH of a cache with the images, for a run with a cached tower (as LiT).
        live_teacher: For such a run, compute rows by the teacher itself, as those of the queries.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one.
        workers: Processes that read and decode images; 0: none.
        image_member: The member that is the image of a sample, by its extension, as jpg or left.jpg; by default its
            only image.
        max_pixels: Images with more pixels are left out, a protection against decompression bombs.
        on_bad: What is done with what cannot be read. error: stop at the first; skip: leave out such samples, and say
            so; skip_tars: leave out whole tars that cannot be read, too.
        image_width: Draw each image in the terminal, that many characters wide (24-bit colour); 0: do not.
        captions: Sources of the captions that are shown, as in `eval retrieval`.
        caption_per_line: Take each line of a text member as a caption.
    """
    from threetowers.cache.webdataset.captions import CaptionFormat
    from threetowers.eval.datasets.image_set import ImageReader
    from threetowers.eval.encoders.encoder import LoadOptions
    from threetowers.eval.encoders.load import check_options, load_encoder
    from threetowers.eval.search.search import find
    from threetowers.eval.suite import EMBEDDINGS_FOLDER

    options = LoadOptions(
        caches=parse_caches(cache),
        live_teacher=live_teacher,
        device=device,
        workers=workers,
        max_pixels=max_pixels,
        embeddings=None if output_dir is None else output_dir / EMBEDDINGS_FOLDER,
    )
    encoder = load_encoder(model, options)
    check_options([encoder], options)
    gallery = ImageReader(max_pixels).read(
        tars, CaptionFormat.parse(captions, caption_per_line), image_member=image_member, on_bad=on_bad
    )
    findings = find(encoder, gallery, query, k, index=index, parameters=index_parameters)
    print(findings.text(image_width))
    if output_dir is not None:
        print(f"page: {findings.write(output_dir)}")


def compare(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    output_dir: Path | None = None,
    models: tuple[str, ...] = (),
    title: str = "Evaluation",
) -> None:
    """Render a report from the records of earlier evaluations alone: Markdown here, and a page with plots.

    Args:
        folders: Folders that other `eval` commands wrote.
        output_dir: Folder for report.html and report.md; by default the first of them.
        models: Only these, in this order, by their names in the records.
        title: Of the page.
    """
    from threetowers.eval.compare import compare

    report = compare(folders, output_dir, models, title)
    print(report.markdown.read_text(encoding="utf-8"))
    print(f"report: {report.html}")


def suite(flags: Flags, datasets: Datasets, tasks: tuple[str, ...] = ()) -> int:
    """Run every task that the data sets name, for every model. Exit code 1 if one of them could not be done.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
        tasks: Only these: retrieval, zeroshot, fewshot, probe, knn, shift, ood.
    """
    from threetowers.eval.suite import evaluate
    from threetowers.eval.terminal import suite_text

    result = evaluate(
        flags.models,
        datasets,
        flags.output_dir,
        tasks=tasks or None,
        options=flags.load_options(),
        ensembles=parse_ensembles(flags.ensemble, flags.ensemble_space),
        overwrite=flags.overwrite,
        on_bad=flags.on_bad,
    )
    print(suite_text(result))
    return result.exit_code


def zeroshot(flags: Flags, datasets: Datasets) -> int:
    """Classify images by the nearest class name, each name a mean of prompts.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
    """
    return suite(flags, datasets, ("zeroshot",))


def fewshot(flags: Flags, datasets: Datasets) -> int:
    """Fit ridge probes on 1, 5, 10 and 25 images per class, by big_vision's protocol.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
    """
    return suite(flags, datasets, ("fewshot",))


def probe(flags: Flags, datasets: Datasets) -> int:
    """Fit a logistic probe on all training images, its penalty chosen on some of them.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
    """
    return suite(flags, datasets, ("probe",))


def knn(flags: Flags, datasets: Datasets) -> int:
    """Classify images by their nearest training images.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
    """
    return suite(flags, datasets, ("knn",))


def shift(flags: Flags, datasets: Datasets) -> int:
    """Compare accuracy or retrieval on shifted versions of a data set with the original.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
    """
    return suite(flags, datasets, ("shift",))


def ood(flags: Flags, datasets: Datasets) -> int:
    """Tell the images of a data set from outliers.

    Args:
        datasets: Configs of data sets (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
    """
    return suite(flags, datasets, ("ood",))


def parse_ensembles(items: Sequence[str], space: Literal["embedding", "logit"]) -> "list[EnsembleOptions]":
    """Parse TOWER=WEIGHT[,WEIGHT...]. Raises ValueError for anything else."""
    from threetowers.eval.encoders.ensemble import EnsembleOptions

    ensembles = []
    for item in items:
        tower, _, weights = item.partition("=")
        try:
            numbers = [float(weight) for weight in weights.split(",")]
        except ValueError as error:
            raise ValueError(f"--ensemble {item!r}: expected TOWER=WEIGHT[,WEIGHT...], as in third=0.1,0.3") from error
        ensembles += [EnsembleOptions(tower, weight, space) for weight in numbers]
    return ensembles


def parse_caches(items: Sequence[str]) -> dict[str, str]:
    """Parse TOWER=PATH or URL. Raises ValueError for anything else, and for a tower that is given twice."""
    caches: dict[str, str] = {}
    for item in items:
        tower, sign, path = item.partition("=")
        if not sign:
            raise ValueError(f"--cache {item!r}: expected TOWER=PATH, as in third=runs/heldout-cache")
        if tower in caches:
            raise ValueError(f"--cache {item!r}: {tower!r} is given twice, first as {caches[tower]}; give it once")
        caches[tower] = path
    return caches

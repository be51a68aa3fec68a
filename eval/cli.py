"""The commands of `threetowers eval`: typed functions, whose flags and help come from their signatures.

What is heavy is imported where it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from threetowers.eval.encoders.ensemble import Mixing

Tars = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAR...")]


def retrieval(
    runs: tyro.conf.Positional[tuple[str, ...]],
    tars: Tars,
    out: Path,
    group_field: str | None = None,
    part_field: str | None = None,
    max_captions: int = 5,
    index: str = "Flat",
    index_parameters: str = "",
    mix: tuple[str, ...] = (),
    mix_space: Literal["embedding", "logit"] = "embedding",
    cache: tuple[str, ...] = (),
    live_teacher: bool = False,
    device: str = "auto",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    workers: int = 1,
    examples: int = 6,
    again: bool = False,
) -> None:
    """Compare models by image-text retrieval on held-out tars: a table here, records and a report in OUT.

    Args:
        runs: Folders of finished runs or exports, or open_clip:NAME[:WEIGHTS].
        tars: Held-out tars, globs or brace ranges.
        out: Folder for report.html, report.md, records/ and embeddings/; what it answers already is not computed again.
        group_field: JSON field naming what an image shows; captions match images of the same. Without it, a caption
            matches its own image only.
        part_field: JSON field that splits the set into galleries, such as an art style.
        max_captions: Captions used per sample, the first ones.
        index: FAISS factory string of the index that is searched; the recalls in the table are exact in any case.
        index_parameters: Its search settings, such as nprobe=16.
        mix: TOWER=SHARE[,SHARE...]: evaluate each run also with that share of its third tower's image embedding mixed
            in, as in third=0.1,0.3,0.5.
        mix_space: Mix embeddings, or logits: then captions are compared with the third tower by their own head.
        cache: TOWER=PATH of a cache with the held-out images, for runs whose image tower is a cached teacher (LiT).
        live_teacher: For such runs, compute the held-out images' embeddings by the teacher itself.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one.
        precision: Of the towers.
        workers: Processes that read and decode images; 0: none.
        examples: Queries of each kind that the report shows.
        again: Compute what is already recorded, too.
    """
    from threetowers.eval.compare import Settings, compare
    from threetowers.eval.encoders.encoder import LoadOptions

    loading = LoadOptions(caches_of(cache), live_teacher, device, precision, workers=workers)
    settings = Settings(group_field, part_field, max_captions, index, index_parameters, examples)
    mixings = mixings_of(mix, mix_space)
    print(compare(runs, tars, out, settings, loading=loading, mixings=mixings, again=again).text())


def search(
    model: tyro.conf.Positional[str],
    tars: Tars,
    query: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...")],
    out: Path | None = None,
    k: int = 10,
    index: str = "Flat",
    index_parameters: str = "",
    cache: tuple[str, ...] = (),
    live_teacher: bool = False,
    device: str = "auto",
    workers: int = 1,
    pictures: int = 0,
) -> None:
    """Answer free text with pictures: keys, scores and captions here, and a page in OUT.

    Args:
        model: The folder of a run or an export, or open_clip:NAME[:WEIGHTS].
        tars: The gallery: tars, globs or brace ranges. Its pictures need no captions.
        query: Texts to search for.
        out: Folder for search.html and the gallery's embeddings, which are then computed once. Without it, nothing is
            written.
        k: Pictures a query.
        index: FAISS factory string; Flat searches exactly.
        index_parameters: Its search settings, such as nprobe=16.
        cache: TOWER=PATH of a cache with the images, for a run whose image tower is a cached teacher (LiT).
        live_teacher: For such a run, compute the images' embeddings by the teacher itself.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one.
        workers: Processes that read and decode images; 0: none.
        pictures: Draw each picture in the terminal, that many characters wide (24-bit colour); 0: do not.
    """
    from threetowers.cache.webdataset.tar_index import expand, index_tar
    from threetowers.eval.datasets.evaluation_set import evaluation_set
    from threetowers.eval.encoders.encoder import LoadOptions
    from threetowers.eval.encoders.load import load_encoder
    from threetowers.eval.search.search import find

    embeddings = None if out is None else out / "embeddings"
    loading = LoadOptions(caches_of(cache), live_teacher, device, workers=workers, embeddings=embeddings)
    encoder = load_encoder(model, loading)
    data = evaluation_set(
        [index_tar(path) for path in expand(tars)],
        group_field=None,
        part_field=None,
        max_captions=5,
        captions_needed=False,
    )
    results = find(encoder, data, query, k, index=index, parameters=index_parameters)
    print(results.text(pictures))
    if out is not None:
        print(f"page: {results.write(out)}")


def compare(
    outs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    models: tuple[str, ...] = (),
    title: str = "Evaluation",
) -> None:
    """Render a report from the records of earlier evaluations alone: Markdown here, and a page with plots.

    Args:
        outs: Folders that other `eval` commands wrote.
        out: Folder for report.html and report.md; by default the first of them.
        models: Only these, in this order, by the names that the records give them.
        title: Of the page.
    """
    from threetowers.eval.report.page import render
    from threetowers.eval.report.results import load_results

    if not outs:
        raise ValueError("expected at least one folder that an `eval` command wrote with --out")
    paths = render(load_results(outs, models), out or outs[0], title=title)
    print(paths.markdown.read_text(encoding="utf-8"))
    print(f"report: {paths.html}")


def mixings_of(items: Sequence[str], space: Literal["embedding", "logit"]) -> "list[Mixing]":
    """Parse TOWER=SHARE[,SHARE...]. Raises ValueError for anything else."""
    from threetowers.eval.encoders.ensemble import Mixing

    mixings = []
    for item in items:
        tower, _, shares = item.partition("=")
        try:
            numbers = [float(share) for share in shares.split(",")]
        except ValueError as error:
            raise ValueError(f"--mix {item!r}: expected TOWER=SHARE[,SHARE...], as in third=0.1,0.3") from error
        mixings += [Mixing(tower, share, space) for share in numbers]
    return mixings


def caches_of(items: Sequence[str]) -> dict[str, Path]:
    """Parse TOWER=PATH. Raises ValueError for anything else."""
    caches = {}
    for item in items:
        tower, sign, path = item.partition("=")
        if not sign:
            raise ValueError(f"--cache {item!r}: expected TOWER=PATH, as in third=runs/heldout-cache")
        caches[tower] = Path(path)
    return caches


@dataclass(frozen=True)
class Described:
    """What the commands on described data sets share.

    Attributes:
        models: A run or export folder, open_clip:NAME[:WEIGHTS], timm:NAME[:WEIGHTS] or cache:PATH.
        sets: Descriptions (YAML), or folders or URLs in CLIP_benchmark's webdataset layout.
        out: Folder for records/ and embeddings/; what is there already is not computed again.
        cache: TOWER=PATH of a cache with the pictures, for models whose image tower is a cached teacher (LiT).
        live_teacher: For such models, compute the pictures' embeddings by the teacher itself.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one.
        precision: Of the towers.
        workers: Processes that read and decode pictures; 0: none.
        again: Compute what is already recorded, too.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    sets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SET...")]
    out: Path
    cache: tuple[str, ...] = ()
    live_teacher: bool = False
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    workers: int = 1
    again: bool = False


Flags = Annotated[Described, tyro.conf.arg(name="")]


def suite(flags: Flags, tasks: tuple[str, ...] = ()) -> None:
    """Run every task that the data sets' descriptions name, for every model.

    Args:
        tasks: Only these: retrieval, zeroshot, fewshot, probe, knn, shift, ood.
    """
    from threetowers.eval.encoders.encoder import LoadOptions
    from threetowers.eval.suite import run_suite

    loading = LoadOptions(
        caches=caches_of(flags.cache),
        live_teacher=flags.live_teacher,
        device=flags.device,
        precision=flags.precision,
        workers=flags.workers,
        embeddings=flags.out / "embeddings",
    )
    print(
        run_suite(flags.models, flags.sets, flags.out, tasks=tasks or None, loading=loading, again=flags.again).text()
    )


def zeroshot(flags: Flags) -> None:
    """Classify pictures by the nearest class name, each name a mean of prompts."""
    suite(flags, ("zeroshot",))


def fewshot(flags: Flags) -> None:
    """Fit ridge probes on 1, 5, 10 and 25 pictures a class, by big_vision's protocol."""
    suite(flags, ("fewshot",))


def probe(flags: Flags) -> None:
    """Fit a logistic probe on all training pictures, its penalty chosen on some of them."""
    suite(flags, ("probe",))


def knn(flags: Flags) -> None:
    """Classify pictures by their nearest training pictures."""
    suite(flags, ("knn",))


def shift(flags: Flags) -> None:
    """Compare accuracy or retrieval on shifted versions of a set with the original."""
    suite(flags, ("shift",))


def ood(flags: Flags) -> None:
    """Tell the pictures of a set from those of outlier sets."""
    suite(flags, ("ood",))

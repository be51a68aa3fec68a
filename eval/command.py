"""The commands of `threetowers eval`: typed functions, whose flags and help come from their signatures.

What is heavy is imported where it runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Tars = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TAR...")]


def retrieval(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    tars: Tars,
    out: Path,
    group_field: str | None = None,
    part_field: str | None = None,
    max_captions: int = 5,
    index: str = "Flat",
    cache: tuple[str, ...] = (),
    live_teacher: bool = False,
    examples: int = 6,
) -> None:
    """Compare trained runs by image-text retrieval on held-out tars: a table here, records and a report in OUT.

    Args:
        runs: Folders of finished runs.
        tars: Held-out tars, globs or brace ranges.
        out: Folder for report.html, report.md and records/.
        group_field: JSON field naming what an image shows; captions match images of the same. Without it, a caption
            matches its own image only.
        part_field: JSON field that splits the set into galleries, such as an art style.
        max_captions: Captions used per sample, the first ones.
        index: FAISS factory string of the index that is searched; the recalls in the table are exact in any case.
        cache: TOWER=PATH of a cache with the held-out images, for runs whose image tower is a cached teacher (LiT).
        live_teacher: For such runs, compute the held-out images' embeddings by the teacher itself.
        examples: Queries of each kind that the report shows.
    """
    from threetowers.eval.compare import Settings, compare

    settings = Settings(group_field, part_field, max_captions, index, examples)
    print(compare(runs, tars, out, settings, caches=caches_of(cache), live_teacher=live_teacher).text())


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
    from threetowers.eval.encoder import Loading
    from threetowers.eval.suite import run_suite

    loading = Loading(
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

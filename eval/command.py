"""The commands of `threetowers eval`: typed functions, whose flags and help come from their signatures.

What is heavy is imported where it runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

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

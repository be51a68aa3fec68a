"""The cache commands, as plain functions: their parameters are the flags, their results the exit codes."""

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from threetowers.cache.builder.build_config import BuildConfig, EmbeddingConfig, EncoderConfig
from threetowers.cache.exchange.import_config import ImportConfig
from threetowers.cache.info import bad_sample_lines, counts_text, note_lines, read_info
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.cache.webdataset.tar_list import OnBad

if TYPE_CHECKING:
    from threetowers.cache.builder.build_report import BuildReport

FLAGS = tyro.conf.arg(name="")  # the fields of a config are flags without a prefix


def build(config: Annotated[BuildConfig, FLAGS]) -> int:
    """Embed the samples of webdataset tars by frozen encoders, once. Run it again to resume after an interruption.

    Under torchrun, deepspeed, mpirun or srun the processes share the tars; more processes may join at any time. With
    several encoders, each with its output, each image is read and decoded once for all.
    """
    from dataclasses import replace

    from threetowers.cache.builder.build import build_caches

    for report in build_caches(replace(config, progress=True)):
        _print_build(report)
    return 0


def _print_build(report: "BuildReport") -> None:
    prefix = f"rank {report.world.rank} of {report.world.size}: " if report.world.size > 1 else ""
    embedded = "embedded"
    done, unit = report.samples, "img"
    if report.of == "text":
        embedded = (
            f"embedded with {report.captions} captions, of which the encoder read {report.different_captions} "
            "(equal ones of a tar once)"
        )
        done, unit = report.captions, "captions"
    rate = done / report.seconds if report.seconds else 0.0
    left = f", {report.tars_left} taken over by other workers" if report.tars_left else ""
    print(f"{prefix}{report.storage}: {report.tars_built} tars built, {report.tars_kept} already finished{left}")
    print(
        f"{prefix}{report.samples} samples: {report.ok} {embedded}, {counts_text(report.counts)}; "
        f"{report.seconds:.1f} s including start-up, {rate:.1f} {unit}/s, {report.bytes / 1e6:.1f} MB written"
    )
    if report.tars_built:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in report.shares.items())
        print(f"{prefix}time by stage: {shares}; the first is the bottleneck")
    for line in (*note_lines(report.notes, report.ignored), *bad_sample_lines(report.bad, sum(report.counts.values()))):
        print(line)
    for line in report.left_out.notes():
        print(line)
    for line in report.differences:
        print(f"note: {line} (expected: when the cache was created; found: now)")


def info(cache: tyro.conf.Positional[str]) -> int:
    """Show what a cache holds and how much of it is built. Exit code 1 while it is incomplete.

    Args:
        cache: Folder or URL of the cache.
    """
    found = read_info(cache)
    print(found.text())
    return 1 if found.missing else 0


def verify(
    cache: tyro.conf.Positional[str],
    tars: list[str] | None = None,
    depth: Literal["metadata", "values", "recompute"] = "values",
    check_contents: bool = False,
    sample: int = 64,
    seed: int = 0,
    min_cosine: float | None = None,
    weights: str | None = None,
    device: str = "cpu",
    max_pixels: int = MAX_PIXELS,
    on_bad: OnBad = "skip",
    fix: bool = False,
    json: Path | None = None,
) -> int:
    """Check a cache for damage. Exit code 1 if it has problems, even if --fix has removed them.

    Args:
        cache: Folder or URL of the cache.
        tars: Compare with these tars: paths, globs in quotes, brace ranges.
        depth: metadata: files and records; values: every row too; recompute: a sample too, embedded again.
        check_contents: Compare every image or caption of these tars with the embedded one, not only the headers.
        sample: Images or captions that recompute embeds.
        seed: Seed of that sample.
        min_cosine: Bound on the cosines that recompute finds; default: a little below that of the dtype.
        weights: Path of the teacher's weights, if they came from a file.
        device: Device of the teacher.
        max_pixels: Largest width x height of an image that recompute decodes; as the build's.
        on_bad: skip_tars passes over tars that cannot be used; otherwise they are problems.
        fix: Remove the rows of tars with a problem, so that the next build writes them again.
        json: Write the report to this file too.
    """
    from threetowers.cache.verify.verify import verify as run

    report = run(
        cache,
        tars,
        depth=depth,
        check_contents=check_contents,
        sample=sample,
        seed=seed,
        min_cosine=min_cosine,
        weights=weights,
        device=device,
        max_pixels=max_pixels,
        on_bad=on_bad,
        fix=fix,
    )
    print(report.text())
    _write_json(json, report.as_dict())
    return 0 if report.ok else 1


def remap(
    old: tyro.conf.Positional[str],
    new: tyro.conf.Positional[str],
    tars: list[str],
    missing: Literal["error", "filtered", "build"] = "error",
    image_member: str | None = None,
    on_bad: OnBad = "skip",
) -> int:
    """Carry the rows of a cache over to other tars of the same samples, by key and image or caption, without a teacher.

    Args:
        old: Folder or URL of the cache that has the rows.
        new: Folder or URL of the cache to create.
        tars: The tars as they are now: split, merged, filtered or downloaded again. Paths, globs, brace ranges.
        missing: Samples without a row in the old cache: error stops, filtered continues without them, build leaves
            their tars to `cache build`.
        image_member: The member of these tars that is the image of a sample, by its extension; default: as in the old
            cache.
        on_bad: error stops at a sample without a usable image, or a bad tar; skip gives such samples their status;
            skip_tars also leaves bad tars out.
    """
    from threetowers.cache.remap.remap import remap as run

    print(run(old, new, tars, missing=missing, image_member=image_member, on_bad=on_bad).text())
    return 0


def import_(config: Annotated[ImportConfig, FLAGS]) -> int:
    """Make a cache of embeddings that another tool has computed, joined to the samples of tars. Run again to resume.

    Images are found by the keys of their samples, captions by their words. Samples without a row and rows without a
    sample are counted.
    """
    from threetowers.cache.exchange.importer import import_cache

    print(import_cache(config).text())
    return 0


def export(
    cache: tyro.conf.Positional[str],
    output_dir: Path,
    tars: list[str] | None = None,
    view: int = 0,
    dtype: Literal["float16", "float32"] = "float16",
    rows_per_part: int = 1_000_000,
) -> int:
    """Write a cache as .npy matrices and Parquet tables in the layout of clip-retrieval.

    Args:
        cache: Folder or URL of the cache.
        output_dir: New folder.
        tars: Where the tars are now, which have the keys and captions; default: where they were embedded.
        view: Which view of the images.
        dtype: Of the matrices.
        rows_per_part: Rows of all parts but the last.
    """
    from threetowers.cache.exchange.exporter import export_cache

    print(export_cache(cache, output_dir, tars, view=view, dtype=dtype, rows_per_part=rows_per_part).text())
    return 0


def estimate(
    config: Annotated[EmbeddingConfig, FLAGS],
    ranks: int = 1,
    sample: int = 256,
    seed: int = 0,
    images: tuple[int, ...] = (),
    json: Path | None = None,
) -> int:
    """Estimate the cost of a cache: bytes, files, hours, and after how many epochs it pays off.

    A sample of the images or captions is built in a temporary folder to measure the rates.

    Args:
        ranks: Processes that would share the work, each as fast as this one.
        sample: Samples to measure on.
        seed: Seed of that sample.
        images: Print the estimate for this many samples too, in tars of the same size.
        json: Write the estimate to this file too.
    """
    from threetowers.cache.estimate.estimate import estimate as run

    found = run(config, ranks=ranks, sample=sample, seed=seed)
    estimates = [found] + [found.scaled(n) for n in images]
    print("\n\n".join(each.text() for each in estimates))
    _write_json(json, found.as_dict())
    return 0


def measure_views(
    config: Annotated[EncoderConfig, FLAGS],
    crop_scales: tuple[float, ...] = (0.9, 0.6, 0.35, 0.1),
    view_augment: str = "none",
    sample: int = 256,
    draws: int = 2,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Measure how far training augmentations move embeddings: is the center view enough, or are crops needed?

    Args:
        crop_scales: Values of a run's data.crop_scale to try.
        view_augment: randaugment:OPS:MAGNITUDE, to try the same crops augmented too.
        sample: Images to measure on.
        draws: Random crops per image.
        seed: Seed of sample and crops.
        json: Write the table to this file too.
    """
    from threetowers.cache.measure_views import measure_views as run

    found = run(config, crop_scales=crop_scales, view_augment=view_augment, sample=sample, draws=draws, seed=seed)
    print(found.text())
    _write_json(json, found.as_dict())
    return 0


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(dumps(content, indent=1) + "\n")

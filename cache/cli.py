"""The cache commands, as plain functions: their signatures are the flags, their results the exit codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from threetowers.cache.format.done_record import DoneRecord, RejectedSample, read_done_record
from threetowers.cache.format.dtypes import Tier
from threetowers.cache.format.manifest import ManifestError, read_manifest
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.format.views import Views
from threetowers.cache.storage.storage import open_storage

if TYPE_CHECKING:
    from threetowers.cache.builder.build import BuildReport


def build(
    tars: list[str],
    out: list[str],
    backbone: list[str],
    weights: list[str] | None = None,
    image_size: list[int] | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    dtype: Tier = "float16",
    min_cosine: float | None = None,
    views: str = "center",
    view_seed: int = 0,
    view_scale: float = 1.0,
    slot: int | None = None,
    device: str | None = None,
    compute: Literal["float32", "bfloat16"] = "float32",
    decode: Literal["pillow", "pillow-draft"] = "pillow",
    compile: bool = False,
    on_bad: Literal["record", "error"] = "record",
    stale_seconds: float = 120,
) -> int:
    """Embed the images of webdataset tars with timm backbones, once. Run it again to go on after an interruption.

    Under torchrun, deepspeed, mpirun or srun the tars are dealt out to the processes; more processes may join at any
    time. With several backbones each picture is read and decoded once for all.

    Args:
        tars: Paths or URLs, globs in quotes, and brace ranges like 'data/{000..099}.tar'. More tars may be added later.
        out: Folder or URL of the cache, one for each backbone; made if it is not there.
        backbone: Names of timm models.
        weights: For each backbone: 'pretrained' (the default), a .safetensors or .pth file, or
            package:efficientnet-lite0 (also 1, 2).
        image_size: Side of the teacher's input in pixels, for each backbone; default: what the model was trained for.
        batch_size: Images a forward pass.
        threads: Threads that decode and resize; default: this process's share of the cores.
        dtype: Type of the stored numbers: float16, float32, bfloat16, or int8 with a scale per row.
        min_cosine: Stop where storing a row leaves a smaller cosine with itself; default: a bound for each type.
        views: center (the teacher's own transform), center+flip, or crops:K.
        view_seed: Which crops.
        view_scale: Smallest share of the picture's area in a crop, as data.crop_scale of a run.
        slot: Rows kept for a tar; default: what the largest tar needs. More leaves room for larger tars later.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        compute: Numbers of the forward pass; bfloat16 is faster on GPUs that have it.
        decode: pillow-draft decodes large JPEGs at a fraction of their size: faster, not exact.
        compile: Run the backbone through torch.compile.
        on_bad: What to do about an image without an embedding: record it and go on, or stop with an error.
        stale_seconds: How long the tar of a process that fell silent is left to it.
    """
    from threetowers.cache.builder.build import CacheSpec, build_all
    from threetowers.cache.builder.opening import Terms

    terms = Terms(dtype, Views(views, view_seed, view_scale), slot)
    n = len(backbone)
    sources = weights or ["pretrained"] * n
    sizes: Sequence[int | None] = image_size or [None] * n
    if not len(out) == len(sources) == len(sizes) == n:
        raise ValueError(
            f"{n} backbones, {len(out)} --out, {len(sources)} --weights, {len(sizes)} --image-size: expected one of "
            "each for each backbone, or leave --weights or --image-size out"
        )
    specs = [CacheSpec(*each, terms, min_cosine) for each in zip(out, backbone, sources, sizes, strict=True)]
    reports = build_all(
        tars,
        specs,
        batch_size=batch_size,
        threads=threads,
        device=device,
        compute=compute,
        decode=decode,
        compiled=compile,
        on_bad=on_bad,
        stale_seconds=stale_seconds,
        progress=True,
    )
    for report in reports:
        _print_built(report)
    return 0


def _print_built(report: BuildReport) -> None:
    who = f"rank {report.world.rank} of {report.world.size}: " if report.world.size > 1 else ""
    rate = report.samples / report.seconds if report.seconds else 0.0
    left = f", {report.tars_left} were left to others" if report.tars_left else ""
    print(f"{who}{report.storage}: {report.tars_built} tars built, {report.tars_kept} were finished before{left}")
    print(
        f"{who}{report.samples} samples, {report.ok} embedded, {_counts(report.counts)}; "
        f"{report.seconds:.1f} s with loading, {rate:.1f} img/s, {report.bytes / 1e6:.1f} MB written"
    )
    if report.tars_built:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in report.shares.items())
        print(f"{who}where the time went: {shares}; the first is the bottleneck")
    _print_bad(report.bad)
    for note in report.notes:
        print(f"note: {note} (expected: when the cache was begun; found: now)")


def info(cache: Positional[str]) -> int:
    """Show what a cache holds and how much of it is built. Exit code 1 while it is half built.

    Args:
        cache: Folder or URL of the cache.
    """
    storage = open_storage(cache)
    manifest, table = read_manifest(storage), read_table(storage)
    records: list[DoneRecord] = []
    bad: list[tuple[str, RejectedSample]] = []
    missing: list[str] = []
    counts: Counter[str] = Counter()
    for entry in table.entries:
        try:
            record = read_done_record(storage, manifest, entry)
        except ManifestError as error:
            missing.append(str(error))
            continue
        records.append(record)
        counts.update(record.counts)
        bad += [(entry.path, sample) for sample in record.bad]
    size = manifest.preprocessing.input_size
    print(f"{cache}: {manifest.backbone}, weights {manifest.weights} (sha256 {manifest.weights_digest[:16]})")
    print(
        f"feature   {manifest.feature}, {manifest.dim} x {manifest.dtype}, {size[0]} x {size[1]} px, "
        f"{manifest.preprocessing.interpolation}, crop {manifest.preprocessing.crop_pct}"
    )
    print(f"views     {manifest.views}")
    if lows := [record.cosines.min for record in records if record.cosines.min is not None]:
        print(f"precision {manifest.dtype}: cosine of each row as stored with itself at least {min(lows):.7f}")
    print(f"versions  {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    print(f"tars      {len(records)} built of {len(table.entries)}, from {table.root}")
    print(
        f"samples   {sum(r.n_samples for r in records)} of {sum(e.n_samples for e in table.entries)}, "
        f"{sum(r.n_ok for r in records)} embedded, {_counts(counts)}"
    )
    print(f"bytes     {sum(file.size for r in records for file in r.files.values())}")
    _print_bad(bad[:20])
    for line in missing[:5]:
        print(f"not built: {line}")
    return 1 if missing else 0


def verify(
    cache: Positional[str],
    tars: list[str] | None = None,
    depth: Literal["structure", "numbers", "meaning"] = "numbers",
    payloads: bool = False,
    sample: int = 64,
    seed: int = 0,
    min_cosine: float | None = None,
    weights: str | None = None,
    device: str = "cpu",
    fix: bool = False,
    json: Path | None = None,
) -> int:
    """Check a cache for damage. Exit code 1 when it is not sound, also where --fix has removed what was not.

    Args:
        cache: Folder or URL of the cache.
        tars: Compare with these tars too: paths, globs in quotes, brace ranges.
        depth: structure: files and records; numbers: also every row; meaning: also a sample against the live teacher.
        payloads: Compare every image of these tars, not their headers only.
        sample: Pictures that meaning embeds again.
        seed: Which ones.
        min_cosine: Bound on what meaning finds; default: a little below what the precision allows.
        weights: Where the teacher's weights lie now, if they came from a file.
        device: Where the teacher runs.
        fix: Remove the rows of tars with a problem, so that the next build makes them again.
        json: Write the report to this file too.
    """
    from threetowers.cache.verify.verify import verify as run

    report = run(
        cache,
        tars,
        depth=depth,
        payloads=payloads,
        sample=sample,
        seed=seed,
        min_cosine=min_cosine,
        weights=weights,
        device=device,
        fix=fix,
    )
    print(report.text())
    _write_json(json, report.as_dict())
    return 0 if report.ok else 1


def remap(
    old: Positional[str],
    new: Positional[str],
    tars: list[str],
    missing: Literal["error", "filtered", "build"] = "error",
) -> int:
    """Take the rows of a cache over to other tars of the same images, by key and image, without the teacher.

    Args:
        old: Folder or URL of the cache that holds the rows.
        new: Folder or URL of the cache to make.
        tars: The tars as they are now: split, merged, filtered, downloaded again. Paths, globs, brace ranges.
        missing: Samples without a row in the old cache: error refuses, filtered goes on without them, build leaves
            their tars to `cache build`.
    """
    from threetowers.cache.remap import remap as run

    print(run(old, new, tars, missing=missing).text())
    return 0


def estimate(
    tars: list[str],
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    views: str = "center",
    view_seed: int = 0,
    view_scale: float = 1.0,
    ranks: int = 1,
    sample: int = 256,
    seed: int = 0,
    batch_size: int = 64,
    threads: int | None = None,
    device: str | None = None,
    images: tuple[int, ...] = (),
    json: Path | None = None,
) -> int:
    """Say what a cache would cost before it is begun: bytes, files, hours, and after how many epochs it pays.

    A sample of the tars is built in a temporary folder to measure.

    Args:
        tars: Paths, URLs, globs in quotes, and brace ranges.
        backbone: Name of the timm model.
        weights: As for `cache build`.
        image_size: As for `cache build`.
        views: As for `cache build`.
        view_seed: As for `cache build`.
        view_scale: As for `cache build`.
        ranks: Processes that would share the work, each as fast as this one.
        sample: Pictures to measure on.
        seed: Which ones.
        batch_size: Images a forward pass.
        threads: Threads that decode and resize; default: the cores.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        images: Say it for so many images too, in tars of the same size.
        json: Write the plan to this file too.
    """
    from threetowers.cache.estimate import estimate as measure

    found = measure(
        tars,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        views=Views(views, view_seed, view_scale),
        ranks=ranks,
        sample=sample,
        seed=seed,
        batch_size=batch_size,
        threads=threads,
        device=device,
    )
    print("\n\n".join(p.text() for p in (found, *(found.scaled(n) for n in images))))
    _write_json(json, found.as_dict())
    return 0


def measure_views(
    tars: list[str],
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    crop_scales: tuple[float, ...] = (0.9, 0.6, 0.35, 0.1),
    sample: int = 256,
    draws: int = 2,
    seed: int = 0,
    device: str = "cpu",
    json: Path | None = None,
) -> int:
    """Measure how far a teacher moves under training augmentations: does the center view do, or does it take crops?

    Args:
        tars: Paths, URLs, globs in quotes, and brace ranges.
        backbone: Name of the timm model.
        weights: As for `cache build`.
        image_size: As for `cache build`.
        crop_scales: Values of a run's data.crop_scale to try.
        sample: Pictures to measure on.
        draws: Random crops of each.
        seed: Which ones.
        device: Where the teacher runs.
        json: Write the table to this file too.
    """
    from threetowers.cache.encoders.teacher import load_teacher
    from threetowers.cache.measure_views import measure_views as run

    teacher = load_teacher(backbone, weights, image_size, device)
    found = run(tars, teacher, crop_scales=crop_scales, sample=sample, draws=draws, seed=seed)
    print(found.text())
    _write_json(json, found.as_dict())
    return 0


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(dumps(content, indent=1) + "\n")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none without an embedding"


def _print_bad(bad: Sequence[tuple[str, RejectedSample]]) -> None:
    for path, sample in bad:
        print(f"  {path}: {sample.key} (ordinal {sample.ordinal}): {sample.reason}")

"""The cache commands, as plain functions: their signatures are the flags, their results the exit codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from tyro.conf import Positional

from threetowers.cache.contract import ContractError, read_contract
from threetowers.cache.place import place_of
from threetowers.cache.record import BadSample, Record, read_record


def build(
    tars: list[str],
    out: str,
    backbone: str,
    weights: str = "pretrained",
    image_size: int | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    device: str | None = None,
    on_bad: Literal["record", "error"] = "record",
) -> int:
    """Embed the images of webdataset tars with a timm backbone, once. Run it again to go on after an interruption.

    Under torchrun, deepspeed, mpirun or srun the tars are dealt out to the processes.

    Args:
        tars: Paths, globs in quotes, and brace ranges like 'data/{000..099}.tar'.
        out: Folder or URL of the cache; made if it is not there.
        backbone: Name of the timm model.
        weights: 'pretrained', a .safetensors or .pth file, or package:efficientnet-lite0 (also 1, 2).
        image_size: Side of the teacher's input in pixels; default: what the model was trained for.
        batch_size: Images a forward pass.
        threads: Threads that decode and resize; default: this process's share of the cores.
        dtype: Type of the stored numbers.
        device: cpu, cuda or cuda:N; default: a GPU if there is one.
        on_bad: What to do about an image without an embedding: record it and go on, or stop with an error.
    """
    from threetowers.cache.build import build as run

    report = run(
        tars,
        out,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        batch_size=batch_size,
        threads=threads,
        dtype=dtype,
        device=device,
        on_bad=on_bad,
        progress=True,
    )
    who = f"rank {report.rank.rank} of {report.rank.world}: " if report.rank.world > 1 else ""
    rate = report.samples / report.seconds if report.seconds else 0.0
    print(f"{who}{report.place}: {report.tars_built} tars built, {report.tars_kept} were finished before")
    print(
        f"{who}{report.samples} samples, {report.ok} embedded, {_counts(report.counts)}; "
        f"{report.seconds:.1f} s with loading, {rate:.1f} img/s, {report.bytes / 1e6:.1f} MB written"
    )
    _print_bad(report.bad)
    for note in report.notes:
        print(f"note: {note} (expected: when the cache was begun; found: now)")
    return 0


def info(cache: Positional[str]) -> int:
    """Show what a cache holds and how much of it is built. Exit code 1 while it is half built.

    Args:
        cache: Folder or URL of the cache.
    """
    place = place_of(cache)
    contract, table = read_contract(place)
    records: list[Record] = []
    bad: list[tuple[str, BadSample]] = []
    missing: list[str] = []
    counts: Counter[str] = Counter()
    for entry in table.entries:
        try:
            record = read_record(place, contract, entry)
        except ContractError as error:
            missing.append(str(error))
            continue
        records.append(record)
        counts.update(record.counts)
        bad += [(entry.path, sample) for sample in record.bad]
    size = contract.preprocessing.input_size
    print(f"{cache}: {contract.backbone}, weights {contract.weights} (sha256 {contract.weights_digest[:16]})")
    print(
        f"feature   {contract.feature}, {contract.dim} x {contract.dtype}, view {contract.view}, "
        f"{size[0]} x {size[1]} px, {contract.preprocessing.interpolation}, crop {contract.preprocessing.crop_pct}"
    )
    print(f"versions  {', '.join(f'{name} {version}' for name, version in contract.versions.items())}")
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


def verify(cache: Positional[str], tars: list[str] | None = None, payloads: bool = False) -> int:
    """Check a cache for damage. Exit code 1 when it is not sound.

    Args:
        cache: Folder or URL of the cache.
        tars: Compare with these tars too: paths, globs in quotes, brace ranges.
        payloads: Compare every byte of these tars, not their headers only.
    """
    from threetowers.cache.verify import verify as run

    report = run(cache, tars, payloads=payloads)
    print(report.text())
    return 0 if report.ok else 1


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none without an embedding"


def _print_bad(bad: Sequence[tuple[str, BadSample]]) -> None:
    for path, sample in bad:
        print(f"  {path}: {sample.key} (ordinal {sample.ordinal}): {sample.reason}")

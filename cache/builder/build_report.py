"""What a build did, for each of its caches."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.builder.tar_writer import WrittenTar
from threetowers.cache.format.done_record import RejectedSample
from threetowers.cache.format.manifest import Side
from threetowers.cache.format.row_buffer import MAX_BAD_SHOWN
from threetowers.cache.processes.stage_timer import StageTimer
from threetowers.cache.processes.world import World
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_list import TarList


@dataclass(frozen=True)
class BuildReport:
    """What one process did for one cache.

    Attributes:
        storage: where the cache is.
        world: this process among all.
        of: which side of the samples it holds.
        tars_built: tars that it wrote.
        tars_kept: tars of its own share that were finished before.
        tars_left: tars that another worker took over from it.
        samples: samples of the tars that it wrote; each is `ok` or in `counts`.
        ok: samples with an embedding, of the image or of each caption.
        captions: rows of these, in a cache of text.
        different_captions: how many captions were embedded for them: of equal ones in a tar, one.
        counts: samples without an embedding, by status.
        notes: embedded samples of which something was tolerated, by what it was.
        ignored: members of these tars that nothing reads, by the reason.
        left_out: tars that were not used, as far as this process knows.
        bad: the first few of these, with the path of their tar.
        bytes: written.
        seconds: wall time, with loading.
        shares: of the embedding thread's time by stage, largest first.
        differences: informative fields in which the cache and this build differ.
    """

    storage: Storage
    world: World
    of: Side
    tars_built: int
    tars_kept: int
    tars_left: int
    samples: int
    ok: int
    captions: int
    different_captions: int
    counts: dict[str, int]
    notes: dict[str, int]
    ignored: dict[str, int]
    left_out: TarList
    bad: tuple[tuple[str, RejectedSample], ...]
    bytes: int
    seconds: float
    shares: dict[str, float]
    differences: tuple[str, ...]


def build_report(
    output: OutputCache,
    world: World,
    written: Sequence[WrittenTar],
    kept: int,
    seconds: float,
    timer: StageTimer,
    differences: tuple[str, ...],
    left_out: TarList,
) -> BuildReport:
    """Sum up what was written to one cache."""
    built = [(tar.entry, tar.record) for tar in written if tar.record is not None]
    counts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    bad: list[tuple[str, RejectedSample]] = []
    for entry, record in built:
        counts.update(record.counts)
        notes.update(record.notes)
        ignored.update(record.ignored_members)
        bad += [(entry.path, sample) for sample in record.bad]
    return BuildReport(
        storage=output.storage,
        world=world,
        of=output.manifest.of,
        tars_built=len(built),
        tars_kept=kept,
        tars_left=len(written) - len(built),
        samples=sum(record.n_samples for _, record in built),
        ok=sum(record.n_ok for _, record in built),
        captions=sum(record.n_rows for _, record in built) if output.manifest.of == "text" else 0,
        different_captions=sum(tar.different_captions for tar in written),
        counts=dict(counts),
        notes=dict(notes),
        ignored=dict(ignored),
        left_out=left_out,
        bad=tuple(bad[:MAX_BAD_SHOWN]),
        bytes=sum(file.size for _, record in built for file in record.files.values()),
        seconds=seconds,
        shares=timer.shares(),
        differences=differences,
    )

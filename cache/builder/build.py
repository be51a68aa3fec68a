"""Build caches: stream tars through encoders, and write all rows of a tar at once.

Each process takes its own share of the tars first, then whatever other processes have not reached. A tar is finished
when its done record exists; running the same command again continues with the others.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from threetowers.cache.builder.build_config import BuildConfig, Source
from threetowers.cache.builder.build_report import BuildReport, build_report
from threetowers.cache.builder.decode_workers import DecodeThreads, DecodeWorkers
from threetowers.cache.builder.decoding import Decoder
from threetowers.cache.builder.embedding.caption_embedder import CaptionEmbedder
from threetowers.cache.builder.embedding.embedder import Embedder
from threetowers.cache.builder.embedding.image_embedder import ImageEmbedder
from threetowers.cache.builder.leases import Leases
from threetowers.cache.builder.opening import open_or_create
from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.builder.scheduler import TarStatus, WorkQueue
from threetowers.cache.builder.tar_indexer import TarIndexer, index_new_tars
from threetowers.cache.builder.tar_reader import TarReader
from threetowers.cache.encoders.encoder import FrozenEncoder
from threetowers.cache.format.done_record import done_record_name, read_done_record
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.format.tar_table import TarEntry, TarTable, refuse_copies, repacked_error
from threetowers.cache.processes.preemption import exit_on_sigterm
from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.processes.progress import progress_bar
from threetowers.cache.processes.stage_timer import StageTimer
from threetowers.cache.processes.world import World
from threetowers.cache.storage.lease import LeaseOwner
from threetowers.cache.storage.storage import Storage, is_url, open_storage
from threetowers.cache.webdataset.tar_patterns import expand

logger = logging.getLogger(__name__)

TAR_ITEMS = 3  # of a tar of which only captions are read: while it is embedded, the next one is read


def build_cache(config: BuildConfig) -> BuildReport:
    """Build a cache, or continue to build it: embed the images or the captions of some tars once, and store that.

    Returns when every tar is finished, by whichever process. Several processes, started by any launcher, share the
    work. SIGTERM abandons the current tar and ends the process with exit code 143.

    Raises:
        ManifestError: the output is a cache with another manifest, or of tars that were repacked.
        RoundingError: a row that the dtype stores with a smaller cosine to itself than `min_cosine`.
        BadTar, BadSample, BadImage, ValueError: bad input, named in the message. All bad tars are named at once, before
            a teacher is loaded.
        WriteError: the output cannot be written.

    Examples:
        A tar of two images, and a small teacher with random weights:

        >>> import io, tarfile, tempfile
        >>> import timm, torch
        >>> from PIL import Image
        >>> folder = tempfile.TemporaryDirectory()
        >>> with tarfile.open(f"{folder.name}/0.tar", "w") as tar:
        ...     for key, color in (("a", "red"), ("b", "blue")):
        ...         png = io.BytesIO()
        ...         Image.new("RGB", (64, 64), color).save(png, "png")
        ...         member = tarfile.TarInfo(f"{key}.png")
        ...         member.size = len(png.getvalue())
        ...         tar.addfile(member, io.BytesIO(png.getvalue()))
        >>> weights = f"{folder.name}/weights.pth"
        >>> torch.save(timm.create_model("test_resnet").state_dict(), weights)

        >>> config = BuildConfig(
        ...     tars=[f"{folder.name}/*.tar"],
        ...     output_dir=f"{folder.name}/cache",
        ...     encoder=f"timm:test_resnet:{weights}",
        ...     device="cpu",
        ... )
        >>> report = build_cache(config)
        >>> report.tars_built, report.samples, report.ok
        (1, 2, 2)
        >>> build_cache(config).tars_kept
        1
        >>> folder.cleanup()
    """
    if len(config.output_dirs()) != 1:
        raise ValueError(f"--output-dir {config.output_dir}: expected one cache; build_caches builds several")
    return build_caches(config)[0]


def build_caches(config: BuildConfig) -> tuple[BuildReport, ...]:
    """Build several caches of the same tars, like `build_cache`, reading each tar once for all of them.

    An image is decoded once, and transformed once for encoders that take the same pixels. Caches of several features of
    an encoder share its forward passes.

    Raises:
        ValueError: two outputs are the same folder, or would hold the same; and as for `build_cache`.
    """
    started = time.monotonic()
    storages = [open_storage(output) for output in config.output_dirs()]
    if len({str(storage) for storage in storages}) != len(storages):
        raise ValueError(f"--output-dir {' '.join(map(str, storages))}: expected different folders")
    world = World.from_env()
    paths = expand(config.tars)
    threads = config.threads or world.cores()
    device = config.device or str(world.device)
    on_gpu = torch.device(device).type == "cuda"
    workers = (world.cores() if on_gpu else 0) if config.workers is None else config.workers
    worker = LeaseOwner()
    timer = StageTimer()
    with contextlib.ExitStack() as stack:
        stack.enter_context(exit_on_sigterm())
        pool = stack.enter_context(_thread_pool(threads))

        # Find out which tars can be used, before anything is loaded or written.
        indexer = TarIndexer(config, pool)
        if world.first:
            index_new_tars(indexer, storages, paths)

        # Open or create each cache.
        encoders = config.load_encoders(device)
        sources = _resolved(config.sources(), encoders)
        opened = [
            (storage, *open_or_create(storage, paths, encoders[source.encoder], source, config, world, indexer))
            for storage, source in zip(storages, sources, strict=True)
        ]
        paths = indexer.usable(paths)
        outputs = []
        differences = []
        for storage, manifest, table, teacher, tolerated in opened:
            entries = _entries(storage, paths, table, indexer)
            leases = Leases(storage, worker, config.lease_timeout)
            stack.enter_context(leases.heartbeat())
            outputs.append(OutputCache(storage, manifest, teacher, leases, entries, config.min_cosine))
            differences.append(tolerated)
        indexer.release()
        of_images = {i: output for i, output in enumerate(outputs) if output.manifest.of == "image"}
        of_text = {i: output for i, output in enumerate(outputs) if output.manifest.of == "text"}
        images = ImageEmbedder(of_images, config.batch_size, timer)
        captions = stack.enter_context(CaptionEmbedder(of_text, config.batch_size, timer))

        # Find out what each cache lacks.
        statuses = [TarStatus(output.leases, [entry.id for entry in output.entries]) for output in outputs]
        own_share = range(world.rank, len(paths), world.size)
        unfinished = [
            _unfinished(output, status, own_share, paths, pool, indexer)
            for output, status in zip(outputs, statuses, strict=True)
        ]
        indexer.release()

        # Read in a thread, decode in threads or processes, embed here, until no tar is left.
        decoder = Decoder(images.formats, config.max_pixels)
        in_processes = workers > 0 and any(unfinished[i] for i in of_images)
        decoding = DecodeWorkers(decoder, workers) if in_processes else DecodeThreads(decoder, threads)
        stack.enter_context(decoding)
        queue = WorkQueue(statuses, world.rank, world.size, seed=worker.token, unfinished=unfinished)
        sources_of_captions = config.caption_sources().caption_format
        reader = TarReader(paths, outputs, queue, images, captions, sources_of_captions, decoding, config.image_member)
        stack.callback(reader.stopped.set)
        depth = TAR_ITEMS
        if of_images:
            depth = 4 * max(map(images.batch_size, of_images)) + 2 * max(threads, workers)
        items = stack.enter_context(contextlib.closing(prefetch(reader.items(), depth=depth)))
        stack.callback(reader.stopped.set)  # before the thread is joined, and before the pool is shut down
        advance = stack.enter_context(_progress_bar(outputs, unfinished, world, config.progress, timer))
        written = list(Embedder(outputs, images, captions, config.on_bad, timer).run(items, advance))
    seconds = time.monotonic() - started
    reports = []
    for i, output in enumerate(outputs):
        kept = sum(number not in unfinished[i] for number in own_share)
        tars = [tar for tar in written if tar.cache == i]
        reports.append(build_report(output, world, tars, kept, seconds, timer, differences[i], indexer.listed()))
    return tuple(reports)


def _resolved(sources: Sequence[Source], encoders: Mapping[str, FrozenEncoder]) -> list[Source]:
    """Return the sources with each feature by its name.

    Raises:
        ValueError: an encoder does not offer the side or the feature, or two sources are the same.
    """
    resolved: list[Source] = []
    for source in sources:
        side = encoders[source.encoder].side(source.of)
        feature = source.feature or side.features[0]
        side.width(feature)
        named = source._replace(feature=feature)
        if named in resolved:
            raise ValueError(
                f"--encoder {source.encoder} --of {source.of} --feature {feature}: found for two of --output-dir, "
                f"expected different caches: {source.encoder} offers {', '.join(side.features)}"
            )
        resolved.append(named)
    return resolved


def _entries(storage: Storage, paths: Sequence[str], table: TarTable, indexer: TarIndexer) -> list[TarEntry]:
    """Return the entry of each tar in the tar table of a cache."""
    moved = {index.location: index for index in indexer([path for path in paths if table.at(path) is None])}
    entries = [table.at(path) or table.find(moved[path]) for path in paths]
    storage.remove_stale()
    refuse_copies(paths, [entry.fingerprint for entry in entries])
    return entries


@contextlib.contextmanager
def _thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Start threads; at the end, cancel what they have not begun, without waiting."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="index")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _progress_bar(
    outputs: Sequence[OutputCache], unfinished: Sequence[set[int]], world: World, progress: bool, timer: StageTimer
) -> Iterator[Callable[[int], object]]:
    """Show samples done, the time left and the share of each stage; the first stage is the bottleneck."""
    left = set().union(*unfinished)
    sizes = [entry.n_samples for entry in outputs[0].entries]
    initial = sum(size for number, size in enumerate(sizes) if number not in left)
    total = sum(sizes)
    name = "cache build"
    if world.size > 1:  # an even share of what is left, of which a faster worker does more
        name = f"cache build, share of rank {world.rank} of {world.size}"
        total = -(-(total - initial) // world.size)
        initial = 0
    unit = "images" if any(output.manifest.of == "image" for output in outputs) else "samples"
    bar = progress_bar(name, total, unit, initial=initial, enabled=progress and world.first, keep=True)

    def advance(samples: int) -> None:
        if samples:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in timer.shares().items())
            bar.set_postfix_str(shares, refresh=False)
            bar.update(samples)

    with bar:
        yield advance


def _unfinished(
    output: OutputCache,
    status: TarStatus,
    own_share: Sequence[int],
    paths: Sequence[str],
    pool: ThreadPoolExecutor,
    indexer: TarIndexer,
) -> set[int]:
    """Return the numbers of the tars without a done record, or, in this process's own share, without a valid one.

    Raises:
        ManifestError: a finished tar of the own share is not the one that was embedded.
    """
    left = status.unfinished(range(len(paths)))
    output.leases.remove_stale({entry.id for number, entry in enumerate(output.entries) if number not in left})

    # Local tars must still be the embedded ones; remote tars are compared by `verify` only.
    finished = [number for number in own_share if number not in left]
    local = {paths[number]: number for number in finished if not is_url(paths[number])}
    for index in indexer(list(local)):
        expected = output.entries[local[index.location]].fingerprint
        if index.fingerprint != expected:
            raise repacked_error(index.location, [expected], index.fingerprint)

    def is_valid(number: int) -> bool:
        entry = output.entries[number]
        try:
            read_done_record(output.storage, output.manifest, entry)
        except ManifestError as error:
            logger.warning("rebuilt: %s", error)
            output.storage.delete(done_record_name(entry.id))
            return False
        return True

    return left | {number for number, valid in zip(finished, pool.map(is_valid, finished), strict=True) if not valid}

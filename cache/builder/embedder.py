"""From what is read of tars to stored rows: embed each tar, and write it while the next one is embedded."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from threetowers.cache.builder.image_embedder import ImageEmbedder
from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.builder.tar_reader import ReadImage, StreamItem, TarEnd, TarStart
from threetowers.cache.builder.tar_writer import TarWriter, WrittenTar
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.row_buffer import Provenance
from threetowers.cache.processes.stage_timer import StageTimer
from threetowers.cache.webdataset.images import BadImage


@dataclass(eq=False)
class _OpenTar:
    """The tar that is being embedded: the rows of each cache that lacks it, and the samples that are done."""

    number: int
    buffers: Mapping[int, ImageRowBuffer]
    started: float
    done: int = 0


@dataclass(eq=False)
class Embedder:
    """Embeds the items of a TarReader and writes the rows of each tar."""

    outputs: Sequence[OutputCache]
    images: ImageEmbedder
    on_bad: str
    timer: StageTimer = field(default_factory=StageTimer)

    def run(self, items: Iterable[StreamItem], advance: Callable[[int], object]) -> Iterator[WrittenTar]:
        """Embed tar after tar; yield each as it is written. Calls `advance` with the number of samples done."""
        with TarWriter(self.outputs, self.timer) as writer:
            for item in self._timed(items):
                match item:
                    case TarStart(work, index):
                        buffers = {}
                        for i in work.caches:
                            buffers[i] = ImageRowBuffer(index, self.outputs[i].manifest, self.outputs[i].min_cosine)
                        tar = _OpenTar(work.number, buffers, time.monotonic())
                        self.images.begin(buffers)
                    case ReadImage(ordinal, decoding):
                        with self.timer("decode"):
                            image = decoding.result()
                        self.images.add(ordinal, image)
                    case TarEnd():
                        self.images.finish()
                self._check_bad(tar)
                advance(self.images.done - tar.done)
                tar.done = self.images.done
                if isinstance(item, TarEnd):
                    self._write(tar, item, writer)
                    yield from writer.finished(left=len(self.outputs))  # one tar, in as many caches
            yield from writer.finished()

    def _timed(self, items: Iterable[StreamItem]) -> Iterator[StreamItem]:
        source = iter(items)
        while True:
            with self.timer("read"):
                item = next(source, None)
            if item is None:
                return
            yield item

    def _check_bad(self, tar: _OpenTar) -> None:
        """Raise BadImage for the first bad sample where none is allowed."""
        if self.on_bad != "error":
            return
        for rows in tar.buffers.values():
            if rows.bad:
                bad = rows.bad[0]
                raise BadImage(
                    f"{rows.index.location}: sample {bad.key!r} (ordinal {bad.ordinal}): {bad.reason}. Remove it, or "
                    "continue without it (--on-bad skip)"
                )

    def _write(self, tar: _OpenTar, end: TarEnd, writer: TarWriter) -> None:
        """Have the rows of a complete tar written."""
        seconds = time.monotonic() - tar.started
        for i, rows in tar.buffers.items():
            side = self.outputs[i].teacher.side("image")
            provenance = Provenance("teacher", self.images.batch_size(i), side.device.type, seconds, side.runtime)
            writer.start(i, tar.number, rows, end.tar_xxh3_128, provenance)

"""From what is read of tars to stored rows: embed each tar, and write it while the next one is embedded."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from threetowers.cache.builder.embedding.caption_embedder import CaptionEmbedder
from threetowers.cache.builder.embedding.image_embedder import ImageEmbedder
from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.builder.scheduler import WorkItem
from threetowers.cache.builder.tar_reader import ReadCaptions, ReadImage, StreamItem, TarEnd, TarStart
from threetowers.cache.builder.tar_writer import TarWriter, WrittenTar
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.row_buffer import Provenance, RowBuffer
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.processes.stage_timer import StageTimer
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.images import BadImage
from threetowers.cache.webdataset.tar_index import TarIndex

Advance = Callable[[int], object]


@dataclass(eq=False)
class _OpenTar:
    """The tar that is being embedded: the rows of each cache that lacks it, and how many samples are done.

    These are samples whose images are embedded; where there are none, the part of the samples that the captions are
    which are embedded.
    """

    number: int
    n_samples: int
    images: dict[int, ImageRowBuffer]
    texts: dict[int, TextRowBuffer]
    started: float
    done: int = 0

    @property
    def buffers(self) -> dict[int, RowBuffer]:
        """The rows of all caches that lack the tar, by the number of the cache."""
        return {**self.images, **self.texts}


@dataclass(eq=False)
class Embedder:
    """Embeds the items of a TarReader and writes the rows of each tar."""

    outputs: Sequence[OutputCache]
    images: ImageEmbedder
    captions: CaptionEmbedder
    on_bad: str
    timer: StageTimer = field(default_factory=StageTimer)

    def run(self, items: Iterable[StreamItem], advance: Advance) -> Iterator[WrittenTar]:
        """Embed tar after tar; yield each as it is written. Calls `advance` with the number of samples done."""
        with TarWriter(self.outputs, self.timer) as writer:
            for item in self._timed(items):
                match item:
                    case TarStart(work, index):
                        tar = self._open(work, index)
                        self.images.begin(tar.images)
                    case ReadImage(ordinal, decoding):
                        with self.timer("decode"):
                            image = decoding.result()
                        self.images.add(ordinal, image)
                    case ReadCaptions(captions):
                        for share in self.captions.embed(captions, tar.texts):
                            self._check_bad(tar)
                            if not tar.images:
                                self._advance(tar, int(share * tar.n_samples), advance)
                    case TarEnd():
                        self.images.finish()
                self._check_bad(tar)
                if tar.images:
                    self._advance(tar, self.images.done, advance)
                if isinstance(item, TarEnd):
                    self._advance(tar, tar.n_samples, advance)
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

    def _open(self, work: WorkItem, index: TarIndex) -> _OpenTar:
        """Make room for the rows of a tar in the caches that lack it."""
        tar = _OpenTar(work.number, len(index.samples), {}, {}, time.monotonic())
        for i in work.caches:
            output = self.outputs[i]
            if output.manifest.of == "image":
                tar.images[i] = ImageRowBuffer(index, output.manifest, output.min_cosine)
            else:
                tar.texts[i] = TextRowBuffer(index, output.manifest, output.min_cosine)
        return tar

    def _advance(self, tar: _OpenTar, done: int, advance: Advance) -> None:
        advance(done - tar.done)
        tar.done = done

    def _check_bad(self, tar: _OpenTar) -> None:
        """Raise BadImage or BadSample for the first bad sample where none is allowed."""
        if self.on_bad != "error":
            return
        for i, rows in tar.buffers.items():
            if rows.bad:
                bad = rows.bad[0]
                message = (
                    f"{rows.index.location}: sample {bad.key!r} (ordinal {bad.ordinal}): {bad.reason}. Remove it, or "
                    "continue without it (--on-bad skip)"
                )
                raise BadImage(message) if i in tar.images else BadSample(message)

    def _write(self, tar: _OpenTar, end: TarEnd, writer: TarWriter) -> None:
        """Have the rows of a complete tar written."""
        seconds = time.monotonic() - tar.started
        for i, image_rows in tar.images.items():
            side = self.outputs[i].teacher.side("image")
            provenance = Provenance("teacher", self.images.batch_size(i), side.device.type, seconds, side.runtime)
            writer.start(i, tar.number, image_rows, end.tar_xxh3_128, provenance)
        for i, text_rows in tar.texts.items():
            device = self.outputs[i].teacher.side("text").device
            provenance = Provenance("teacher", self.captions.batch_size(i), device.type, seconds)
            # Without a digest of the tar: the hashes of the captions say all that was read, with or without images.
            writer.start(i, tar.number, text_rows, "", provenance)

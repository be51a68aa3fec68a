"""Embedding images: outputs of one encoder share its forward passes, and those of equal pixels share the pixels.

Batches never cross tars, so that the rows of a tar do not depend on what else is built beside it.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from threetowers.cache.builder.decoding import Decoded, PixelFormat, distinct_formats
from threetowers.cache.builder.output_cache import OutputCache
from threetowers.cache.encoders.forward_queue import ImageQueue, RunningBatch
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.views import Pixels
from threetowers.cache.processes.stage_timer import StageTimer
from threetowers.cache.webdataset.images import BadImage


@dataclass(frozen=True, eq=False)
class _ImagePass:
    """The forward passes that several outputs share.

    Each gives the features of all of them, also for a tar that some have already: so all tars are embedded by one
    graph, and have the same bits in whatever order they were built.

    Attributes:
        features: of the outputs, each once.
        outputs: the number of its feature, by the number of each output.
        format: number of the pixel format.
        batch_size: images of a pass.
        queue: runs the passes.
    """

    features: tuple[str, ...]
    outputs: Mapping[int, int]
    format: int
    batch_size: int
    queue: ImageQueue


@dataclass(eq=False)
class _TarBatches:
    """The batches of a tar in one forward pass: one is being filled, the one before it runs.

    Attributes:
        shared: the pass.
        buffers: the rows of the outputs that lack the tar, by their numbers.
        timer: told of the forward passes.
        stored: images whose rows are stored.
    """

    shared: _ImagePass
    buffers: Mapping[int, ImageRowBuffer]
    timer: StageTimer
    stored: int = 0
    _ordinals: list[int] = field(default_factory=list)
    _pixels: list[Pixels] = field(default_factory=list)
    _running: tuple[list[int], RunningBatch] | None = None

    def add(self, ordinal: int, pixels_V3HW: Pixels) -> None:
        """Add an image, and start a forward pass when it fills the batch."""
        self._ordinals.append(ordinal)
        self._pixels.append(pixels_V3HW)
        if len(self._ordinals) == self.shared.batch_size:
            self._start()

    def finish(self) -> None:
        """Embed what is left, and wait: others may be waiting for this tar, with the next one."""
        if self._ordinals:
            self._start()
        self._store()

    def _start(self) -> None:
        """Start the forward pass of the batch, and store the rows of the one before meanwhile."""
        with self.timer("forward"):
            running = self.shared.queue.start(self._pixels)
        self._store()
        self._running = self._ordinals, running
        self._ordinals = []
        self._pixels = []

    def _store(self) -> None:
        """Wait for the forward pass that runs, and store its rows."""
        if self._running is None:
            return
        ordinals, running = self._running
        self._running = None
        with self.timer("forward"):
            features = running.result()
            for output, rows in self.buffers.items():
                rows.set_embeddings(ordinals, features[self.shared.outputs[output]])
        self.stored += len(ordinals)


class ImageEmbedder:
    """Embeds the images of tars for all outputs of images."""

    def __init__(self, outputs: Mapping[int, OutputCache], batch_size: int | None, timer: StageTimer) -> None:
        """Find out what the outputs share, prepare their encoders, and allocate the memory of batches.

        Args:
            outputs: the caches of images, by their numbers.
            batch_size: images of a forward pass; None: as each cache was begun with.
            timer: told of the forward passes.

        Raises:
            ValueError: an encoder cannot run here as the cache states it.
        """
        self._timer = timer
        self.formats, numbers = distinct_formats([_pixel_format(output) for output in outputs.values()])
        shared: dict[tuple[int, tuple[object, ...]], list[int]] = defaultdict(list)
        for (i, output), number in zip(outputs.items(), numbers, strict=True):
            image = output.teacher.side("image")
            shared[number, (id(image.model), image.precision, image.runtime)].append(i)
        self._passes = [
            _image_pass({i: outputs[i] for i in members}, number, batch_size) for (number, _), members in shared.items()
        ]
        self._tar: list[_TarBatches] = []
        self._buffers: Mapping[int, ImageRowBuffer] = {}
        self._rejected = 0

    def formats_of(self, outputs: Collection[int]) -> list[int]:
        """Return the numbers of the pixel formats that these outputs take."""
        return sorted({each.format for each in self._passes if each.outputs.keys() & outputs})

    def batch_size(self, output: int) -> int:
        """Return how many images of an output go through its encoder at a time."""
        return next(each.batch_size for each in self._passes if output in each.outputs)

    def begin(self, buffers: Mapping[int, ImageRowBuffer]) -> None:
        """Begin a tar: reject the samples that have no usable image, as far as the tar's headers tell.

        Args:
            buffers: the rows of the outputs that lack the tar, by their numbers.
        """
        self._buffers = buffers
        self._rejected = max((rows.reject_defects() for rows in buffers.values()), default=0)
        self._tar = []
        for each in self._passes:
            if members := {i: buffers[i] for i in each.outputs if i in buffers}:
                self._tar.append(_TarBatches(each, members, self._timer))

    def add(self, ordinal: int, image: Decoded) -> None:
        """Embed an image of the tar, sooner or later; one that cannot be decoded is rejected."""
        if isinstance(image.views, BadImage):
            for rows in self._buffers.values():
                rows.set_image(ordinal, image.image_hash)
                rows.reject(ordinal, RowStatus.of(image.views.defect), str(image.views))
            self._rejected += 1
            return
        for batches in self._tar:
            pixels_V3HW, params_VP = image.views[batches.shared.format]
            for rows in batches.buffers.values():
                rows.set_image(ordinal, image.image_hash, params_VP)
                rows.notes.update(image.notes)
            batches.add(ordinal, pixels_V3HW)

    def finish(self) -> None:
        """Embed and store what is left of the tar."""
        for batches in self._tar:
            batches.finish()

    @property
    def done(self) -> int:
        """Samples of the tar that are embedded for all outputs, or rejected."""
        return self._rejected + min((batches.stored for batches in self._tar), default=0)


def _image_pass(outputs: Mapping[int, OutputCache], number: int, batch_size: int | None) -> _ImagePass:
    """Return the forward passes that these outputs share, of pixel format `number`."""
    first = next(iter(outputs.values()))
    image = first.teacher.side("image")
    features = tuple(dict.fromkeys(output.manifest.feature for output in outputs.values()))
    image.prepare(features)
    size = batch_size or max(output.manifest.batch_size for output in outputs.values())
    return _ImagePass(
        features,
        {i: features.index(output.manifest.feature) for i, output in outputs.items()},
        number,
        size,
        ImageQueue(image, features, first.manifest.views.count, size),
    )


def _pixel_format(output: OutputCache) -> PixelFormat:
    """Return how a cache takes its pixels."""
    image = output.teacher.side("image")
    views = output.manifest.views
    preprocessing = image.preprocessing
    min_side = None if views.cropped else image.min_side  # a crop may need every pixel
    return PixelFormat(views, image.transform, preprocessing.input_size, preprocessing.interpolation, min_side)

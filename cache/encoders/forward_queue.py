"""Forward passes one after the other, without gaps on a GPU: copies both ways run beside the computation.

While batch n is computed, batch n + 1 is written to pinned memory and copied to the device, and the features of batch
n - 1 are copied back and used. A CPU does the same in sequence: torch's streams and events do nothing there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from threetowers.cache.encoders.encoder import ImageEncoder, TextEncoder
from threetowers.cache.encoders.tokenizers.tokenizer import Tokens

Float32Array = npt.NDArray[np.float32]


@dataclass(eq=False)
class _Slot:
    """The memory of one batch on the host: each feature (V, B, D); and what the device works on meanwhile."""

    features: Sequence[Tensor]
    done: Any
    held: Sequence[Tensor] = ()  # kept from being used for something else, as the streams know nothing of each other


@dataclass(frozen=True, eq=False)
class RunningBatch:
    """A batch whose features are being computed."""

    slot: _Slot
    size: int

    def result(self) -> list[Float32Array]:
        """Wait for the features, (b, V, D) each, which stay valid until the second batch after this one is started."""
        self.slot.done.synchronize()
        self.slot.held = ()
        return [features_VBD[:, : self.size].transpose(0, 1).numpy() for features_VBD in self.slot.features]


class ForwardQueue:
    """Takes the features of batches from a device. At most two are under way: take a result before the next but one."""

    def __init__(self, device: torch.device, widths: Sequence[int], views: int, batch_size: int) -> None:
        """Allocate memory on the host, pinned where the device is a GPU.

        Args:
            device: Computes the features.
            widths: D of each feature.
            views: V, of each item of a batch.
            batch_size: B, items of the largest batch.
        """
        self.device = device
        self.pinned = device.type == "cuda"
        self._streams: Any = torch.cuda if self.pinned else torch.cpu
        stream: Any = partial(torch.cuda.Stream, device) if self.pinned else torch.cpu.Stream
        self._uploads = stream()
        self._downloads = stream()
        self._slots = []
        for _ in range(2):
            features = [torch.empty(views, batch_size, width, pin_memory=self.pinned) for width in widths]
            self._slots.append(_Slot(features, self._streams.Event()))

    def take_slot(self) -> _Slot:
        """Return the memory of the next batch. Raises RuntimeError while a batch in it runs."""
        slot = self._slots[0]
        self._slots.reverse()
        if slot.held:
            raise RuntimeError("a third batch was started before the result of the first was taken")
        return slot

    @contextlib.contextmanager
    def uploading(self) -> Iterator[None]:
        """Copy to the device beside the computation, which goes on after the copies."""
        computing = self._streams.current_stream(self.device)
        with self._streams.stream(self._uploads):
            yield
        computing.wait_stream(self._uploads)

    def download(self, slot: _Slot, inputs: Sequence[Tensor], features: Sequence[Sequence[Tensor]]) -> RunningBatch:
        """Copy the features back: `features[v][f]` (b, D) of each view and feature, computed from the inputs."""
        self._downloads.wait_stream(self._streams.current_stream(self.device))
        with self._streams.stream(self._downloads):
            for view, of_view in enumerate(features):
                for features_VBD, features_bD in zip(slot.features, of_view, strict=True):
                    features_VBD[view, : len(features_bD)].copy_(features_bD, non_blocking=True)
            slot.done.record(self._downloads)
        slot.held = [*inputs, *(features_bD for of_view in features for features_bD in of_view)]
        return RunningBatch(slot, len(features[0][0]))


class ImageQueue:
    """Embeds batches of images by one encoder: several features of several views."""

    def __init__(self, encoder: ImageEncoder, features: Sequence[str], views: int, batch_size: int) -> None:
        """Allocate memory on the host, pinned where the device is a GPU.

        Args:
            encoder: Embeds the images.
            features: Which of its features.
            views: Of each image.
            batch_size: Images of the largest batch.
        """
        self._encoder = encoder
        self._features = tuple(features)
        widths = [encoder.width(feature) for feature in features]
        self._queue = ForwardQueue(encoder.device, widths, views, batch_size)
        shape = (views, batch_size, 3, *encoder.preprocessing.input_size)
        self._pixels = [torch.empty(shape, dtype=torch.uint8, pin_memory=self._queue.pinned) for _ in range(2)]

    def start(self, images: Sequence[npt.NDArray[np.uint8]]) -> RunningBatch:
        """Start to embed b images, the pixels (V, 3, H, W) of each. Raises ValueError as `ImageEncoder.embed` does."""
        slot = self._queue.take_slot()
        pixels_VB3HW = self._pixels[0]
        self._pixels.reverse()
        b = len(images)
        for view, pixels_B3HW in enumerate(pixels_VB3HW):
            torch.stack([torch.from_numpy(pixels[view]) for pixels in images], out=pixels_B3HW[:b])
        with self._queue.uploading():
            pixels_Vb3HW = [x_B3HW[:b].to(self._encoder.device, non_blocking=True) for x_B3HW in pixels_VB3HW]
        features = [self._encoder.forward(pixels_b3HW, self._features) for pixels_b3HW in pixels_Vb3HW]
        return self._queue.download(slot, pixels_Vb3HW, features)


class CaptionQueue:
    """Embeds batches of captions by one encoder: several features. The results have one view."""

    def __init__(self, encoder: TextEncoder, features: Sequence[str], batch_size: int) -> None:
        """Allocate memory on the host, pinned where the device is a GPU.

        Args:
            encoder: Embeds the captions.
            features: Which of its features.
            batch_size: Captions of the largest batch.
        """
        self._encoder = encoder
        self._features = tuple(features)
        self._queue = ForwardQueue(encoder.device, [encoder.width(feature) for feature in features], 1, batch_size)

    def start(self, tokens: Sequence[Tokens]) -> RunningBatch:
        """Start to embed b captions. Raises ValueError as `TextEncoder.embed` does."""
        slot = self._queue.take_slot()
        inputs = self._encoder.collate(tokens)
        if self._queue.pinned:
            inputs = {name: x.pin_memory() for name, x in inputs.items()}
        with self._queue.uploading():
            uploaded = {name: x.to(self._encoder.device, non_blocking=True) for name, x in inputs.items()}
        features = self._encoder.compute(uploaded, self._features)
        return self._queue.download(slot, list(uploaded.values()), [features])

"""Forward passes one after the other, without gaps on a GPU: copies both ways run beside the computation.

While batch n is computed, batch n + 1 is written to pinned memory and copied to the device, and the features of batch
n - 1 are copied back and used. A CPU does the same in sequence: torch's streams and events do nothing there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from threetowers.cache.encoders.encoder import ImageEncoder


@dataclass(eq=False)
class _Slot:
    """The memory of one batch on the host, and what the device works on meanwhile."""

    pixels_VB3HW: Tensor
    features_VBD: Tensor
    done: Any
    held: Sequence[Tensor] = ()  # kept from being used for something else, as the streams know nothing of each other


@dataclass(frozen=True, eq=False)
class RunningBatch:
    """A batch whose features are being computed."""

    slot: _Slot
    size: int

    def result(self) -> npt.NDArray[np.float32]:
        """Wait for the features (b, V, D), which stay valid until the second batch after this one is started."""
        self.slot.done.synchronize()
        self.slot.held = ()
        features: npt.NDArray[np.float32] = self.slot.features_VBD[:, : self.size].transpose(0, 1).numpy()
        return features


class ForwardQueue:
    """Embeds batches of images by one encoder. At most two are under way: take a result before the next but one."""

    def __init__(self, encoder: ImageEncoder, feature: str, views: int, batch_size: int) -> None:
        """Allocate memory on the host, pinned where the device is a GPU.

        Args:
            encoder: Embeds the images.
            feature: Which of its features.
            views: Of each image.
            batch_size: Images of the largest batch.
        """
        self._encoder = encoder
        self._feature = feature
        device = encoder.device
        on_gpu = device.type == "cuda"
        self._streams: Any = torch.cuda if on_gpu else torch.cpu
        stream: Any = partial(torch.cuda.Stream, device) if on_gpu else torch.cpu.Stream
        self._uploads = stream()
        self._downloads = stream()
        size = encoder.preprocessing.input_size
        self._slots = [
            _Slot(
                torch.empty(views, batch_size, 3, *size, dtype=torch.uint8, pin_memory=on_gpu),
                torch.empty(views, batch_size, encoder.width(feature), pin_memory=on_gpu),
                self._streams.Event(),
            )
            for _ in range(2)
        ]

    def start(self, images: Sequence[npt.NDArray[np.uint8]]) -> RunningBatch:
        """Start to embed b images, the pixels (V, 3, H, W) of each. Raises ValueError as `ImageEncoder.embed` does."""
        slot = self._slots[0]
        self._slots.reverse()
        if slot.held:
            raise RuntimeError("a third batch was started before the result of the first was taken")
        b = len(images)
        for view, pixels_B3HW in enumerate(slot.pixels_VB3HW):
            torch.stack([torch.from_numpy(pixels[view]) for pixels in images], out=pixels_B3HW[:b])

        device = self._encoder.device
        computing = self._streams.current_stream(device)
        with self._streams.stream(self._uploads):
            pixels_Vb3HW = [pixels_B3HW[:b].to(device, non_blocking=True) for pixels_B3HW in slot.pixels_VB3HW]
        computing.wait_stream(self._uploads)
        features_VbD = [self._encoder.forward(pixels_b3HW, [self._feature])[0] for pixels_b3HW in pixels_Vb3HW]
        self._downloads.wait_stream(computing)
        with self._streams.stream(self._downloads):
            for features_BD, features_bD in zip(slot.features_VBD, features_VbD, strict=True):
                features_BD[:b].copy_(features_bD, non_blocking=True)
            slot.done.record(self._downloads)
        slot.held = [*pixels_Vb3HW, *features_VbD]
        return RunningBatch(slot, b)

"""Forward passes that overlap give what `ImageEncoder.embed` gives, batch by batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from threetowers.cache.encoders.encoder import ImageEncoder
from threetowers.cache.encoders.forward_queue import ImageQueue, RunningBatch
from threetowers.cache.encoders.names import load_frozen_encoder

SIZES = (5, 5, 3, 5, 1)  # of batches


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Callable[..., str]) -> ImageEncoder:
    return load_frozen_encoder(tiny_encoder("test_resnet@32")).side("image")


def batch(n: int, seed: int) -> list[np.ndarray]:
    """The pixels (2, 3, 32, 32) of n images of two views."""
    return list(np.random.default_rng(seed).integers(0, 256, (n, 2, 3, 32, 32), np.uint8))


def test_results_are_taken_while_the_next_batch_runs(encoder: ImageEncoder) -> None:
    queue = ImageQueue(encoder, ["pooled"], views=2, batch_size=max(SIZES))
    running: list[RunningBatch] = []
    for number, size in enumerate((*SIZES, 2)):
        running.append(queue.start(batch(size, number)))
        if number == 0:
            continue
        images = np.stack(batch(SIZES[number - 1], number - 1))
        expected = [encoder.embed(torch.from_numpy(images[:, view])).numpy() for view in range(2)]
        (found,) = running[number - 1].result()
        np.testing.assert_array_equal(found, np.stack(expected, axis=1))


def test_a_batch_whose_memory_is_in_use_is_refused(encoder: ImageEncoder) -> None:
    queue = ImageQueue(encoder, ["pooled"], views=2, batch_size=2)
    first = queue.start(batch(2, 0))
    queue.start(batch(2, 1))
    with pytest.raises(RuntimeError, match="before the result of the first was taken"):
        queue.start(batch(1, 2))
    expected = encoder.embed(torch.from_numpy(np.stack(batch(2, 0))[:, 1])).numpy()
    np.testing.assert_array_equal(first.result()[0][:, 1], expected)

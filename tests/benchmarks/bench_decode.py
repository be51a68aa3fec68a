"""Decoding for a cache build: threads against processes, and reduced-size decoding against the reference.

    python tests/benchmarks/bench_decode.py [WORKERS] [SIDE]

Prints images per second of decode and resize to SIDE pixels with WORKERS threads and with as many processes (which
return their pixels, as a build needs them), in alternation; then, with `pillow-draft`, its rate over the reference's
and the cosine of an ImageNet classifier's embeddings of the same images decoded both ways. The images are the
photographs that ship with scikit-learn and matplotlib, complete and in random crops of at least half their sides.
"""

import io
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from threetowers.cache.encoders.encoder import ImageEncoder
from threetowers.cache.encoders.names import EncoderOptions, load_frozen_encoder
from threetowers.cache.format.manifest import DecodeMode
from threetowers.cache.webdataset.images import decode_rgb

ROUNDS = 3
CROPS = 30  # of each photograph
ENCODER: list[ImageEncoder] = []  # in each worker process, loaded once


def photographs() -> list[bytes]:
    """Return real JPEGs, and JPEGs of random crops of them."""
    rng = np.random.default_rng(0)
    found = []
    for package, files in (
        ("sklearn", ("datasets/images/china.jpg", "datasets/images/flower.jpg")),
        ("matplotlib", ("mpl-data/sample_data/grace_hopper.jpg",)),
    ):
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for file in files:
            data = (Path(spec.origin).parent / file).read_bytes()
            found.append(data)
            image = Image.open(io.BytesIO(data)).convert("RGB")
            for _ in range(CROPS):
                width, height = (int(side * rng.uniform(0.5, 1)) for side in image.size)
                left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
                buffer = io.BytesIO()
                image.crop((left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
                found.append(buffer.getvalue())
    return found


def load_encoder(side: int, decode: DecodeMode = "pillow") -> ImageEncoder:
    """Return the classifier for images of SIDE pixels."""
    name = f"timm:tf_efficientnet_lite0@{side}:package:efficientnet-lite0"
    return load_frozen_encoder(name, EncoderOptions(decode=decode)).side("image")


def prepare(side: int, min_side: int | None, data: bytes) -> npt.NDArray[np.uint8]:
    """Decode and resize one image, as a build does."""
    if not ENCODER:
        ENCODER.append(load_encoder(side))
    return np.ascontiguousarray(ENCODER[0].transform(decode_rgb(data, min_side=min_side)))


def rate(pool: Executor, work: Callable[[bytes], npt.NDArray[np.uint8]], data: list[bytes]) -> float:
    """Return images per second."""
    started = time.perf_counter()
    for _ in pool.map(work, data):
        pass
    return len(data) / (time.perf_counter() - started)


def main(workers: int, side: int) -> None:
    """Measure and print."""
    data = photographs()
    reference = load_encoder(side)
    draft = load_encoder(side, "pillow-draft")
    full = partial(prepare, side, None)
    fast = partial(prepare, side, draft.min_side)
    with ThreadPoolExecutor(workers) as threads, ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        for pool in (threads, processes):
            list(pool.map(full, data[: 4 * workers]))  # load the encoder everywhere
        rounds = [
            (rate(threads, full, data), rate(processes, full, data), rate(threads, fast, data)) for _ in range(ROUNDS)
        ]
    by_thread, by_process, by_draft = np.median(rounds, axis=0)
    print(f"{len(data)} photographs, {side} px, {workers} workers: threads {by_thread:.0f} img/s, processes", end=" ")
    print(f"{by_process:.0f} img/s: {by_thread / by_process:.2f} x")
    pixels = [np.stack([work(item) for item in data]) for work in (full, fast)]
    import torch

    with torch.inference_mode():
        a, b = (reference.embed(torch.from_numpy(some)).numpy() for some in pixels)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    reduced = sum(bool((x != y).any()) for x, y in zip(*pixels, strict=True))
    print(
        f"pillow-draft, sides from {draft.min_side} px: {by_draft / by_thread:.2f} x the rate; {reduced} images",
        end=" ",
    )
    print(f"differ, cosine of embeddings min {cosine.min():.5f}, mean {cosine.mean():.6f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, int(sys.argv[2]) if len(sys.argv) > 2 else 64)

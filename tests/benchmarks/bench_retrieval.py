"""Retrieval at COCO's size: our ranks against the top-k one-hot of CLIP benchmarks, in time and peak memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_retrieval.py

Each runs in a process of its own, over the same random embeddings: 5,000 images, 25,010 captions, both directions.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from threetowers.eval.retrieval import KS, evaluate_retrieval

Recalls = list[float]  # image to text for each k, then text to image


def embeddings(images: int, captions: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(captions) % images
    image = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=1)
    noise = torch.randn(captions, width, generator=generator) / width**0.5
    return image, torch.nn.functional.normalize(image[owner] + 7 * noise, dim=1), owner


def ours(image: Tensor, text: Tensor, owner: Tensor) -> Recalls:
    result = evaluate_retrieval(image, text, torch.arange(len(image)), owner)
    return [*result.image_to_text.recall.values(), *result.text_to_image.recall.values()]


def one_hot(image: Tensor, text: Tensor, owner: Tensor, batch: int = 64) -> Recalls:
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owner] = True

    def hits(scores: Tensor, positive: Tensor, k: int) -> Tensor:
        top = torch.nn.functional.one_hot(scores.topk(k, dim=1).indices, num_classes=scores.shape[1])
        return (top * positive[:, None, :]).sum(dim=(1, 2)) > 0

    def recall(scores: Tensor, positive: Tensor, k: int) -> float:
        parts = zip(scores.split(batch), positive.split(batch), strict=True)
        return float(torch.cat([hits(s, p, k) for s, p in parts]).float().mean())

    return [recall(scores.T, positive.T, k) for k in KS] + [recall(scores, positive, k) for k in KS]


def resident(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure(method: Callable[..., Recalls], shape: tuple[int, int, int]) -> tuple[float, float, Recalls]:
    """Seconds, MiB above the embeddings at the peak, and the recalls."""
    sides = embeddings(*shape)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = resident("VmRSS"), time.perf_counter()
    recalls = method(*sides)
    return time.perf_counter() - start, resident("VmHWM") - before, recalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25010)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    found = {}
    for method in (ours, one_hot):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            shape = (options.images, options.captions, options.width)
            seconds, mebibytes, recalls = pool.apply(measure, (method, shape))
        found[method] = seconds, mebibytes, recalls
        print(f"{method.__name__:>8}: {seconds:7.2f} s, {mebibytes:6.0f} MiB at the peak, {np.round(recalls, 4)}")
    print(f"time: one-hot / ours = {found[one_hot][0] / found[ours][0]:.1f}")
    print(f"largest difference of a recall: {np.abs(np.subtract(found[ours][2], found[one_hot][2])).max():.1e}")


if __name__ == "__main__":
    main()

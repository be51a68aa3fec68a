"""Retrieval against clip-benchmark's metric, search from disk against FAISS in memory, embedding against a bare loop.

    python tests/benchmarks/bench_retrieval.py                  # all three, less than five minutes on two cores
    python tests/benchmarks/bench_retrieval.py disk --queries 2000

metric: 5,000 images x 25,010 captions, both directions, R@1, 5, 10; needs `pip install --no-deps clip-benchmark`.
disk:   the 10 nearest of 1,000,000 vectors of width 512, from a file, for 10,000 queries.
rate:   images/s of an encoder with decoding in a worker, over those of the model alone on decoded pixels.

Each method runs in its own process. Ratios are of measurements of one run.
"""

import argparse
import io
import multiprocessing
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from threetowers.eval.metrics.recall import RECALL_KS, evaluate_retrieval

K = 10
BLOCK = 10_000
PARTS = ["metric", "disk", "rate"]


def embeddings(images: int, captions: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, captions near their image, and the image of each caption."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(captions) % images
    image = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=1)
    noise = torch.randn(captions, width, generator=generator) / width**0.5
    return image, torch.nn.functional.normalize(image[owner] + 7 * noise, dim=1), owner


def ours(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    """Return the recalls of both directions by this package."""
    result = evaluate_retrieval(image, text, torch.arange(len(image)), owner)
    return [*result.image_to_text.recall.values(), *result.text_to_image.recall.values()]


def clip_benchmark(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    """Return the recalls of both directions by clip-benchmark."""
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owner] = True

    def recall(scores: Tensor, positive: Tensor, k: int) -> float:  # as its `evaluate` calls them, 64 images a batch
        return float((batchify(recall_at_k, scores, positive, 64, "cpu", k=k) > 0).float().mean())

    return [recall(scores.T, positive.T, k) for k in RECALL_KS] + [recall(scores, positive, k) for k in RECALL_KS]


def write_vectors(path: Path, rows: int, width: int) -> None:
    """Write random unit-norm vectors."""
    rng = np.random.default_rng(0)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    for start in range(0, rows, BLOCK):
        array[start : start + BLOCK] = random_unit_vectors(rng, min(BLOCK, rows - start), width)
    array.flush()


def random_unit_vectors(rng: np.random.Generator, rows: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return unit-norm vectors in random directions."""
    x = rng.standard_normal((rows, width), dtype=np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)


def from_disk(path: Path, queries: int, width: int) -> tuple[float, float, Any]:
    """Return seconds, MiB at the peak and neighbours of our search from the file."""
    from threetowers.eval.search.index import exact_search

    query = random_unit_vectors(np.random.default_rng(1), queries, width)
    reset_peak()
    started = time.perf_counter()
    ids = exact_search(np.load(path, mmap_mode="r"), query, K, device="cpu").ids_NK
    return time.perf_counter() - started, resident("VmHWM"), ids


def faiss_in_memory(path: Path, queries: int, width: int) -> tuple[float, float, Any]:
    """Return seconds, MiB at the peak and neighbours of FAISS with all vectors in memory."""
    import faiss

    index = faiss.IndexFlatIP(width)
    vectors = np.load(path, mmap_mode="r")
    for start in range(0, len(vectors), BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    query = random_unit_vectors(np.random.default_rng(1), queries, width)
    reset_peak()
    started = time.perf_counter()
    ids = index.search(query, K)[1]
    return time.perf_counter() - started, resident("VmHWM"), ids


def embedding_rate(model: str, images: int, size: int) -> tuple[float, float]:
    """Return images/s of the model alone and of its encoder, medians of alternating rounds."""
    import timm
    from safetensors.torch import save_file

    from threetowers.cache.webdataset.tar_index import index_tar
    from threetowers.eval.datasets.image_set import read_images
    from threetowers.eval.encoders.encoder import LoadOptions
    from threetowers.eval.encoders.load import load_encoder

    torch.set_num_threads(1)  # the other core decodes, as a GPU's host would
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        with tarfile.open(folder / "photos.tar", "w") as tar:
            for number in range(images):
                smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((size, size))
                buffer = io.BytesIO()
                smooth.save(buffer, "JPEG")
                for extension, data in (("jpg", buffer.getvalue()), ("txt", b"a photo")):
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        save_file(timm.create_model(model).state_dict(), folder / "w.safetensors")
        loading = LoadOptions(batch_size=32, workers=1, device="cpu")
        encoder: Any = load_encoder(f"timm:{model}:{folder / 'w.safetensors'}", loading)
        data = read_images([index_tar(str(folder / "photos.tar"))])
        teacher = encoder.teacher
        pixels = torch.zeros(32, 3, *teacher.preprocessing.input_size, dtype=torch.uint8)

        def bare() -> float:
            started = time.perf_counter()
            for start in range(0, images, 32):
                teacher.embed(pixels[: images - start])
            return images / (time.perf_counter() - started)

        def whole() -> float:
            started = time.perf_counter()
            encoder.images(data, data.images)
            return images / (time.perf_counter() - started)

        bare()
        rounds = [(bare(), whole()) for _ in range(3)]
        middle = np.median(rounds, axis=0)
        return float(middle[0]), float(middle[1])


def reset_peak() -> None:
    """Reset the peak of this process's memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> float:
    """Return the MiB of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def measure_recalls(
    method: Callable[..., list[float]], shape: tuple[int, int, int]
) -> tuple[float, float, list[float]]:
    """Return seconds, MiB above the embeddings at the peak, and the recalls."""
    sides = embeddings(*shape)
    reset_peak()
    before = resident("VmRSS")
    start = time.perf_counter()
    recalls = method(*sides)
    return time.perf_counter() - start, resident("VmHWM") - before, recalls


def in_own_process(function: Callable[[], Any]) -> Any:
    """Return the result of a function in a spawned process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def bench_metric(shape: tuple[int, int, int]) -> None:
    """Compare the retrieval metric with clip-benchmark's."""
    found = {}
    for method in (ours, clip_benchmark):
        seconds, mebibytes, recalls = found[method] = in_own_process(partial(measure_recalls, method, shape))
        memory = f"{mebibytes:6.0f} MiB above the embeddings"
        print(f"{method.__name__:>15}: {seconds:7.2f} s, {memory}, {np.round(recalls, 4)}")
    print(f"metric: clip-benchmark / ours = {found[clip_benchmark][0] / found[ours][0]:.1f} (to reach: 5)")
    worst = np.abs(np.subtract(found[ours][2], found[clip_benchmark][2])).max()
    print(f"metric: largest difference of a recall: {worst:.1e}; one image of {shape[0]:,} is {1 / shape[0]:.1e}")


def bench_disk(rows: int, queries: int, width: int, folder: Path | None) -> None:
    """Compare the search from disk with FAISS in memory."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "vectors.npy"
        write_vectors(path, rows, width)
        found = {f: in_own_process(partial(f, path, queries, width)) for f in (from_disk, faiss_in_memory)}
    for method, (seconds, mebibytes, _) in found.items():
        print(f"{method.__name__:>15}: {seconds:7.2f} s, {mebibytes:6.0f} MiB resident at the peak")
    print(f"disk: ours / FAISS in memory = {found[from_disk][0] / found[faiss_in_memory][0]:.2f} (to reach: 1.3)")
    same = (found[from_disk][2] == found[faiss_in_memory][2]).mean()
    print(f"disk: {same:.4%} of the neighbours are the same row at the same rank")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="metric, disk, rate; by default all three")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25010)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the file of vectors is written (2 GB)")
    parser.add_argument("--model", default="resnet18")
    options = parser.parse_args()
    what = options.what or PARTS
    if unknown := sorted(set(what) - set(PARTS)):
        parser.error(f"{unknown}: expected some of {PARTS}")
    if "metric" in what:
        bench_metric((options.images, options.captions, options.width))
    if "disk" in what:
        bench_disk(options.rows, options.queries, options.width, options.folder)
    if "rate" in what:
        # Not in its own process: a spawned process would spawn its workers, where a user's process forks them.
        bare, whole = embedding_rate(options.model, 512, 256)
        print(f"rate: {whole:.1f} of {bare:.1f} images/s: {whole / bare:.3f} (to reach: 0.95)")


if __name__ == "__main__":
    main()

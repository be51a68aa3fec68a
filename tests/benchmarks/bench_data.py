"""Sequential access against random access and against webdataset alone, on local tars.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_data.py        # about two minutes

Prints one line a figure: ratios of the medians of measurements taken in alternation in this run, with one worker.
Images are synthetic (JPEG, 480 x 360), as in bench_cache.py; rows are read from a cache with either access.
"""

import argparse
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import webdataset
from bench_cache import BATCH, alternate, draw, run_of, timed
from torch import Tensor
from torch.utils.data import DataLoader

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.webdataset.images import decode_rgb
from threetowers.trainer.config import TrainConfig
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.run_samples import open_samples
from threetowers.trainer.data.transforms import center_crop

STEPS = 18


def loader_timing(folder: Path, config: TrainConfig, start: int, steps: int, skipped: int = 1) -> Callable[[], float]:
    """Return a function that takes the seconds of `steps` steps, after `skipped` untimed ones from step `start`."""
    samples = open_samples(config, folder)
    tokenizer = load_named_tokenizer(config.data.tokenizer)

    def measure() -> float:
        batches = iter(training_loader(config, samples, tokenizer, 0, 1, start, start + skipped + steps))
        for _ in range(skipped):
            next(batches)
        return timed(lambda: deque(batches, maxlen=0))

    return measure


def webdataset_timing(config: TrainConfig) -> Callable[[], float]:
    """Return a function that takes the seconds of webdataset alone: no rows, no checks, no exact resume.

    It reads the same tars through a shuffle buffer, with the same decoding and tokens.
    """
    tokenizer = load_named_tokenizer(config.data.tokenizer)
    size = config.data.image_size

    def prepare(sample: dict[str, Any]) -> tuple[Tensor, Tensor]:
        tokens_1L = tokenizer.encode([sample["txt"].decode()], 32)
        return center_crop(decode_rgb(sample["jpg"]), size), tokens_1L[0]

    def measure() -> float:
        data = webdataset.WebDataset(config.data.tars, shardshuffle=False, empty_check=False).shuffle(100)
        batches = iter(DataLoader(data.map(prepare), batch_size=BATCH, num_workers=1, prefetch_factor=4))
        next(batches)
        return timed(lambda: deque((next(batches) for _ in range(STEPS)), maxlen=0))

    return measure


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = run_of(folder, draw(folder, 4, 5 * BATCH), True)
        random = replace(config, data=replace(config.data, access="random"))
        sequential = replace(config, data=replace(config.data, access="sequential", num_streams=8, shuffle_buffer=400))

        # Throughput
        timings = [loader_timing(folder, random, 0, STEPS), loader_timing(folder, sequential, 0, STEPS)]
        seconds_random, seconds_sequential, seconds_webdataset = alternate(rounds, *timings, webdataset_timing(config))
        rate = STEPS * BATCH / seconds_sequential
        print(f"sequential / random access (rate)          {seconds_random / seconds_sequential:6.3f}", end="")
        print(f"  ({rate:.0f} images/s)")
        print(f"sequential / webdataset alone (rate)       {seconds_webdataset / seconds_sequential:6.3f}")

        # Latency of a resumed run
        first = loader_timing(folder, sequential, 0, 1, skipped=0)
        middle = loader_timing(folder, sequential, 15, 1, skipped=0)
        fresh, resumed = alternate(rounds, first, middle)
        print(f"seconds to the first batch: of an epoch    {fresh:6.3f}; resumed at three quarters of it {resumed:.3f}")


if __name__ == "__main__":
    main()

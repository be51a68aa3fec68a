"""Streaming against random access and against webdataset alone, on local tars: what the lanes and their order cost.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_data.py        # about two minutes

Prints one line a figure: ratios of the medians of measurements taken in alternation in this run, with one worker.
Pictures are drawn (JPEG, 480 x 360), as in bench_cache.py; rows are read from a cache in both ways of reading.
"""

import argparse
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import webdataset
from bench_cache import BATCH, alternate, draw, run_of, timed
from torch.utils.data import DataLoader

from threetowers.cache.webdataset.images import decode_rgb
from threetowers.trainer.config import TrainConfig
from threetowers.trainer.data.crops import center
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.sample_set import open_samples
from threetowers.trainer.tokenizer import Tokenizer

STEPS = 18


def reading(folder: Path, run: TrainConfig, start: int, steps: int, skipped: int = 1) -> Callable[[], float]:
    """Seconds of so many steps, after `skipped` of them."""
    samples, tokenizer = open_samples(run, folder), Tokenizer.load(run.data.tokenizer)

    def once() -> float:
        batches = iter(training_loader(run, samples, tokenizer, 0, 1, start, start + skipped + steps))
        for _ in range(skipped):
            next(batches)
        return timed(lambda: deque(batches, maxlen=0))

    return once


def plain(run: TrainConfig) -> Callable[[], float]:
    """Webdataset as it is used alone: tars, shuffle buffer, the same decoding, no rows, no checks, no resume."""
    tokenizer, size = Tokenizer.load(run.data.tokenizer), run.data.image_size

    def once() -> float:
        data = webdataset.WebDataset(run.data.tars, shardshuffle=False, empty_check=False).shuffle(100)
        ready = data.map(lambda s: (center(decode_rgb(s["jpg"]), size), tokenizer.encode([s["txt"].decode()], 32)[0]))
        batches = iter(DataLoader(ready, batch_size=BATCH, num_workers=1, prefetch_factor=4))
        next(batches)
        return timed(lambda: deque((next(batches) for _ in range(STEPS)), maxlen=0))

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = run_of(folder, draw(folder, 4, 5 * BATCH), True)
        indexed = replace(run, data=replace(run.data, access="random"))
        streamed = replace(run, data=replace(run.data, access="sequential", num_streams=8, shuffle_buffer=400))
        ways = (reading(folder, r, 0, STEPS) for r in (indexed, streamed))
        at_random, in_lanes, alone = alternate(rounds, *ways, plain(run))
        rate = STEPS * BATCH / in_lanes
        print(f"streamed / indexed (rate)                  {at_random / in_lanes:6.3f}  ({rate:.0f} images/s)")
        print(f"streamed / webdataset alone (rate)         {alone / in_lanes:6.3f}")
        first, middle = (reading(folder, streamed, start, 1, skipped=0) for start in (0, 15))
        fresh, resumed = alternate(rounds, first, middle)
        print(f"seconds to the first batch: of an epoch    {fresh:6.3f}; resumed at three quarters of it {resumed:.3f}")


if __name__ == "__main__":
    main()

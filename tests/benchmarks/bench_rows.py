"""A run whose towers are all cached, against the same steps on batches that are sliced from arrays in memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_rows.py                 # about two minutes
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_rows.py --in-process    # on a machine that does other things

Steps are complete, through DeepSpeed in one process: forward, losses, backward, optimizer; the loader has one worker.
Without it everything is done by the training process, whose CPU time other processes hardly change.
Rows are random: 10,000 samples with an image of width 1,024 and one to eight captions of width 384 each. Prints ratios
of the medians of measurements taken in alternation in this run. With --groups the samples have groups, which are read
from a tar before the first step, or with --groups steps as each sample is used.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_cache import SHARD_DIM, SHARD_ROWS, TEXT_DIM, alternate, random_cache, random_text_cache
from torch import Tensor

from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_headers import Member
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar
from threetowers.trainer.config import TrainConfig, parse
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.joins.tar_groups import TarGroups
from threetowers.trainer.data.joins.text_join import TextJoin
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.mixture import MixtureComponent
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.engine import deepspeed_config, join_process_group, num_micro_batches, start_engine
from threetowers.trainer.grad_cache import GradCache
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.agreed_step import AgreedStep

BATCH, STEPS = 1024, 20
HEADS: dict[str, dict[str, Any]] = {"linear": {}, "mlp": {"kind": "mlp", "hidden": 1024}}


def run_of(folder: Path, head: dict[str, Any], access: str, workers: int) -> TrainConfig:
    """A run on both caches."""
    towers = {
        "image": {"kind": "cache", "path": str(folder / "image")},
        "text": {"kind": "cache", "of": "text", "path": str(folder / "text")},
    }
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "global_batch_size": BATCH,
        "duration": {"epochs": 1},
        "embed_dim": 256,
        "data": {"tars": ["/0.tar"], "workers": workers, "access": access, "shuffle_buffer": 2 * BATCH},
        "towers": towers,
        "heads": {"f": {"of": "image"} | head, "g": {"of": "text"} | head},
        "terms": {"image-text": {"x": "f", "y": "g"}},
        "deploy": {"image": "f", "text": "g"},
        "engine": {"precision": "float32"},
    }
    return parse(tree)


def write_groups(path: Path) -> TarIndex:
    """A tar of a json member a sample, as captioned samples have it, with the fingerprint that the caches expect."""
    with tarfile.open(path, "w") as archive:
        for k in range(SHARD_ROWS):
            fields = {"concept": f"concept {k // 3}", "captions": [f"caption {i} of {k}" for i in range(4)]}
            data = json.dumps(fields).encode()
            info = tarfile.TarInfo(f"{k}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return replace(index_tar(path), fingerprint="0")


def samples_of(folder: Path, sequential: bool, groups: str | None) -> SampleSet:
    """The samples of both caches; no tar is opened, but for groups."""
    listed = SampleList([(str(k), {"json": Member(0, 1)}) for k in range(SHARD_ROWS)])
    tars = [write_groups(folder / "0.tar") if groups else TarIndex("/0.tar", 1, "0", listed, {})]
    joins = {"image": ImageJoin(folder / "image", tars), "text": TextJoin(folder / "text", tars)}
    component = MixtureComponent("", range(1), BATCH, group_field="concept" if groups else None)
    ahead = {0: TarGroups.read(tars[0], "concept")} if groups == "ahead" else {}
    return SampleSet(tars, joins, [component], sequential, reads_words=False, groups=ahead)


def step_of(config: TrainConfig) -> Callable[[dict[str, Tensor]], object]:
    """A training step of a run."""
    world = join_process_group()
    torch.manual_seed(0)
    model = TowerModel(config, None, {"image": SHARD_DIM, "text": TEXT_DIM})
    engine = start_engine(model, config, deepspeed_config(config, world.size))
    micro_batches = num_micro_batches(config, world.size)
    grad_cache = GradCache(engine, partial(total_loss, config), micro_batches, seed=0, rank=0, device=world.device)
    agreed_step = AgreedStep(engine, config.optim.grad_clip_norm, world.device)
    return lambda inputs: agreed_step(grad_cache(inputs, 0, None))


def sliced() -> Iterator[dict[str, Tensor]]:
    """Batches of arrays in memory, in random order."""
    rng = np.random.default_rng(0)
    arrays = {"image": SHARD_DIM, "text": TEXT_DIM}
    rows = {name: rng.normal(size=(SHARD_ROWS, dim)).astype(np.float32) for name, dim in arrays.items()}
    while True:
        chosen = rng.permutation(SHARD_ROWS)[:BATCH]
        yield {name: torch.from_numpy(rows_nD[chosen]) for name, rows_nD in rows.items()}


class Measured:
    """The steps of a run, and those on sliced arrays, by one clock."""

    def __init__(self, config: TrainConfig, samples: SampleSet, clock: Callable[[], float]) -> None:
        self._config = config
        self._samples = samples
        self._clock = clock
        self._step = step_of(config)
        self._in_memory = sliced()
        self._waited: list[float] = []

    def run(self) -> float:
        """Return the seconds of the steps of the run, after two that do not count."""
        batches = iter(training_loader(self._config, self._samples, None, 0, 1, 0, STEPS + 2))
        for _ in range(2):
            self._step(next(batches).inputs)
        began = self._clock()
        waited = 0.0
        for _ in range(STEPS):
            asked = self._clock()
            batch = next(batches)
            waited += self._clock() - asked
            self._step(batch.inputs)
        seconds = self._clock() - began
        self._waited.append(waited / seconds)
        return seconds

    def floor(self) -> float:
        """Return the seconds of as many steps on sliced arrays."""
        began = self._clock()
        for _ in range(STEPS):
            self._step(next(self._in_memory))
        return self._clock() - began

    @property
    def data_wait(self) -> float:
        """The share of a run's time that is spent until its batches are there, in the median."""
        return statistics.median(self._waited)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--in-process", action="store_true", help="without a worker, by CPU time")
    parser.add_argument("--groups", nargs="?", choices=("ahead", "steps"), const="ahead", help="when they are read")
    options = parser.parse_args()
    clock = time.process_time if options.in_process else time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_cache(folder / "image")
        random_text_cache(folder / "text")
        for kind, head in HEADS.items():
            for access in ("random", "sequential"):
                config = run_of(folder, head, access, workers=0 if options.in_process else 1)
                measured = Measured(config, samples_of(folder, access == "sequential", options.groups), clock)
                ours, theirs = alternate(options.rounds, measured.run, measured.floor)
                how = f"data wait {measured.data_wait:.1%}, <= 5 %"
                if options.in_process:
                    how = f"no worker, CPU time; {measured.data_wait:.1%} of it for the batches"
                print(
                    f"rows alone, {access:<10} {kind:<6} heads / sliced arrays (rate) {theirs / ours:6.3f}  (>= 0.7; "
                    f"{STEPS * BATCH / ours:,.0f} samples/s, {how})",
                    flush=True,
                )


if __name__ == "__main__":
    main()

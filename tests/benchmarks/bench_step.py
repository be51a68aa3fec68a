"""The cost of a training step at the demo's size: the third tower cached and live, waiting for data, memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py            # under five minutes; needs `make demo` once
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py --memory   # global batches of 1k to 32k; some ten minutes
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py --captions # captions padded or not; two minutes
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py --text-tower --cpu-time   # 3t-text over 3t; two minutes

--text-tower compares configs/emoji/3t-text.yaml with 3t.yaml on a batch of the demo's own data and caches. Call it at
the root of the repository, after `make demo` and the build of the cache of captions that 3t-text.yaml names. --cpu-time
is for a machine that does other things.

Steps are complete, through DeepSpeed in one process: forward, losses, backward, optimizer. Variants are measured in
turns, so that a busy machine slows all of them; a ratio is the median over rounds of the ratio within a round, and the
ratio of the best times. The teachers have random weights: time does not depend on them. Memory is measured in a process
for each batch: its peak during a step above its size before (Linux).
"""

import argparse
import json
import multiprocessing
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS
from threetowers.trainer.config import TrainConfig, load_config
from threetowers.trainer.data.batch import Batch
from threetowers.trainer.data.caption_corpus import read_corpus
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.run_samples import open_samples
from threetowers.trainer.engine import deepspeed_config, join_process_group, num_micro_batches, start_engine
from threetowers.trainer.grad_cache import GradCache
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.optimizer.agreed_step import AgreedStep

ROOT = Path(__file__).parents[2]
VOCABULARY = 4096  # of the demo's tokenizer
WIDTHS = {"image": 1280, "text": 384}  # of the demo's teacher, and of a small sentence encoder
TEACHERS = (("tf_efficientnet_lite0", 160), ("vit_small_patch16_224", 224), ("vit_base_patch16_224", 224))
DEMO = ("runs/emoji/cache", "runs/emoji/cache-text", "runs/emoji/tokenizer.model")
Step = Callable[[], object]


def demo(name: str, **changes: Any) -> TrainConfig:
    """Return a config of the demo, with changes by dotted key."""
    return load_config(
        ROOT / "configs" / "emoji" / f"{name}.yaml", [f"{key}={value}" for key, value in changes.items()]
    )


def inputs(config: TrainConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    size, context = config.data.image_size, config.data.context_length
    made = {
        "timm": lambda: torch.randint(
            0, 256, (config.global_batch_size, 3, size, size), generator=g, dtype=torch.uint8
        ),
        "text": lambda: torch.randint(2, VOCABULARY, (config.global_batch_size, context), generator=g),
    }
    made |= {
        f"cache of {side}": partial(torch.randn, config.global_batch_size, width, generator=g)
        for side, width in WIDTHS.items()
    }
    kinds = {
        name: f"cache of {config.side_of(name)}" if tower.kind == "cache" else tower.kind
        for name, tower in config.towers.items()
    }
    return {name: made[kind]() for name, kind in kinds.items()}


def demo_batch(config: TrainConfig) -> Batch:
    """Return the first batch of a run on the demo's tars and caches."""
    with tempfile.TemporaryDirectory() as folder:
        samples = open_samples(config, Path(folder))
        tokenizer = load_named_tokenizer(str(config.data.tokenizer))
        return next(iter(training_loader(config, samples, tokenizer, rank=0, world_size=1, start=0, stop=1)))


def training_step(
    config: TrainConfig, of_demo: Batch | None = None, tokenizer: Tokenizer | None = None
) -> tuple[Step, dict[str, Tensor]]:
    """Return a step of the run, always on the same batch, and that batch, which may be changed in place.

    The batch is random, or one of the demo.
    """
    world = join_process_group()
    torch.manual_seed(0)
    rows, end_id = (VOCABULARY, END) if tokenizer is None else (tokenizer.vocab_size, tokenizer.special.end)
    widths = {name: WIDTHS[config.side_of(name)] for name in config.towers_reading("rows")}
    model = TowerModel(config, rows, widths, end_id)
    engine = start_engine(model, config, deepspeed_config(config, world.size))
    micro_batches = num_micro_batches(config, world.size)
    grad_cache = GradCache(engine, partial(total_loss, config), micro_batches, seed=0, rank=0, device=world.device)
    agreed_step = AgreedStep(engine, config.optim.grad_clip_norm, world.device)
    batch = of_demo.inputs if of_demo else inputs(config)
    random_b = torch.arange(config.global_batch_size) % max(2, config.global_batch_size * 3 // 10)
    groups_b = of_demo.groups_b if of_demo else random_b

    def step() -> None:
        agreed_step(grad_cache(batch, 0, groups_b))

    return step, batch


def in_turns(
    steps: dict[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return the seconds of each step by round; a first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            started = clock()
            step()
            seconds[name].append(clock() - started)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> str:
    median = statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
    return f"{median:.3f} (median over rounds), {min(seconds[over]) / min(seconds[under]):.3f} (best times)"


def print_seconds(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        print(f"{name:>7}: {min(values):.3f} s a step of 256 at best, {statistics.median(values):.3f} s in the median")


def cached_tower(rounds: int, clock: Callable[[], float]) -> None:
    seconds = in_turns({name: training_step(demo(name))[0] for name in ("clip", "3t")}, rounds, clock)
    print_seconds(seconds)
    print(f"3T with a cache / CLIP on the same two towers: {ratio(seconds, '3t', 'clip')}; at most 1.05 is the aim")


def cached_text_tower(rounds: int, clock: Callable[[], float]) -> None:
    """Time the demo's 3T with a fourth tower of cached text beside 3T, on the same samples."""
    configs = {name: demo(name, **{"data.workers": 0}) for name in ("3t", "3t-text")}
    missing = [path for path in DEMO if not (ROOT / path).exists()]
    if missing:
        print(f"3T with a cached text tower, too / 3T: not measured: {', '.join(missing)} missing; see the docstring")
        return
    steps = {name: training_step(config, demo_batch(config))[0] for name, config in configs.items()}
    seconds = in_turns(steps, rounds, clock)
    print_seconds(seconds)
    print(f"3T with a cached text tower, too / 3T: {ratio(seconds, '3t-text', '3t')}; at most 1.03 is the aim")


def live_teachers(rounds: int, batch: int) -> None:
    import timm

    step, given = training_step(demo("3t", global_batch_size=batch))
    for name, size in TEACHERS:
        teacher = timm.create_model(name, pretrained=False, num_classes=0).eval()
        images = torch.randn(batch, 3, size, size)

        def live(teacher: Any = teacher, images: Tensor = images) -> None:
            with torch.inference_mode():
                rows_bD = teacher(images)
            width = min(WIDTHS["image"], rows_bD.shape[1])
            given["third"][:, :width] = rows_bD[:, :width]
            step()

        seconds = in_turns({"cached": step, "live": live}, rounds)
        count = sum(p.numel() for p in teacher.parameters()) / 1e6
        print(f"live / cached, batch {batch}, {name} ({count:.0f} M, {size} px): {ratio(seconds, 'live', 'cached')}")


def padded_captions(rounds: int, batch: int) -> None:
    """Time a step whose text tower dominates, on captions of 4 to 20 words: as they are, and padded to 77 tokens."""
    tokenizer = load_named_tokenizer("open_clip:ViT-B-32")
    tars = [str(path) for path in sorted((ROOT / "data" / "emoji").glob("*.tar"))]
    words = re.findall(r"[a-z]+", " ".join(read_corpus(tars, DEFAULT_CAPTIONS, limit=10_000).captions))
    draw = random.Random(0)
    captions = [" ".join(draw.choices(words, k=draw.randint(4, 20))) for _ in range(batch)]
    steps, lengths = {}, []
    for padding in ("context_length", "longest"):
        config = demo(
            "clip",
            global_batch_size=batch,
            **{
                "data.context_length": 77,
                "data.caption_padding": padding,
                "towers.text": "{kind: text, width: 256, depth: 6, heads: 4, causal: true}",
            },
        )
        steps[padding], given = training_step(config, tokenizer=tokenizer)
        given["text"] = tokenizer.encode(captions, 77, config.caption_padding)
        lengths.append(given["text"].shape[1])
    seconds = in_turns(steps, rounds)
    means = statistics.mean(len(row.ids) for row in tokenizer.tokenize(captions, 77))
    print(
        f"captions of 4 to 20 words ({means:.0f} tokens on average), batch {batch}: padded to {lengths[0]} over padded "
        f"to the longest, {lengths[1]}: {ratio(seconds, 'context_length', 'longest')}; at least 1.5 is the aim"
    )


def waiting(steps: int) -> None:
    """Time a real run on the demo's data, by the command line, with two workers."""
    with tempfile.TemporaryDirectory() as folder:
        changes = [
            f"output_dir={folder}/run",
            f"duration={{steps: {steps}}}",
            "data.workers=2",
            "log.tensorboard=false",
        ]
        command = [sys.executable, "-m", "threetowers", "train", "configs/emoji/3t.yaml", *changes]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            print(f"waiting for data: not measured: {result.stderr.strip().splitlines()[-1]}")
            return
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    print(
        f"waiting for data, 3T with two workers: {summary['data_wait']:.1%} of {steps} steps after warm-up, "
        f"{summary['images_per_s']:.0f} images/s; at most 5 % is the aim"
    )


def resident(field: str) -> float:
    """Return the MiB of this process: `VmRSS` now, `VmHWM` at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory_of(batch: int, micro_batch: int) -> tuple[float, float, float]:
    """Return the MiB before the first step and at the peak of a step, and its seconds."""
    step, _ = training_step(demo("3t", global_batch_size=batch, **{"engine.micro_batch_size": micro_batch}))
    before, started = resident("VmRSS"), time.perf_counter()
    step()
    return before, resident("VmHWM"), time.perf_counter() - started


def memory(batches: list[int], micro_batch: int) -> None:
    peaks = []
    for batch in batches:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, peak, seconds = pool.apply(memory_of, (batch, micro_batch))
        peaks.append(peak)
        print(
            f"batch {batch:>6} in micro-batches of {micro_batch}: {peak:6.0f} MiB at the peak, {before:6.0f} before, "
            f"{seconds:.0f} s"
        )
    slope, start = np.polyfit(batches, peaks, 1)
    off = np.abs(np.polyval((slope, start), batches) - peaks).max()
    print(f"peak = {start:.0f} MiB + {slope * 1024:.1f} KiB a sample; {off:.0f} MiB off that line at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of 3T and CLIP, and of 3T with text and 3T")
    parser.add_argument("--text-tower", action="store_true", help="3T with a cached text tower, and nothing else")
    parser.add_argument("--cpu-time", action="store_true", help="of this process, instead of wall time")
    parser.add_argument("--teacher-rounds", type=int, default=2)
    parser.add_argument("--teacher-batch", type=int, default=32)
    parser.add_argument("--wait-steps", type=int, default=60)
    parser.add_argument("--memory", action="store_true", help="memory against the batch, and nothing else")
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--captions", action="store_true", help="the padding of captions, and nothing else")
    parser.add_argument("--caption-rounds", type=int, default=5)
    parser.add_argument("--caption-batch", type=int, default=256)
    options = parser.parse_args()
    if options.captions:
        padded_captions(options.caption_rounds, options.caption_batch)
        return
    if options.memory:
        memory(options.batches, options.micro_batch)
        return
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.text_tower:
        cached_text_tower(options.rounds, clock)
        return
    waiting(options.wait_steps)  # first: this process joins no group of ranks before
    cached_tower(options.rounds, clock)
    cached_text_tower(options.rounds, clock)
    live_teachers(options.teacher_rounds, options.teacher_batch)


if __name__ == "__main__":
    main()

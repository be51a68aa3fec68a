"""A training step as the trainer makes it: time by towers, method, precision, ZeRO stage; where the host waits.

The trainer is the real one, with its own step, on a real config. Only the loader is replaced, by one that always has a
batch ready in pinned memory, so that reading and decoding play no part. Beside it a plain loop, which is what a user of
open_clip has: float32 weights under autocast, fused AdamW, a loss that keeps all logits.
"""

import gc
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.gpu.host_waits import HostWaits
from tests.gpu.predictions import MOST_WAITS
from tests.gpu.setting import Setting
from tests.gpu.steps.photographs import Photographs
from tests.gpu.timing import wait
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.processes.stop_request import StopRequest
from threetowers.cache.processes.world import World
from threetowers.trainer.config import TrainConfig, parse
from threetowers.trainer.data.batch import Batch, join_parts
from threetowers.trainer.engine import join_process_group
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.train import Trainer

WARM_UP, TIMED = 4, 10  # steps

IMAGE_TOWERS = {"S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}


@dataclass(frozen=True)
class Variant:
    """One way to train. `looked_into`: also count the host's waits, and the share of the step that kernels take."""

    name: str
    tower: str = "B"
    batch: int = 256
    third: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    looked_into: bool = False


MIXED = {"precision": "mixed", "zero_stage": 1}
VARIANTS = [
    Variant("CLIP B/16, mixed, ZeRO 1", engine=MIXED, looked_into=True),
    Variant("3T B/16, mixed, ZeRO 1", third=True, engine=MIXED, looked_into=True),
    Variant("CLIP B/16, bfloat16, ZeRO 1", engine=MIXED | {"precision": "bfloat16"}),
    Variant("CLIP B/16, mixed, ZeRO 1, micro-batches of 64", engine=MIXED | {"micro_batch_size": 64}, looked_into=True),
    Variant("CLIP B/16, mixed, ZeRO 2", engine=MIXED | {"zero_stage": 2}, looked_into=True),
    Variant("CLIP B/16, mixed, ZeRO 0", engine=MIXED | {"zero_stage": 0}),
    Variant("CLIP B/16, float32, ZeRO 1", engine=MIXED | {"precision": "float32"}),
    Variant("CLIP S/16, mixed, ZeRO 1", tower="S", batch=512, engine=MIXED),
    Variant("3T S/16, mixed, ZeRO 1", tower="S", batch=512, third=True, engine=MIXED),
]


def run(setting: Setting) -> None:
    measure_all(setting, [variant for variant in VARIANTS if variant.tower == "B" or not setting.rehearse])
    measure_plain_loop(setting, Variant("plain loop, CLIP B/16"))


def measure_all(setting: Setting, variants: Sequence[Variant]) -> None:
    """Measure one variant after the other; raise AssertionError in the end if one of them failed."""
    world = join_process_group()
    failed = []
    for variant in variants:
        try:
            measure(setting, variant, world)
        except Exception:  # the others are worth their time
            traceback.print_exc()
            failed.append(variant.name)
        gc.collect()
        if not setting.rehearse:
            torch.cuda.empty_cache()
    assert not failed, f"failed: {'; '.join(failed)}"


def config_of(setting: Setting, variant: Variant) -> TrainConfig:
    """Return the run's config, on the photographs; tiny towers in a rehearsal."""
    data = Photographs.of(setting)
    image = {"kind": "timm", "model": IMAGE_TOWERS[variant.tower]}
    text = {"kind": "text", "width": 512, "depth": 12, "heads": 8, "causal": True}
    image_size, context, batch, width = 224, 77, variant.batch, 512
    engine = dict(variant.engine)
    if setting.rehearse:
        image = {"kind": "timm", "model": "test_vit", "args": {"img_size": 32}}
        text = {"kind": "text", "width": 16, "depth": 1, "heads": 2}
        image_size, context, batch, width = 32, 8, 8, 16
        if "micro_batch_size" in engine:
            engine["micro_batch_size"] = 4
    tree: dict[str, Any] = {
        "output_dir": str(setting.scratch / "steps" / "".join(c if c.isalnum() else "-" for c in variant.name)),
        "global_batch_size": batch,
        "duration": {"steps": 1000},
        "embed_dim": width,
        "data": {
            "tars": data.train_tars,
            "tokenizer": data.tokenizer,
            "image_size": image_size,
            "context_length": context,
        },
        "towers": {"image": image, "text": text},
        "heads": {"f": {"of": "image"}, "g": {"of": "text"}},
        "terms": {"image-text": {"x": "f", "y": "g"}},
        "deploy": {"image": "f", "text": "g"},
        "engine": engine,
        "log": {"every_steps": 1000, "tensorboard": False},
    }
    if variant.third:
        tree["towers"]["third"] = {"kind": "cache", "path": data.cache}
        tree["heads"] |= {"f_h": {"of": "f"}, "g_h": {"of": "g"}, "h_f": {"of": "third"}, "h_g": {"of": "third"}}
        tree["terms"] |= {"image-third": {"x": "f_h", "y": "h_f"}, "text-third": {"x": "g_h", "y": "h_g"}}
    return parse(tree)


def inputs_of(config: TrainConfig, vocabulary: int, third_width: int) -> dict[str, Tensor]:
    """Return random inputs of the towers for one batch, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    size, count = config.data.image_size, config.global_batch_size
    made = {
        "image": torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8),
        "text": torch.randint(3, vocabulary, (count, config.data.context_length), generator=generator),
        "third": torch.randn(count, third_width, generator=generator),
    }
    return {name: made[name] for name in config.towers}


class EnoughSteps(Exception):
    """Ends a run from its loader, once all has been measured."""


@dataclass
class Stopwatch:
    """A loader of always the same batch, which measures what happens from one request of it to the next."""

    batch: Batch
    device: torch.device
    looked_into: bool
    timed: int
    seconds: float = 0.0  # a step
    waits: Counter[str] | None = None
    kernels: "KernelShare | None" = None

    def batches(self) -> Iterator[Batch]:
        """Yield the batch for warm-up, then for timed steps, then for those that are looked into; then end the run."""
        # One more than asked for: the trainer copies a batch to the GPU while the one before is in use.
        for _ in range(WARM_UP + 1):
            yield self.batch
        wait(self.device)
        began = time.perf_counter()
        for _ in range(self.timed):
            yield self.batch
        wait(self.device)
        self.seconds = (time.perf_counter() - began) / self.timed
        if self.looked_into:
            with HostWaits() as waits:
                yield self.batch
            self.waits = waits.places
            with KernelShare() as self.kernels:
                yield self.batch
        raise EnoughSteps


class KernelShare:
    """What the GPU's kernels of a step take, by torch's profiler."""

    def __enter__(self) -> "KernelShare":
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        rows = [(event.self_device_time_total / 1e3, event.count, event.key) for event in self._profile.key_averages()]
        self.longest = sorted((row for row in rows if row[0]), reverse=True)
        self.milliseconds = sum(row[0] for row in self.longest)
        self.launches = sum(row[1] for row in self.longest)


def measure(setting: Setting, variant: Variant, world: World) -> None:
    """Train a few steps, and record their time, memory, and what is looked into."""
    config, device = config_of(setting, variant), setting.device
    vocabulary = SentencePieceTokenizer.load(config.data.tokenizer).vocab_size
    cuda = device.type == "cuda"
    inputs = inputs_of(config, vocabulary, THIRD_WIDTH)
    batch = Batch(inputs, {}, torch.arange(config.global_batch_size), ())
    batch = join_parts([batch], len(batch), pin_memory=cuda)
    looked_into = variant.looked_into and setting.gpu_only(f"host waits and kernels of {variant.name}")
    stopwatch = Stopwatch(batch, device, looked_into, 2 if setting.rehearse else TIMED)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with loader_replaced(stopwatch.batches), StopRequest.of_process().listening():
        trainer = Trainer(config, world)
        with suppress(EnoughSteps):
            trainer.train()
        trainer.engine.destroy()

    setting.record(variant.name, stopwatch.seconds * 1e3, "ms a step")
    setting.record(f"{variant.name}: images", config.global_batch_size / stopwatch.seconds, "images/s")
    if cuda:
        setting.record(f"{variant.name}: memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if stopwatch.waits is not None:
        count = stopwatch.waits.total()
        setting.record(f"{variant.name}: host waits", count, "a step")
        for place, number in stopwatch.waits.most_common():
            print(f"    {number} x {place}")
    if stopwatch.kernels is not None:
        kernels = stopwatch.kernels
        setting.record(f"{variant.name}: kernels", kernels.milliseconds / stopwatch.seconds / 10, "% of a step")
        setting.record(f"{variant.name}: launches", kernels.launches, "a step")
        for milliseconds, count, name in kernels.longest[:12]:
            print(f"    {milliseconds:8.2f} ms {count:5} x {name[:90]}")
    if stopwatch.waits is not None:
        assert stopwatch.waits.total() <= MOST_WAITS, f"{variant.name}: the host waits {stopwatch.waits.total()} times"


@contextmanager
def loader_replaced(batches: Callable[[], Iterator[Batch]]) -> Iterator[None]:
    """Give the trainer these batches in place of its loader's."""
    with mock.patch("threetowers.trainer.train.training_loader", side_effect=lambda *arguments, **options: batches()):
        yield


def measure_plain_loop(setting: Setting, variant: Variant) -> None:
    """Record the time of a step that uses nothing of the trainer but the towers."""
    config, device = config_of(setting, variant), setting.device
    vocabulary = SentencePieceTokenizer.load(config.data.tokenizer).vocab_size
    model = TowerModel(config, vocabulary, {}).to(device)
    inputs = {name: part.to(device) for name, part in inputs_of(config, vocabulary, THIRD_WIDTH).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    target_B = torch.arange(config.global_batch_size, device=device)
    count = 2 if setting.rehearse else TIMED
    with tensor_float_32():
        for number in range(WARM_UP + count):
            if number == WARM_UP:
                wait(device)
                began = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                outputs = model(inputs)
                x_BD, y_BD = outputs.embeddings["f"], outputs.embeddings["g"]
                (log_scale,) = outputs.log_scales.values()
                scale = log_scale.exp()
                both = cross_entropy(scale * x_BD @ y_BD.T, target_B) + cross_entropy(scale * y_BD @ x_BD.T, target_B)
            (both / 2).backward()
            optimizer.step()
        wait(device)
    setting.record(variant.name, (time.perf_counter() - began) / count * 1e3, "ms a step")


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Allow it in products, as open_clip's training does."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


THIRD_WIDTH = 64  # of the cache that the photographs come with

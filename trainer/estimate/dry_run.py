"""A run without running it: everything is built on the meta device, and the start-up page is what remains."""

from pathlib import Path

import torch

from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.tar_index import expand, index_tar
from threetowers.trainer.config import CacheTower, ConfigError, TrainConfig
from threetowers.trainer.engine import deepspeed_config
from threetowers.trainer.estimate.cost import TeacherCost, meta_model
from threetowers.trainer.estimate.summary import Held, startup_page
from threetowers.trainer.optimizer.optimizer import parameter_groups
from threetowers.trainer.tokenizer import Tokenizer


def dry_run(run: TrainConfig, world: int = 1) -> list[str]:
    """Return the start-up page of a run on `world` ranks, in seconds and little memory whatever its size.

    Needs neither tars nor caches nor a tokenizer, as long as the config says what would be read from them. Raises
    ConfigError for what it does not say, and what training would raise for towers, heads, terms and layout.
    """
    held = _held(run)
    if held is None and run.duration.epochs is not None:
        raise ConfigError(
            f"duration.epochs: the length of an epoch is unknown without {run.data.patterns}; give samples"
        )
    teachers = {name: _teacher(name, tower) for name, tower in run.towers.items() if isinstance(tower, CacheTower)}
    vocab_size = _vocab_size(run)
    steps = run.duration.in_steps(0 if held is None else held.usable, run.global_batch_size)
    deepspeed_config(run, world)
    model = meta_model(run, vocab_size, teachers)
    parameter_groups(model, run.optim)
    return startup_page(world, torch.device("meta"), model, teachers, held, steps)


def _held(run: TrainConfig) -> Held | None:
    if any(map(is_url, run.data.patterns)):  # to index them is to read all they hold
        return None
    try:
        paths = expand(run.data.patterns)
    except (OSError, ValueError):
        return None
    tars = [index_tar(path) for path in paths]
    total = sum(len(tar.samples) for tar in tars)
    return Held(total, total, len(tars), {})


def _teacher(name: str, tower: CacheTower) -> TeacherCost:
    try:
        return TeacherCost.of(EmbeddingCache.open(tower.path).manifest)
    except ManifestError as error:
        if tower.backbone is None:
            raise ConfigError(
                f"towers.{name}.backbone: name it; without the cache the width of its rows is unknown ({error})"
            ) from error
        return TeacherCost.named(tower.backbone)


def _vocab_size(run: TrainConfig) -> int:
    if Path(run.data.tokenizer).exists():
        return Tokenizer.load(run.data.tokenizer).embedding_rows(run.data.vocab_size)
    if run.data.vocab_size is None:
        raise ConfigError(f"data.vocab_size: unknown without {run.data.tokenizer}; give the number of its pieces")
    return run.data.vocab_size

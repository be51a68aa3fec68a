"""A dry run: the model is built on the meta device, and the summary of the run is all that is made of it."""

from collections import Counter

import torch

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import MissingTokenizer
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import image_defects, refuse_defects, require_samples, select_tars, try_index
from threetowers.cache.webdataset.tar_patterns import expand
from threetowers.trainer.config import CacheTower, ConfigError, TrainConfig
from threetowers.trainer.data.joins.cache_join import require_side
from threetowers.trainer.engine import deepspeed_config
from threetowers.trainer.estimate.cost import TeacherCost, meta_model
from threetowers.trainer.estimate.summary import DatasetStats, run_summary
from threetowers.trainer.model.initial.whole_model import resolve_start
from threetowers.trainer.model.precision import resolve_precision
from threetowers.trainer.model.towers.tokenizer_fit import check_tokenizer
from threetowers.trainer.optimizer.optimizer import parameter_groups


def dry_run(config: TrainConfig, world_size: int = 1) -> list[str]:
    """Return the summary of a run on `world_size` ranks, in seconds and little memory whatever its size.

    Needs neither tars nor caches nor a tokenizer, as long as the config states what would be read from them.

    Raises:
        ConfigError: The config does not state it.
        ValueError: Towers, heads, terms or layout do not fit, as in training.
    """
    config = resolve_precision(resolve_start(config))
    stats = _dataset_stats(config)
    if stats is None and config.duration.epochs is not None:
        raise ConfigError(
            f"duration.epochs: the length of an epoch is unknown without {config.data.patterns}; give samples"
        )
    teachers = {
        name: teacher_cost(name, tower) for name, tower in config.towers.items() if isinstance(tower, CacheTower)
    }
    vocab_size = _vocab_size(config)
    steps = config.duration.in_steps(0 if stats is None else stats.usable, config.global_batch_size)
    # The layout, the model and the parameter groups are checked as in training.
    deepspeed_config(config, world_size)
    model = meta_model(config, vocab_size, teachers)
    parameter_groups(model, config.optim)
    lines = run_summary(world_size, torch.device("meta"), model, teachers, stats, steps)
    return lines if config.init is None else [*lines, f"init: {config.init}, not loaded"]


def _dataset_stats(config: TrainConfig) -> DatasetStats | None:
    """Return the counts of the tars; None where they are remote (indexing would read all of them) or missing."""
    if any(map(is_url, config.data.patterns)):
        return None
    try:
        paths = [expand(dataset.tars) for dataset in config.data.named_datasets.values()]
    except (OSError, ValueError):
        return None
    data = config.data
    found: list[TarIndex | BadTar] = []
    for dataset, of_dataset in zip(data.named_datasets.values(), paths, strict=True):
        found += [try_index(path, data.image_member_of(dataset)) for path in of_dataset]
    listed = require_samples(select_tars(found, data.on_bad))
    left_out: Counter[str] = Counter()
    if config.towers_reading("images"):
        if data.on_bad == "error":
            refuse_defects(listed.tars)
        left_out = image_defects(listed.tars)
    total = sum(len(tar.samples) for tar in listed.tars)
    return DatasetStats(
        usable=total - left_out.total(), total=total, tars=len(listed.tars), left_out=left_out, notes=listed.notes()
    )


def teacher_cost(name: str, tower: CacheTower) -> TeacherCost:
    """Return the cost of the encoder of a cached tower, by the cache or else by what the config states.

    Raises:
        ConfigError: The config does not state the width of its rows, and there is no cache.
    """
    try:
        manifest = EmbeddingCache.open(tower.path).manifest
    except ManifestError as error:
        if tower.dim is not None:
            return TeacherCost.of_width(tower.encoder, tower.dim)
        if tower.of == "text":
            raise ConfigError(
                f"towers.{name}.dim: give it; the width of rows of text is unknown without the cache ({error})"
            ) from error
        if tower.encoder is None:
            raise ConfigError(
                f"towers.{name}.encoder: name it; or give towers.{name}.dim, as the width of the rows is unknown "
                f"without the cache ({error})"
            ) from error
        return TeacherCost.from_encoder(tower.encoder)
    require_side(tower.path, manifest, tower.of)
    return TeacherCost.from_manifest(manifest)


def _vocab_size(config: TrainConfig) -> int | None:
    if config.data.tokenizer is None:
        return None
    try:
        tokenizer = load_named_tokenizer(config.data.tokenizer)
    except MissingTokenizer as error:
        if config.data.vocab_size is None:
            raise ConfigError(
                f"data.vocab_size: unknown without {config.data.tokenizer}; give the number of its pieces"
            ) from error
        return config.data.vocab_size
    check_tokenizer(config, tokenizer)
    return tokenizer.embedding_rows(config.data.vocab_size)

"""The samples of a run: its tars, the caches of their embeddings, the mixture of data sets and the access to them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from threetowers.cache.storage.storage import is_url
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import first_defect, left_aside_lines, none_usable, refuse_defects
from threetowers.trainer.config import CacheTower, ConfigError, TrainConfig
from threetowers.trainer.config.checks import streams_and_batch
from threetowers.trainer.data.epoch_snapshot import EpochSnapshots, wait_until_built
from threetowers.trainer.data.joins.cache_join import CacheJoin
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.joins.tar_groups import read_groups
from threetowers.trainer.data.joins.text_join import TextJoin
from threetowers.trainer.data.mixture import MixtureComponent, samples_per_batch
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import too_few_samples
from threetowers.trainer.data.streaming import default_streams
from threetowers.trainer.data.tar_headers import index_datasets


def open_samples(config: TrainConfig, folder: Path) -> SampleSet:
    """Return the samples of a run with their caches, built as far as `data.on_incomplete_cache` requires. Collective.

    Args:
        config: The run's config.
        folder: The run folder, in which the tars of each epoch are recorded.

    Raises:
        BadSample, BadTar, ConfigError, ManifestError: The tars or caches do not fit the run.
    """
    data = config.data

    # The tars, and the caches of their embeddings
    patterns = {name: dataset.tars for name, dataset in data.named_datasets.items()}
    members = {name: data.image_member_of(dataset) for name, dataset in data.named_datasets.items()}
    tars, tar_numbers, notes = index_datasets(patterns, data.index_dir, image_members=members, on_bad=data.on_bad)
    reads_images = bool(config.towers_reading("images"))
    if reads_images and data.on_bad == "error":
        refuse_defects(tars)
    caches = {
        name: _join(config, tower, tars, tar_numbers)
        for name, tower in config.towers.items()
        if isinstance(tower, CacheTower)
    }
    joins = list(caches.values())
    if joins and data.on_incomplete_cache == "wait":
        wait_until_built(joins)

    # The mixture
    weights = [dataset.weight for dataset in data.named_datasets.values()]
    counts = samples_per_batch(weights, config.global_batch_size)
    components = []
    for (name, dataset), count in zip(data.named_datasets.items(), counts, strict=True):
        snapshots = None
        if joins and data.on_incomplete_cache == "skip":
            file = f"epoch-snapshots-{name}.jsonl" if name else "epoch-snapshots.jsonl"
            snapshots = EpochSnapshots(folder / file, joins, count, tar_numbers[name])
        group_field = dataset.group_field or data.group_field
        captions = data.caption_format(dataset)
        components.append(MixtureComponent(name, tar_numbers[name], count, group_field, captions, snapshots))

    # The groups, ahead of the steps where these need nothing else of the tars
    reads_words = bool(config.towers_reading("tokens"))
    reads_members = reads_images or reads_words or any(join.on_missing_row == "live" for join in joins)
    fields = [component.group_field for component in components for _ in component.tars]
    groups = {} if reads_members else read_groups(tars, fields, data.index_dir)

    # The access
    sequential = data.access == "sequential" or (data.access == "auto" and any(is_url(tar.location) for tar in tars))
    num_streams = 1
    if sequential:
        num_streams = data.num_streams or default_streams(config.global_batch_size, len(tars))
        if config.global_batch_size % num_streams:
            raise ConfigError(streams_and_batch(num_streams, config.global_batch_size))

    # Refuse a data set that is too small before anything else is set up
    read = set().union(*(component.captions.extensions for component in components))
    notes += left_aside_lines(tars, read)
    samples = SampleSet(
        tars,
        caches,
        components,
        sequential,
        reads_images=reads_images,
        reads_words=reads_words,
        seed=config.seed,
        captions_per_sample=data.captions_per_sample,
        accepts_bad=data.on_bad != "error",
        tar_notes=notes,
        num_streams=num_streams,
        groups=groups,
    )
    for number, component in enumerate(components):
        usable = len(samples.epoch_indices(0, number))
        if usable < component.samples_per_batch:
            key = f"data.datasets.{component.name}: " if component.name else ""
            left_out = +samples.component_left_out(number)
            own = [tars[tar_number] for tar_number in component.tars]
            if not usable and left_out and (first := first_defect(own)):
                raise ConfigError(key + none_usable(left_out.total(), left_out, str(first)))
            raise ConfigError(key + too_few_samples(component.samples_per_batch, usable, left_out))
    return samples


def _join(
    config: TrainConfig, tower: CacheTower, tars: Sequence[TarIndex], tar_numbers: Mapping[str, range]
) -> CacheJoin[Any]:
    """Return the join of a tower's cache to the tars of a run. Raises ManifestError where it does not fit the run."""
    data = config.data
    join = (TextJoin if tower.of == "text" else ImageJoin)(
        tower.path,
        tars,
        tower.encoder,
        dim=tower.dim,
        on_missing_row=tower.on_missing_row,
        weights=tower.weights,
        allow_incomplete=data.on_incomplete_cache != "error",
        datasets=list(tar_numbers.values()),
    )
    if isinstance(join, TextJoin):
        for name, dataset in data.named_datasets.items():
            if any(join.tar_ids[number] is not None for number in tar_numbers[name]):
                join.check_captions(data.caption_format(dataset), f"data.datasets.{name}" if name else "data")
    return join

"""A look at the annotations before the first step: where captions come from, which groups there are, what is wrong.

A run that reads no words looks at the captions of its caches instead.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from threetowers.cache.processes.world import World
from threetowers.cache.webdataset.captions import split_source
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.groups import BAD_GROUP, BadField, SampleGroup, sample_group
from threetowers.cache.webdataset.sample import read_annotation, read_fields
from threetowers.cache.webdataset.tar_list import counts_by_reason
from threetowers.trainer.config import ConfigError, TrainConfig
from threetowers.trainer.data.joins.text_join import TextJoin
from threetowers.trainer.data.mixture import MixtureComponent
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import Indices
from threetowers.trainer.data.tar_headers import gather_from_ranks

LOOKED_AT = 1000  # samples in all, evenly spaced
THREADS = 16  # for remote tars, where each sample waits for the network
TARS_LOOKED_AT = 16  # of a cache, whose columns are read a tar at a time


@dataclass(frozen=True)
class _Found:
    """What was found in one sample."""

    sources: Collection[str]  # of captions that training may draw
    group: SampleGroup
    differs: bool = False  # whether another source says something else
    several_lines: bool = False  # whether its caption has several lines
    fields: Collection[str] = ()
    notes: Collection[str] = ()


@dataclass
class _Survey:
    """What was found in the samples of one component that were looked at."""

    component: MixtureComponent
    looked_at: int = 0
    cached: bool = False  # whether the captions are those of a cache
    sources: Counter[str] = field(default_factory=Counter)  # samples by the source of their captions
    differing: int = 0  # samples of which another source says something else
    several_lines: int = 0  # samples whose caption has several lines
    groups: set[str] = field(default_factory=set)
    without_group: int = 0
    fields: set[str] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""

    @property
    def usable(self) -> int:
        return self.looked_at - self.bad.total()

    def add(self, found: _Found | BadSample) -> None:
        self.looked_at += 1
        if isinstance(found, BadSample):
            self.bad[found.reason] += 1
            self.first_bad = self.first_bad or str(found)
            return
        self.sources.update(found.sources)
        self.differing += found.differs
        self.several_lines += found.several_lines
        self.groups.add(found.group.name)
        self.without_group += found.group.without_value
        self.fields.update(found.fields)
        self.notes.update(found.notes)

    def lines(self) -> list[str]:
        captions = self.component.captions
        of = f"of {self.looked_at:,} samples looked at"
        named = f"data set {self.component.name}: " if self.component.name else ""

        # Where captions come from, and what else there is
        parts = []
        for source in captions.sources or self.sources:
            weight = f" (weight {captions.sources[source]:g})" if captions.sources else ""
            parts.append(f"from {source}{weight} in {self.sources[source]:,}")
        text = f"captions: {', '.join(parts) or 'none'} {of}"
        if self.cached:
            text += ", as the cache has them"
        if captions.caption_per_line:
            text += "; each line of a text member is one"
        lines = [text]
        if self.several_lines:
            lines.append(
                f"captions: {self.several_lines:,} {of} have a caption of several lines; if each line is one, set "
                "data.caption_per_line: true"
            )
        if self.differing and not captions.sources:
            lines.append(
                f"captions: {self.differing:,} {of} have other captions in another source; data.captions chooses"
            )

        if self.component.group_field is not None:
            lines.append(
                f"groups by {self.component.group_field!r}: {len(self.groups):,} in {self.usable:,} samples looked at; "
                f"{self.without_group:,} of these have no value and are groups of their own"
            )
        lines += [f"noted: {note}, in {count:,} {of}" for note, count in sorted(self.notes.items())]
        lines += [f"bad: {reason}, {count:,} {of}" for reason, count in sorted(self.bad.items())]
        return [named + line for line in lines]


def survey_annotations(config: TrainConfig, samples: SampleSet) -> list[str]:
    """Look at some samples of a run, evenly spaced, and return lines for the start-up page. Collective.

    One rank looks, at 1,000 samples in all. What the config asks for and none of them has is an error: it is misspelt,
    or nothing can be learned.

    Raises:
        ConfigError: No sample of a data set can be used, none has a caption in a source that is named, none has the
            group field, or all are of one group, so that a contrastive softmax has no negatives.
        BadSample: A sample is bad, and `data.on_bad` is error.
        BadTar: A tar has changed since it was indexed.
        OSError: A tar cannot be read.
    """
    visited = [samples.epoch_indices(0, number) for number in range(len(samples.components))]

    def look() -> list[str]:
        surveys = []
        for component, indices in zip(samples.components, visited, strict=True):
            count = min(len(indices), max(1, LOOKED_AT // len(visited)))
            survey = _Survey(component, cached=not samples.reads_words)
            if samples.reads_words:
                chosen = indices[np.linspace(0, len(indices) - 1, count).round().astype(int)].tolist()
                with ThreadPoolExecutor(THREADS) as pool:
                    for found in pool.map(partial(_read, samples, component), chosen):
                        survey.add(found)
            else:
                for index in _of_few_tars(samples, indices, count):
                    survey.add(_look_up(samples, component, index))
            surveys.append(survey)
        _check(config, surveys)
        return [line for survey in surveys for line in survey.lines()]

    first = World.from_process_group().first
    by_rank: list[list[str]] = gather_from_ranks(look if first else _nothing)
    return by_rank[0]


def _nothing() -> list[str]:
    return []


def _read(samples: SampleSet, component: MixtureComponent, index: int) -> _Found | BadSample:
    """Return what is found in a sample's members."""
    tar_number, ordinal = samples.address(index)
    tar = samples.tars[tar_number]
    captions = component.captions
    try:
        annotation = read_annotation(tar, ordinal, captions=captions.with_all_sources())
        group = sample_group(tar, ordinal, annotation.fields, component.group_field)
    except BadField as error:
        return BadSample(f"{tar.describe(ordinal)}: {error}", BAD_GROUP)
    except BadSample as error:
        return error
    by_source = annotation.captions_by_source
    used, *others = by_source
    is_member = not captions.caption_per_line and split_source(used)[1] is None
    return _Found(
        list(by_source) if captions.sources else [used],
        group,
        differs=any(set(by_source[source]) - set(by_source[used]) for source in others),
        several_lines=is_member and any("\n" in caption for caption in by_source[used]),
        fields=annotation.fields.keys(),
        notes=annotation.notes,
    )


def _of_few_tars(samples: SampleSet, indices: Indices, count: int) -> list[int]:
    """Return so many of some samples, evenly spaced in a few tars that are evenly spaced themselves."""
    tar_numbers = samples.tar_numbers(indices)
    tars = np.unique(tar_numbers)
    chosen = tars[np.linspace(0, len(tars) - 1, min(len(tars), TARS_LOOKED_AT)).round().astype(int)]
    among = indices[np.isin(tar_numbers, chosen)]
    return [int(among[at]) for at in np.linspace(0, len(among) - 1, min(count, len(among))).round().astype(int)]


def _look_up(samples: SampleSet, component: MixtureComponent, index: int) -> _Found | BadSample:
    """Return what the caches have of a sample's captions, and its group."""
    tar_number, ordinal = samples.address(index)
    tar = samples.tars[tar_number]
    sources: Collection[str] = ()
    for join in samples.caches.values():
        if isinstance(join, TextJoin) and not join.is_missing(tar_number, ordinal):
            sources = join.sources(tar_number, ordinal, component.captions)
            break
    fields: Mapping[str, Any] = {}
    notes: Collection[str] = ()
    try:
        if component.group_field is not None:
            fields, notes = read_fields(tar, ordinal)
        group = sample_group(tar, ordinal, fields, component.group_field)
    except BadField as error:
        return BadSample(f"{tar.describe(ordinal)}: {error}", BAD_GROUP)
    return _Found(sources, group, fields=fields.keys(), notes=notes)


def _check(config: TrainConfig, surveys: list[_Survey]) -> None:
    """Raise ConfigError for what none of the samples has."""
    for survey in surveys:
        if not survey.usable:
            prefix = f"data.datasets.{survey.component.name}" if survey.component.name else "data"
            raise ConfigError(
                f"{prefix}: none of {survey.looked_at:,} samples looked at can be used; check {prefix}.captions and "
                f"{prefix}.group_field; the first: {survey.first_bad}"
            )
        if survey.bad and config.data.on_bad == "error":
            raise BadSample(
                f"{survey.first_bad}. Samples like it, of {survey.looked_at:,} looked at: "
                f"{counts_by_reason(survey.bad)}. Repair them, or leave them out by data.on_bad: skip",
                next(iter(survey.bad)),
            )
    by_source: dict[str, list[_Survey]] = {}
    for survey in surveys:
        for source in survey.component.captions.sources:
            by_source.setdefault(source, []).append(survey)
    for source, naming in by_source.items():
        if not any(survey.sources[source] for survey in naming):
            found = sorted(set().union(*(survey.sources for survey in naming)))
            json_fields = sorted(set().union(*(survey.fields for survey in naming)))
            raise ConfigError(
                f"data.captions: none of {sum(survey.usable for survey in naming):,} samples looked at has a caption "
                f"in {source} (found captions in {found}, and the JSON fields {json_fields}); correct the name, "
                "or leave it out"
            )
    by_field: dict[str, list[_Survey]] = {}
    for survey in surveys:
        if survey.component.group_field is not None:
            by_field.setdefault(survey.component.group_field, []).append(survey)
    for name, grouped in by_field.items():
        fields = set().union(*(survey.fields for survey in grouped))
        if name not in fields:
            raise ConfigError(
                f"data.group_field: none of {sum(survey.usable for survey in grouped):,} samples looked at has a field "
                f"{name!r} (found {sorted(fields)}); correct it, or set null where each sample is its own group"
            )

    usable = sum(survey.usable for survey in surveys)
    groups = set().union(*(survey.groups for survey in surveys))
    terms = [name for name, term in config.terms.items() if term.masks_groups]
    if usable > 1 and len(groups) == 1 and terms and config.loss.kind == "softmax" and config.loss.mask_false_negatives:
        (group,) = groups
        raise ConfigError(
            f"data.group_field: all {usable:,} samples looked at are of one group, {group!r}, so that the contrastive "
            f"terms {terms} have no negatives and learn nothing; name a field that tells samples apart, or set it to "
            "null, or loss.mask_false_negatives: false"
        )

"""The samples of some tars with the rows of their caches: their addresses, and which of them each epoch visits."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from threetowers.cache.format.views import Views
from threetowers.cache.read.embedding_cache import Float64Array
from threetowers.cache.webdataset.captions import FIELD_EXTENSIONS
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.trainer.config import ConfigError
from threetowers.trainer.data.joins.cache_join import CachedRow, CacheJoin
from threetowers.trainer.data.joins.image_join import ImageJoin
from threetowers.trainer.data.joins.tar_groups import TarGroups
from threetowers.trainer.data.joins.visit import Visit
from threetowers.trainer.data.mixture import MixtureComponent
from threetowers.trainer.data.sampler import Indices
from threetowers.trainer.data.transforms import center_crop, stored_view


class EpochSamples(NamedTuple):
    """The samples of one mixture component that an epoch visits.

    Attributes:
        tar_numbers: The tars that it visits.
        indices: The samples that it visits.
        left_out: How many samples of these tars it leaves out, by reason.
        without_row: How many it visits though a cache has no row for them, by what is done about it.
    """

    tar_numbers: list[int]
    indices: Indices
    left_out: Counter[str]
    without_row: Counter[str]


class SampleSet:
    """The samples of all tars of a run. A sample's index, 0 .. total-1, follows the order of the tars.

    Which samples an epoch visits depends on the `on_missing_row` of each cache and, in a run on a cache that is still
    being built, on the tars that were built when the epoch began. Each mixture component has epochs of its own.

    Attributes:
        tars: The run's list of tars; a tar's number is its position in it.
        caches: The joins of the caches to these tars, by the name of their tower.
        reads_images: Whether the run reads the image of every sample.
        reads_words: Whether it reads the captions of every sample; otherwise caches of text say which there are.
        seed: Seed of the run.
        components: The mixture of data sets that the tars make up.
        captions_per_sample: How many captions a visit shows of a sample that has as many.
        sequential: Whether the samples are read by sequential access.
        num_streams: Into how many streams sequential access cuts the tars; 1 under random access.
        groups: By tar number, the groups of the samples, where they were read ahead.
        views: The views of the caches.
    """

    def __init__(
        self,
        tars: Sequence[TarIndex],
        caches: Mapping[str, CacheJoin[Any]],
        components: Sequence[MixtureComponent] | None = None,
        sequential: bool = False,
        *,
        reads_images: bool = False,
        reads_words: bool = True,
        seed: int = 0,
        captions_per_sample: int = 1,
        accepts_bad: bool = True,
        tar_notes: Sequence[str] = (),
        num_streams: int = 1,
        groups: Mapping[int, TarGroups] | None = None,
    ) -> None:
        """Set up the samples.

        Args:
            tars: The run's list of tars.
            caches: The joins of the caches to these tars, by the name of their tower.
            components: The mixture; without it all tars are one data set.
            sequential: Whether the samples are read by sequential access.
            reads_images: Whether the run reads the image of every sample: those without a usable one are left out.
            reads_words: Whether it reads the captions of every sample.
            seed: Seed of the run.
            captions_per_sample: How many captions a visit shows of a sample that has as many.
            accepts_bad: Whether a sample that cannot be used is left out, or refused.
            tar_notes: Lines on tars that are not used, for the start-up page.
            num_streams: Streams of sequential access.
            groups: By tar number, the groups of the samples, where they were read ahead.

        Raises:
            ConfigError: The caches hold different views.
        """
        self.tars = list(tars)
        self.caches = dict(caches)
        self.components = [MixtureComponent("", range(len(self.tars)))] if components is None else list(components)
        self.sequential = sequential
        self.num_streams = num_streams
        self.groups = dict(groups or {})
        self.reads_images = reads_images
        self.reads_words = reads_words
        self.seed = seed
        self.captions_per_sample = captions_per_sample
        self._accepts_bad = accepts_bad
        self._tar_notes = list(tar_notes)
        self._image_joins = {name: join for name, join in self.caches.items() if isinstance(join, ImageJoin)}
        self.views = _common_views(self._image_joins)
        self._first_indices = np.cumsum([0, *(len(tar.samples) for tar in self.tars)], dtype=np.int64)
        tar_counts = [len(component.tars) for component in self.components]
        self._component_of_tar = np.repeat(np.arange(len(self.components)), tar_counts)
        self._latest: dict[int, EpochSamples] = {}  # by component, the epoch last asked for

    @property
    def total(self) -> int:
        """Number of samples in the tars, usable or not."""
        return int(self._first_indices[-1])

    @property
    def left_out(self) -> Counter[str]:
        """Samples that the epoch last asked for leaves out, by reason."""
        return sum((latest.left_out for latest in self._latest.values()), Counter())

    @property
    def without_row(self) -> Counter[str]:
        """Samples that it visits though a cache has no row for them, by what is done about it."""
        return sum((latest.without_row for latest in self._latest.values()), Counter())

    def __len__(self) -> int:
        """Return the number of samples of an epoch, in which durations are counted.

        These are the usable samples, or all of them where a cache is still being built.
        """
        return sum(self.component_length(number) for number in range(len(self.components)))

    def component_left_out(self, number: int) -> Counter[str]:
        """Return how many samples of one component the epoch last asked for leaves out, by reason."""
        return self._latest[number].left_out

    def component_length(self, number: int) -> int:
        """Return the number of samples of an epoch that are of one component."""
        component = self.components[number]
        if component.snapshots is None:
            return len(self.epoch_indices(0, number))
        return int(self._first_indices[component.tars.stop] - self._first_indices[component.tars.start])

    def notes(self) -> list[str]:
        """Return lines for the start-up page: tars that are not used, data sets of a mixture, views, access."""
        lines = list(self._tar_notes)
        batch_size = sum(component.samples_per_batch for component in self.components)
        for number, component in enumerate(self.components):
            if component.name:
                lines.append(
                    f"data set {component.name}: {component.samples_per_batch:,} of each batch of {batch_size:,}, from "
                    f"{self.component_length(number):,} usable samples in {len(component.tars)} tars"
                )
        if self.captions_per_sample > 1:
            lines.append(f"captions: an epoch shows {self.captions_per_sample} of a sample, or all where it has fewer")
        if self.views.count > 1:
            lines.append(f"views: {self.views}; an epoch shows one of the {self.views.count}")
        unread = {"no image is decoded": self.reads_images, "no word is read": self.reads_words}
        if not all(unread.values()):
            live = any(join.on_missing_row == "live" for join in self.caches.values())
            parts = ", ".join(part for part, is_read in unread.items() if not is_read)
            lines.append(f"read: {parts}{', but for samples without a row' if live else ''}")
        if self.sequential:
            lines.append(f"access: sequential, tar after tar in {self.num_streams} streams")
        return lines

    def mixture_metrics(self, steps: int) -> dict[str, float]:
        """Return the samples and the epochs of each data set of a mixture that so many steps take."""
        metrics = {}
        for number, component in enumerate(self.components):
            if component.name:
                steps_per_epoch = max(1, self.component_length(number) // component.samples_per_batch)
                metrics[f"datasets/{component.name}/samples"] = float(steps * component.samples_per_batch)
                metrics[f"datasets/{component.name}/epoch"] = steps / steps_per_epoch
        return metrics

    def address(self, index: int) -> tuple[int, int]:
        """Return (tar number, ordinal) of a sample."""
        tar_number = int(self.tar_numbers(index))
        return tar_number, index - int(self._first_indices[tar_number])

    def index(self, tar_number: int, ordinal: int) -> int:
        """Return the index of a sample by its address."""
        return int(self._first_indices[tar_number]) + ordinal

    def tar_numbers(self, indices: Indices | int) -> Indices:
        """Return the tar number of each sample."""
        return np.searchsorted(self._first_indices, indices, "right") - 1

    def by_tar(self, indices: Indices) -> Iterator[tuple[int, list[int]]]:
        """Yield (tar number, ordinals) of each series of consecutive samples from one tar."""
        tar_numbers = self.tar_numbers(indices)
        cuts = np.flatnonzero(np.diff(tar_numbers)) + 1
        for series in np.split(np.arange(len(indices)), cuts):
            tar_number = int(tar_numbers[series[0]])
            yield tar_number, (indices[series] - self._first_indices[tar_number]).tolist()

    def component_of(self, tar_number: int) -> MixtureComponent:
        """Return the mixture component that a tar belongs to."""
        return self.components[int(self._component_of_tar[tar_number])]

    def view(self, epoch: int) -> int:
        """Return the view of the caches that an epoch uses."""
        return epoch % self.views.count

    def visit(self, epoch: int, index: int) -> Visit:
        """Return the visit of an epoch to a sample."""
        captions = self.component_of(int(self.tar_numbers(index))).captions
        return Visit(self.seed, epoch, index, self.view(epoch), captions, self.captions_per_sample)

    def extensions_read(self, tar_number: int) -> frozenset[str]:
        """Return the extensions of the text members of a tar that are read of every sample."""
        component = self.component_of(tar_number)
        if self.reads_words:
            return component.captions.extensions
        return FIELD_EXTENSIONS if component.group_field is not None else frozenset()

    def epoch_indices(self, epoch: int, component: int = 0) -> Indices:
        """Return the samples of a component that an epoch visits. Collective where a cache is still being built.

        Raises:
            BadSample: A cache lacks the row of a sample and its `on_missing_row` is error; or, where bad samples are
                not left out, the teacher would have to embed a sample without a usable image.
        """
        tar_numbers = self._epoch_tars(epoch, self.components[component])
        latest = self._latest.get(component)
        if latest is None or latest.tar_numbers != tar_numbers:
            left_out, without_row = Counter[str](), Counter[str]()
            usable = [np.empty(0, np.int64)]
            for tar_number in tar_numbers:
                ordinals = self._usable_ordinals(tar_number, left_out, without_row)
                usable.append(self._first_indices[tar_number] + ordinals)
            latest = EpochSamples(tar_numbers, np.concatenate(usable), left_out, without_row)
            self._latest[component] = latest
        return latest.indices

    def moments(self, tower: str) -> tuple[CachedRow, CachedRow]:
        """Return mean and standard deviation (D,) of a cached tower's features over the tars of the first epoch."""
        return self.caches[tower].moments(self._first_tars())

    def covariance(self, tower: str) -> tuple[Float64Array, Float64Array]:
        """Return mean (D,) and covariance (D, D) of a cached tower's features over the tars of the first epoch."""
        return self.caches[tower].covariance(self._first_tars())

    def _first_tars(self) -> list[int]:
        return [number for component in self.components for number in self._epoch_tars(0, component)]

    def view_image(self, index: int, view: int, image: Image.Image, size: int) -> Tensor:
        """Return a view of a sample's image as the teachers of the caches saw it: (3, size, size) uint8.

        Without caches it is the center.
        """
        if self.views.cropped:
            tar_number, ordinal = self.address(index)
            join = next(iter(self._image_joins.values()))
            params_P = join.view_params(tar_number, ordinal, view, image.size)
            return stored_view(image, size, params_P, join.cache.manifest.image_preprocessing.interpolation)
        image_3hw = center_crop(image, size)
        return image_3hw.flip(-1) if view else image_3hw

    def _epoch_tars(self, epoch: int, component: MixtureComponent) -> list[int]:
        return list(component.tars) if component.snapshots is None else component.snapshots.tar_numbers(epoch)

    def _usable_ordinals(self, tar_number: int, left_out: Counter[str], without_row: Counter[str]) -> Indices:
        """Return the ordinals of a tar that an epoch visits, and count the others."""
        tar = self.tars[tar_number]
        usable = np.ones(len(tar.samples), bool)
        if self.reads_images:
            self._leave_out_defects(tar, usable, left_out)
        for name, join in self.caches.items():
            if join.on_missing_row == "live" and join.side == "image":
                self._leave_out_defects(tar, usable, left_out, ~join.has_rows(tar_number))
            missing = usable & ~join.has_rows(tar_number)
            if join.on_missing_row == "error" and missing.any():
                raise BadSample(
                    f"{_name(tar, int(np.argmax(missing)))}: the cache of tower {name!r} has no embedding for it "
                    f"({np.count_nonzero(missing)} such samples in this tar); repair the tar and build it again, or "
                    f"set towers.{name}.on_missing_row: skip, mask or live"
                )
            if join.on_missing_row == "mask":
                without_row[f"left out of the terms with {name!r}"] += int(np.count_nonzero(missing))
            elif join.on_missing_row == "live":
                without_row[f"computed by the teacher of {name!r}"] += int(np.count_nonzero(missing))
                if missing.any():
                    join.load_teacher()  # before the workers start: they share it, and it may be unavailable
            else:
                left_out[f"no embedding in {name!r}"] += int(np.count_nonzero(missing))
                usable &= ~missing
        return np.flatnonzero(usable).astype(np.int64)

    def _leave_out_defects(
        self,
        tar: TarIndex,
        usable: npt.NDArray[np.bool_],
        left_out: Counter[str],
        among: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Take the samples without a usable image, as far as headers tell, out of `usable`, and count them by reason.

        Where `among` is given, only samples that are true in it are concerned.
        """
        for defect, ordinals in tar.samples.defects().items():
            bad = ordinals[usable[ordinals] if among is None else usable[ordinals] & among[ordinals]]
            if len(bad) and not self._accepts_bad:
                first = int(bad[0])
                raise BadSample(
                    f"{tar.describe(first)}: {tar.describe_defect(first)} ({len(bad)} such samples in this tar); "
                    "repair it, or set data.on_bad: skip",
                    defect,
                )
            left_out[str(defect)] += len(bad)
            usable[bad] = False


def _common_views(caches: Mapping[str, ImageJoin]) -> Views:
    views = {name: join.cache.manifest.views for name, join in caches.items()}
    if len(set(views.values())) > 1:
        found = ", ".join(f"{name}: {of_cache}" for name, of_cache in views.items())
        raise ConfigError(
            f"towers: found caches of different views: {found}; expected equal ones, as the image tower gets one view "
            "an epoch: build the caches with the same --views, seed, scale and augment"
        )
    return next(iter(views.values()), Views())


def _name(tar: TarIndex, ordinal: int) -> str:
    return f"{tar.location}: sample {tar.samples[ordinal].key!r}"

"""Batches of rows alone: where every tower is a cache, a batch is made by operations on whole arrays.

The samples, their captions and their rows are those that `TrainingSampleReader` gives one by one.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from threetowers.cache.read.stream import TarRows
from threetowers.cache.read.tar_columns import OK
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.groups import BAD_GROUP
from threetowers.trainer.data.batch import Batch, owners
from threetowers.trainer.data.joins.text_join import TextJoin, no_caption, other_captions
from threetowers.trainer.data.joins.visit import Visit
from threetowers.trainer.data.sample_set import SampleSet
from threetowers.trainer.data.sampler import Indices
from threetowers.trainer.data.streaming import StreamSegment, shuffle_buffer_order

Flags = npt.NDArray[np.bool_]


def is_rows_alone(samples: SampleSet) -> bool:
    """Return whether the steps read nothing but rows.

    That is: no image, no word, no field that was not read ahead, and nothing that a teacher would embed.
    """
    grouped = [component.tars for component in samples.components if component.group_field is not None]
    return not (
        samples.reads_images
        or samples.reads_words
        or any(number not in samples.groups for tars in grouped for number in tars)
        or any(join.on_missing_row == "live" for join in samples.caches.values())
    )


@dataclass(frozen=True)
class DrawnTar:
    """Which rows m visits of an epoch to samples of one tar show.

    Attributes:
        tar_number: The tar.
        view: View of the images.
        indices_m: The samples.
        ordinals_m: Their positions in the tar.
        present: By cached tower, which of them have a row, (m,).
        numbers: By cached tower of text, the numbers of their captions, (m, k): of k at most, then -1.
        bad_m: Which of them have captions, but none that the run draws from.
        streamed: By cached tower, the rows of the tar, where they are in memory.
    """

    tar_number: int
    view: int
    indices_m: Indices
    ordinals_m: Indices
    present: dict[str, Flags]
    numbers: dict[str, Indices]
    bad_m: Flags
    streamed: Mapping[str, TarRows | None]


class RowReader:
    """Reads batches of rows by whole arrays."""

    def __init__(self, samples: SampleSet) -> None:
        """Set up the reader of a run's samples."""
        self._samples = samples

    def read(self, addresses: Sequence[tuple[int, int]]) -> Batch:
        """Return the batch of some (epoch, index), by random access.

        Raises:
            ManifestError: A cache has changed since it was opened, or is damaged.
        """
        epochs_b, indices_b = np.array(addresses, np.int64).T
        tars_b = self._samples.tar_numbers(indices_b)
        order = np.lexsort((tars_b, epochs_b))
        cuts = np.flatnonzero((np.diff(tars_b[order]) != 0) | (np.diff(epochs_b[order]) != 0)) + 1
        batch = BatchOfRows(self._samples, len(addresses))
        for at in np.split(order, cuts):
            tar = self.draw(int(tars_b[at[0]]), int(epochs_b[at[0]]), indices_b[at], {})
            batch.put(at, tar, np.arange(len(at)))
        return batch.finish()

    def draw(self, tar_number: int, epoch: int, indices_m: Indices, streamed: Mapping[str, TarRows | None]) -> DrawnTar:
        """Return which rows the visits of an epoch to some samples of a tar show.

        Args:
            tar_number: The tar.
            epoch: Number of the epoch.
            indices_m: The samples.
            streamed: By cached tower, the rows of the tar, where they are in memory.

        Raises:
            ManifestError: The caches hold other samples, or different captions.
        """
        samples = self._samples
        captions = samples.component_of(tar_number).captions
        ordinals_m = indices_m - samples.index(tar_number, 0)
        view = samples.view(epoch)

        def visit_of(at: int) -> Visit:
            return Visit(samples.seed, epoch, int(indices_m[at]), view, captions, samples.captions_per_sample)

        present: dict[str, Flags] = {}
        numbers: dict[str, Indices] = {}
        hashes: dict[str, npt.NDArray[np.uint64]] = {}
        for tower, join in samples.caches.items():
            columns = join.columns(tar_number, streamed.get(tower))
            if columns is None:
                present[tower] = np.zeros(len(indices_m), bool)
                continue
            present[tower] = columns.status_n[ordinals_m] == OK
            if join.on_missing_row != "mask" and not present[tower].all():
                # It existed when the epoch began: this raises what has changed
                first = int(np.argmin(present[tower]))
                join.stored_row(tar_number, int(ordinals_m[first]), visit_of(first))
            if isinstance(join, TextJoin) and columns.runs is not None:
                most = samples.captions_per_sample
                numbers[tower] = join.draw_numbers(columns.runs, ordinals_m, captions, most, visit_of)
                rows_mk = columns.runs.bound_N[ordinals_m, None] + numbers[tower]
                hashes[tower] = np.zeros(rows_mk.shape, np.uint64)
                is_drawn = numbers[tower] >= 0
                hashes[tower][is_drawn] = columns.runs.hash_r[rows_mk[is_drawn]]
        bad_m = self._bad(tar_number, ordinals_m, present, hashes)
        return DrawnTar(tar_number, view, indices_m, ordinals_m, present, numbers, bad_m, streamed)

    def _bad(
        self,
        tar_number: int,
        ordinals_m: Indices,
        present: Mapping[str, Flags],
        hashes: Mapping[str, npt.NDArray[np.uint64]],
    ) -> Flags:
        """Return which samples have no caption that the run draws from. Raises ManifestError where caches differ."""
        first = next(iter(hashes), "")
        none_m = np.zeros(len(ordinals_m), bool)
        if not first:
            return none_m
        hash_mk = np.where(present[first][:, None], hashes[first], 0)
        known_m = present[first].copy()
        for tower, other_mk in hashes.items():
            differs = known_m & present[tower] & (hash_mk != other_mk).any(1)
            if differs.any():
                ordinal = int(ordinals_m[int(np.argmax(differs))])
                raise other_captions(self._samples.tars[tar_number], ordinal, first, tower)
            hash_mk = np.where(known_m[:, None], hash_mk, other_mk)
            known_m |= present[tower]
        bad_m: Flags = known_m & (hash_mk[:, 0] == 0)
        return bad_m


class BatchOfRows:
    """A batch that is filled with the rows of tar after tar."""

    def __init__(self, samples: SampleSet, size: int) -> None:
        """Set up an empty batch of so many samples."""
        self._samples = samples
        self._inputs: dict[str, npt.NDArray[np.float32]] = {}  # (size, k, D), k the most rows of a sample
        for name, join in samples.caches.items():
            most = samples.captions_per_sample if join.side == "text" else 1
            self._inputs[name] = np.zeros((size, most, join.cache.dim), np.float32)
        self._num_captions_b = np.ones(size, np.int64)
        self._present = {
            name: np.zeros(size, bool) for name, join in samples.caches.items() if join.on_missing_row == "mask"
        }
        self._indices_b = np.zeros(size, np.int64)
        self._groups_b = np.zeros(size, np.int64)
        self._notes: dict[int, tuple[str, ...]] = {}  # by position
        self._bad_b = np.zeros(size, bool)  # for want of a caption
        self._without_group: dict[int, str] = {}  # by position, the reason

    def put(self, positions: Indices, tar: DrawnTar, chosen: Indices) -> None:
        """Put some of the visits to a tar into the batch.

        Args:
            positions: Where in the batch.
            tar: The visits.
            chosen: Which of them.
        """
        self._indices_b[positions] = tar.indices_m[chosen]
        self._bad_b[positions] = tar.bad_m[chosen]
        self._put_groups(positions, tar, chosen)
        for tower, join in self._samples.caches.items():
            present = tar.present[tower][chosen]
            if tower in self._present:
                self._present[tower][positions] = present
            read = np.flatnonzero(present & ~tar.bad_m[chosen])
            if not len(read):
                continue
            numbers, at = None, np.zeros_like(read)
            if tower in tar.numbers:
                numbers_mk = tar.numbers[tower][chosen[read]]
                is_drawn = numbers_mk >= 0
                self._num_captions_b[positions[read]] = is_drawn.sum(1)
                numbers = numbers_mk[is_drawn]
                read, at = read[np.nonzero(is_drawn)[0]], np.nonzero(is_drawn)[1]  # a row for each caption
            streamed = tar.streamed.get(tower)
            rows = join.rows(tar.tar_number, tar.ordinals_m[chosen[read]], tar.view, numbers, streamed)
            self._inputs[tower][positions[read], at] = rows

    def _put_groups(self, positions: Indices, tar: DrawnTar, chosen: Indices) -> None:
        groups = self._samples.groups.get(tar.tar_number)
        if groups is None:  # without a field every sample is a group of its own
            self._groups_b[positions] = tar.indices_m[chosen]
            return
        ordinals = tar.ordinals_m[chosen]
        self._groups_b[positions] = groups.hash_n[ordinals]
        note_m = groups.note_n[ordinals]
        for at in np.flatnonzero(note_m).tolist():
            self._notes[int(positions[at])] = groups.notes[note_m[at]]
        if groups.bad:
            for position, ordinal in zip(positions.tolist(), ordinals.tolist(), strict=True):
                if ordinal in groups.bad:
                    self._without_group[position] = groups.bad[ordinal]

    def finish(self) -> Batch:
        """Return the batch without its bad samples, which are listed."""
        bad_b = self._bad_b.copy()
        bad_b[list(self._without_group)] = True
        errors = [self._error(position) for position in np.flatnonzero(bad_b).tolist()]
        bad, reasons = tuple(map(str, errors)), tuple(error.reason for error in errors)
        if len(errors) == len(bad_b):
            return Batch({}, {}, torch.empty(0, dtype=torch.int64), bad, reasons=reasons)
        good: slice | Flags = ~bad_b if errors else slice(None)
        notes = [note for position in sorted(self._notes) if not bad_b[position] for note in self._notes[position]]

        def kept(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.from_numpy(values[good])

        # A sample without a row in one cache has as many zeros there as it has captions in another
        num_captions_b = self._num_captions_b[good]
        inputs = {}
        for name, rows_bkD in self._inputs.items():
            if rows_bkD.shape[1] == 1:
                inputs[name] = kept(rows_bkD[:, 0])
            else:
                has_caption_bk = np.arange(rows_bkD.shape[1]) < num_captions_b[:, None]
                inputs[name] = torch.from_numpy(rows_bkD[good][has_caption_bk])
        return Batch(
            inputs,
            {name: kept(present_b) for name, present_b in self._present.items()},
            kept(self._groups_b),
            bad,
            tuple(notes),
            reasons,
            owner_m=owners(num_captions_b.tolist()) if self._samples.captions_per_sample > 1 else None,
        )

    def _error(self, position: int) -> BadSample:
        """Return why a sample is bad, the caption first."""
        if not self._bad_b[position]:
            return BadSample(self._without_group[position], BAD_GROUP)
        tar_number, ordinal = self._samples.address(int(self._indices_b[position]))
        captions = self._samples.component_of(tar_number).captions
        return no_caption(self._samples.tars[tar_number], ordinal, captions)


class RowSegment:
    """The remaining visits of a segment of a stream in shuffled order, with the rows of whole tars read ahead."""

    def __init__(
        self, samples: SampleSet, reader: RowReader, segment: StreamSegment, buffer_size: int, rng: np.random.Generator
    ) -> None:
        """Read nothing yet.

        Args:
            samples: All samples of the run.
            reader: Draws their captions.
            segment: The samples to read, and how many are done.
            buffer_size: Samples that the shuffle buffer holds.
            rng: Random numbers of the shuffle buffer.
        """
        order = shuffle_buffer_order(len(segment.indices), buffer_size, rng)[segment.done :]
        arriving = np.sort(order)
        self._ranks = np.searchsorted(arriving, order)  # of the visits in the order in which their tars are read
        self._taken = 0
        to_read = segment.indices[arriving]
        cuts = np.flatnonzero(np.diff(samples.tar_numbers(to_read))) + 1
        self._by_tar = np.split(to_read, cuts)
        self._starts = np.concatenate([[0], cuts, [len(to_read)]])
        self._left = np.diff(self._starts)  # visits of each tar that are still to be taken
        self._held: dict[int, DrawnTar] = {}
        self._arrived = 0
        self._arriving = self._arrive(samples, reader, segment.epoch)

    def _arrive(self, samples: SampleSet, reader: RowReader, epoch: int) -> Iterator[DrawnTar]:
        tar_numbers = [int(samples.tar_numbers(int(indices[0]))) for indices in self._by_tar]
        with contextlib.ExitStack() as stack:
            rows_of_tars = {
                tower: stack.enter_context(contextlib.closing(join.streamed_tars(tar_numbers, samples.view(epoch))))
                for tower, join in samples.caches.items()
            }
            for tar_number, indices in zip(tar_numbers, self._by_tar, strict=True):
                streamed = {tower: next(rows) for tower, rows in rows_of_tars.items()}
                yield reader.draw(tar_number, epoch, indices, streamed)

    def put(self, batch: BatchOfRows, positions: Indices) -> None:
        """Put the next visits into a batch.

        Raises:
            ManifestError: A cache has changed since it was opened, or is damaged.
        """
        ranks = self._ranks[self._taken : self._taken + len(positions)]
        self._taken += len(positions)
        tars = np.searchsorted(self._starts, ranks, "right") - 1
        for number in np.unique(tars).tolist():
            while number not in self._held:
                self._held[self._arrived] = next(self._arriving)
                self._arrived += 1
            own = tars == number
            batch.put(positions[own], self._held[number], ranks[own] - self._starts[number])
            self._left[number] -= np.count_nonzero(own)
            if not self._left[number]:
                del self._held[number]

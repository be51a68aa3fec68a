"""Checking a tar of a cache of text."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.done_record import DoneRecord
from threetowers.cache.format.layout import RowStatus, emb_name
from threetowers.cache.format.store import Arrays
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.read.caption_runs import CaptionRuns
from threetowers.cache.verify.recompute import SampledCaption
from threetowers.cache.verify.statistics import EXAMPLES_SHOWN
from threetowers.cache.verify.tar_checker import Float32Array, TarChecker
from threetowers.cache.webdataset.sample_stream import stream_annotations
from threetowers.cache.webdataset.tar_index import TarIndex


class TextChecker(TarChecker):
    """Checks the rows of captions, a run for each sample."""

    def compare_contents(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        """Compare the captions of each sample with those that were embedded, and their order."""
        sources = self.manifest.caption_sources
        runs = CaptionRuns.of(rows["row_end"][: record.n_samples], rows["caption_source"], rows["caption_hash"])
        changed = []
        for ordinal, annotation in stream_annotations(index, sources.caption_format):
            if rows["status"][ordinal] == RowStatus.OK:
                found = runs.captions(ordinal).differences(sources.names, annotation.captions_by_source)
                if found is not None:
                    changed.append(f"{index.samples.key(ordinal)!r}: {found}")
            elif rows["status"][ordinal] == RowStatus.NO_CAPTION and annotation.captions:
                changed.append(f"{index.samples.key(ordinal)!r}: had no caption")
        if changed:
            examples = ", ".join(changed[:EXAMPLES_SHOWN])
            self.add_problem(entry, f"{len(changed)} samples have other captions than were embedded: {examples}")

    def embedded_rows(self, record: DoneRecord, rows: Arrays) -> npt.NDArray[np.bool_]:
        """Return (n_rows,) that each row has an embedding."""
        return np.ones(record.n_rows, np.bool_)

    def check_addresses(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        """Check that the runs are those of the embedded samples, and that a caption has one embedding."""
        length_n = np.diff(rows["row_end"][: record.n_samples].astype(np.int64), prepend=0)
        ok_n = rows["status"][: record.n_samples] == RowStatus.OK
        if (length_n < 0).any() or length_n.sum() != record.n_rows:
            self.add_problem(entry, "runs that are not those of the done record's rows")
        if (ok_n != (length_n > 0)).any():
            self.add_problem(entry, "a sample with status ok without captions, or captions without status ok")
        if (rows["caption_source"] >= len(self.manifest.caption_sources.names)).any():
            self.add_problem(entry, "a caption of an unknown source")
        _, first, place = np.unique(rows["caption_hash"][: record.n_rows], return_index=True, return_inverse=True)
        emb_nD = rows[emb_name(0)][: record.n_rows]
        if not np.array_equal(emb_nD, emb_nD[first[place]], equal_nan=emb_nD.dtype.kind == "f"):
            self.add_problem(entry, "two embeddings of one caption")

    def content_hashes(self, rows: Arrays) -> npt.NDArray[np.uint64]:
        """Return the hashes of the captions."""
        return rows["caption_hash"].astype(np.uint64)

    def name_of(self, rows: Arrays, index: TarIndex | None) -> Callable[[int], str]:
        """Return what names the sample and the caption of a row."""

        def name(row: int) -> str:
            ordinal, number = _sample_of(rows, row)
            key = "" if index is None else f" {index.samples[ordinal].key!r}"
            return f"{key} ordinal {ordinal} caption {number}"

        return name

    def sampled_row(
        self, priority: float, entry: TarEntry, index: TarIndex, row: int, view: int, row_D: Float32Array, rows: Arrays
    ) -> SampledCaption:
        """Return a row with where its caption is."""
        ordinal, number = _sample_of(rows, row)
        tar = index.only(ordinal)
        return SampledCaption(priority, entry, tar, ordinal, row_D, number, int(rows["caption_hash"][row]))


def _sample_of(rows: Arrays, row: int) -> tuple[int, int]:
    """Return the ordinal of the sample that has a row, and the number of the caption among its own."""
    ordinal = int(np.argmax(rows["row_end"] > row))
    start = int(rows["row_end"][ordinal - 1]) if ordinal else 0
    return ordinal, row - start

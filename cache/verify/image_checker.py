"""Checking a tar of a cache of images."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.format.done_record import DoneRecord
from threetowers.cache.format.layout import RowStatus, params_name
from threetowers.cache.format.store import Arrays
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import params_problem
from threetowers.cache.verify.recompute import SampledImage
from threetowers.cache.verify.statistics import EXAMPLES_SHOWN
from threetowers.cache.verify.tar_checker import Float32Array, TarChecker
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_index import TarIndex


class ImageChecker(TarChecker):
    """Checks the rows of images, one a sample and view."""

    def compare_contents(self, entry: TarEntry, index: TarIndex, record: DoneRecord, rows: Arrays) -> None:
        """Compare the bytes of the images with those that were embedded."""
        digest = xxhash.xxh3_128()
        changed = []
        for ordinal, key, data in stream_images(index, digest):
            if xxhash.xxh3_64_intdigest(data) != rows["image_hash"][ordinal]:
                changed.append(key)
        if changed:
            examples = ", ".join(changed[:EXAMPLES_SHOWN])
            self.add_problem(entry, f"{len(changed)} images are not those that were embedded: {examples}")
        elif digest.hexdigest() != record.tar_xxh3_128:
            self.report.warnings.append(
                f"tar {entry.path} ({entry.id}): its bytes have changed, its images are those that were embedded"
            )

    def embedded_rows(self, record: DoneRecord, rows: Arrays) -> npt.NDArray[np.bool_]:
        """Return (n,) which samples of a tar have an embedding."""
        embedded_n: npt.NDArray[np.bool_] = rows["status"][: record.n_samples] == RowStatus.OK
        return embedded_n

    def check_addresses(self, entry: TarEntry, record: DoneRecord, rows: Arrays) -> None:
        """Check the parameters of the views; a row's address is its sample's."""
        if not self.manifest.views.cropped:
            return
        ok = rows["status"] == RowStatus.OK
        params = [rows[params_name(view)][ok] for view in range(self.manifest.views.count)]
        if problem := params_problem(np.concatenate(params)):
            self.add_problem(entry, problem)

    def content_hashes(self, rows: Arrays) -> npt.NDArray[np.uint64]:
        """Return the hashes of the image files."""
        return rows["image_hash"].astype(np.uint64)

    def name_of(self, rows: Arrays, index: TarIndex | None) -> Callable[[int], str]:
        """Return what names the sample of a row."""

        def name(row: int) -> str:
            return f"{'' if index is None else f' {index.samples[row].key!r}'} ordinal {row}"

        return name

    def sampled_row(
        self, priority: float, entry: TarEntry, index: TarIndex, row: int, view: int, row_D: Float32Array, rows: Arrays
    ) -> SampledImage:
        """Return a row with where its image is and how it was cut."""
        params_P = rows[params_name(view)][row] if self.manifest.views.cropped else None
        tar = index.only(row)
        return SampledImage(priority, entry, tar, row, row_D, view, params_P, int(rows["image_hash"][row]))

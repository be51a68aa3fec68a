"""The join of a cache of images: the row of the view of a sample that an epoch shows."""

from pathlib import Path

import numpy as np
from PIL import Image

from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.stream import TarRows
from threetowers.cache.webdataset.tar_index import key_hash
from threetowers.trainer.data.joins.cache_join import CachedRow, CacheJoin, MissingRow
from threetowers.trainer.data.joins.sample_members import SampleMembers
from threetowers.trainer.data.joins.visit import Visit


class ImageJoin(CacheJoin[CachedRow]):
    """The rows of a cache of images for the tars of a run."""

    side = "image"

    def row(self, tar_number: int, ordinal: int, view: int = 0) -> CachedRow:
        """Return one embedding (D,).

        Raises:
            ManifestError: The cached row belongs to another key, or there is none.
        """
        return self.cache.row(self.tar_id(tar_number), ordinal, self.tars[tar_number].samples.key(ordinal), view)

    def with_fallback(
        self, stored: CachedRow | None, tar_number: int, visit: Visit, members: SampleMembers
    ) -> CachedRow | None:
        """Return the row of a visit, as described for `CacheJoin.with_fallback`."""
        if stored is not None or self.on_missing_row == "mask":
            return stored
        if self.on_missing_row == "live":
            return self._embed(tar_number, members.ordinal, visit.view, members.image)
        # It existed when the epoch began: this raises what has changed
        return self.stored_row(tar_number, members.ordinal, visit)

    def _read(self, tar_id: int, ordinal: int, key: str, visit: Visit) -> CachedRow:
        return self.cache.row(tar_id, ordinal, key, visit.view)

    def _take_from(self, rows: TarRows, ordinal: int, key: str, visit: Visit) -> CachedRow | None:
        return rows.row(ordinal, key)

    def view_params(self, tar_number: int, ordinal: int, view: int, size: tuple[int, int]) -> CachedRow:
        """Return the parameters (P,) of one view of an image of this (width, height), for `views.render_view`."""
        tar_id = self.tar_ids[tar_number]
        if tar_id is not None:
            stored_P = self.cache.view_params(tar_id, ordinal, view)
            if np.isfinite(stored_P).all():
                return stored_P
        # The build left this image out, or never had it: draw the crops that it would have drawn
        key = self.tars[tar_number].samples[ordinal].key
        drawn_P: CachedRow = self.cache.manifest.views.params(key_hash(key), *size)[view]
        return drawn_P

    def _check_tars(self, path: str | Path) -> None:
        expected = self.cache.manifest.image_member
        for tar, tar_id in zip(self.tars, self.tar_ids, strict=True):
            if tar_id is not None and tar.samples.image_member != expected:
                raise ManifestError(
                    f"{path}: image_member: the cache was built from {_member(expected)}, the images of {tar.location} "
                    f"are {_member(tar.samples.image_member)}; set image_member (data.image_member, --image-member) to "
                    "that of the cache, or build a cache from the other member"
                )

    def _embed(self, tar_number: int, ordinal: int, view: int, image: Image.Image) -> CachedRow:
        from threetowers.cache.encoders.live import embed, view_pixels

        encoder = self.load_teacher().side("image")
        params_P = None
        if self.cache.manifest.views.cropped:
            params_P = self.view_params(tar_number, ordinal, view, image.size)
        row_D: CachedRow = embed(encoder, [view_pixels(encoder, image, view, params_P)], self.cache.manifest.feature)[0]
        if not np.isfinite(row_D).all():
            raise MissingRow(f"the embedding by teacher {encoder.name!r} is not finite")
        return row_D


def _member(image_member: str | None) -> str:
    return "the only image of each sample (null)" if image_member is None else f"the member {image_member!r}"

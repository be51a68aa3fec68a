"""The rows of a tar of images: one a sample and view, filled by ordinal."""

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.layout import RowStatus, arrays, emb_name, params_name, scale_name
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.row_buffer import RowBuffer
from threetowers.cache.format.store import Arrays
from threetowers.cache.format.views import Params
from threetowers.cache.webdataset.tar_index import TarIndex


class ImageRowBuffer(RowBuffer):
    """All arrays of a tar of n samples, by name, (n, ...) each, as they will be stored."""

    def __init__(self, index: TarIndex, manifest: Manifest, min_cosine: float | None = None) -> None:
        super().__init__(index, manifest, min_cosine)
        n = len(index.samples)
        self.arrays: Arrays = {
            spec.name: np.full((n, *spec.row), spec.fill, spec.dtype) for spec in arrays(manifest).values()
        }
        self.arrays["key_hash"] = self.key_hash_n
        self.arrays["status"] = self.status_n
        self.cosine_nV = np.full((n, manifest.views.count), np.nan)

    def reject_defects(self) -> int:
        """Record the samples that have no usable image, as far as the tar's headers tell; return their number."""
        count = 0
        for defect, ordinals in self.index.samples.defects().items():
            for ordinal in ordinals.tolist():
                self.reject(ordinal, RowStatus.of(defect), self.index.describe_defect(ordinal))
            count += len(ordinals)
        return count

    def set_image(self, ordinal: int, image_hash: int, params_VP: Params | None = None) -> None:
        """Store the xxh3_64 of a sample's image file, and the parameters of its views."""
        self.arrays["image_hash"][ordinal] = image_hash
        if params_VP is not None and self.manifest.views.cropped:
            for view, params_P in enumerate(params_VP):
                self.arrays[params_name(view)][ordinal] = params_P

    def set_embeddings(self, ordinals: list[int], features_bVD: Float32Array) -> None:
        """Store the embeddings of these samples, of all views; those that are nonfinite as stored are rejected.

        Raises:
            RoundingError: a row that is stored with a smaller cosine to itself than `min_cosine`.
        """
        at = np.array(ordinals)
        finite_bV = np.empty(features_bVD.shape[:2], bool)
        for view in range(features_bVD.shape[1]):
            rows = self._encode(features_bVD[:, view])
            ok = rows.finite_b
            finite_bV[:, view] = ok
            self.arrays[emb_name(view)][at[ok]] = rows.stored_bD[ok]
            if rows.scale_b is not None:
                self.arrays[scale_name(view)][at[ok]] = rows.scale_b[ok]
            self.cosine_nV[at[ok], view] = rows.cosine_b[ok]
        self.status_n[at] = RowStatus.OK
        ok_b = finite_bV.all(axis=1)
        for i in np.flatnonzero(~ok_b):
            self.reject(ordinals[i], RowStatus.NON_FINITE, self._why_nonfinite(features_bVD[i]))
        coarse_b = ok_b & (self.cosine_nV[at].min(axis=1, initial=np.inf) < self.min_cosine)
        if coarse_b.any():
            first = int(np.flatnonzero(coarse_b)[0])
            raise self._rounding_error(ordinals[first], "", features_bVD[first])

    def reject(self, ordinal: int, status: RowStatus, reason: str) -> None:
        """Record that a sample has no embedding, and why."""
        for view in range(self.manifest.views.count):
            self.arrays[emb_name(view)][ordinal] = self.dtype.fill
            if self.dtype.scaled:
                self.arrays[scale_name(view)][ordinal] = np.nan
        self.cosine_nV[ordinal] = np.nan
        super().reject(ordinal, status, reason)

    def stored_arrays(self) -> Arrays:
        """Return what will be stored, by the name of the array."""
        return self.arrays

    def embedded_rows(self) -> npt.NDArray[np.bool_]:
        """Return (n,) which samples have an embedding."""
        embedded_n: npt.NDArray[np.bool_] = self.status_n == RowStatus.OK
        return embedded_n

    def row_cosines(self) -> npt.NDArray[np.float64]:
        """Return the cosines of the embeddings as stored with the embeddings as computed, (rows, V)."""
        return self.cosine_nV[self.embedded_rows()]

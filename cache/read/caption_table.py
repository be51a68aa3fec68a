"""Rows of a cache of text by the words of a caption, where only these are known."""

from collections.abc import Sequence

import numpy as np

from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.webdataset.captions import caption_hash, shortened


class CaptionTable:
    """The captions of some tars of a cache of text, each with a row of it: 32 bytes for each different one.

    An encoder embeds a caption by its words alone, so that a row of the same words is its row, of whatever sample.
    """

    def __init__(self, cache: EmbeddingCache, tar_ids: Sequence[int]) -> None:
        """Read which captions the tars have.

        Raises:
            ManifestError: A tar is incomplete or damaged, or the cache is of images.
        """
        self._sources = ", ".join(cache.manifest.caption_sources.names)
        self._cache = cache
        self._tars = len(tar_ids)
        hashes = [np.empty(0, np.uint64)]
        addresses = [np.empty((0, 3), np.int64)]
        for tar_id in tar_ids:
            runs = cache.columns(tar_id).runs
            assert runs is not None  # the cache is of text
            hashes.append(runs.hash_r)
            ordinal_r, number_r = runs.addresses()
            addresses.append(np.stack([np.full_like(ordinal_r, tar_id), ordinal_r, number_r], axis=1))
        self._hash_u, first = np.unique(np.concatenate(hashes), return_index=True)
        # (u, 3): the id of a tar, a sample's place in it, and the number of the caption among those of the sample
        self._address_u3 = np.concatenate(addresses)[first]

    def __len__(self) -> int:
        """Return the number of different captions."""
        return len(self._hash_u)

    def rows(self, captions: Sequence[str]) -> Float32Array:
        """Return the raw embeddings of m captions, (m, D) float32.

        Raises:
            ManifestError: A caption has no row, or a row is damaged.
        """
        hash_m = np.array([caption_hash(caption) for caption in captions], np.uint64)
        at_m = np.searchsorted(self._hash_u, hash_m)
        known_m = at_m < len(self)
        known_m[known_m] = self._hash_u[at_m[known_m]] == hash_m[known_m]
        if not known_m.all():
            missing = [caption for caption, known in zip(captions, known_m.tolist(), strict=True) if not known]
            raise ManifestError(
                f"{self._cache.storage}: no row of {len(missing)} of {len(captions)} captions, as of "
                f"{shortened(missing[0])}: its {self._tars} tars have rows of {len(self):,} captions, from "
                f"{self._sources}"
            )
        tar_m, ordinal_m, number_m = self._address_u3[at_m].T
        return self._cache.rows(tar_m, ordinal_m, captions=number_m)

"""Which rows of the heads' embeddings terms take: of which samples, and of which of their captions."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.trainer.config import Pairing, TrainConfig

BoolArray = npt.NDArray[np.bool_]


class TermRows:
    """The rows of terms of one pairing over the same samples.

    They are found on the host: to find them on the device is to wait for it.

    Attributes:
        owner_m: Of terms that take all captions, the number of each one's sample among the samples, on the device.
    """

    def __init__(
        self,
        config: TrainConfig,
        embeddings: Mapping[str, Tensor],
        pairing: Pairing,
        owner_m: Tensor | None,
        has_b: BoolArray | None,
    ) -> None:
        """Find the rows.

        Args:
            config: The run.
            embeddings: Of the local batch, by head.
            pairing: Of the terms.
            owner_m: Where samples may have several captions, the sample of each, as in `Batch`.
            has_b: Which samples take part; None: all.
        """
        self._config = config
        self._embeddings = embeddings
        self._device = next(iter(embeddings.values())).device
        self._samples_n = None if has_b is None else self._on_device(np.flatnonzero(has_b))
        self._captions_n = self._samples_n
        self.owner_m: Tensor | None = None
        if owner_m is None:
            return

        # The captions of these samples: the first of each, or all.
        sample_m = owner_m.numpy()
        number_b = np.arange(sample_m[-1] + 1 if len(sample_m) else 0)
        if has_b is not None:
            number_b = np.cumsum(has_b) - 1
        takes_m = np.ones(len(sample_m), np.bool_) if has_b is None else has_b[sample_m]
        if pairing == "samples":
            takes_m = takes_m & (np.diff(sample_m, prepend=-1) > 0)
        self._captions_n = self._on_device(np.flatnonzero(takes_m))
        if pairing != "samples":
            self.owner_m = self._on_device(number_b[sample_m[takes_m]])

    def take(self, head: str) -> Tensor:
        """Return a head's embeddings of these rows."""
        embeddings_nD = self._embeddings[head]
        of_text = self._config.side_of(self._config.root_of(head)) == "text"
        rows_n = self._captions_n if of_text else self._samples_n
        return embeddings_nD if rows_n is None else embeddings_nD.index_select(0, rows_n)

    def groups(self, groups_b: Tensor) -> Tensor:
        """Return the groups of the samples, by those of all."""
        return groups_b if self._samples_n is None else groups_b.index_select(0, self._samples_n)

    def caption_groups(self, groups_b: Tensor | None) -> Tensor:
        """Return the groups of the captions, by those of all samples; without these, each sample's are a group."""
        assert self.owner_m is not None
        if groups_b is None:
            return self.owner_m + (RankGroup().rank << 40)
        return self.groups(groups_b).index_select(0, self.owner_m)

    def _on_device(self, rows: npt.NDArray[np.int64]) -> Tensor:
        rows_n = torch.from_numpy(rows)
        if self._device.type == "cuda":
            rows_n = rows_n.pin_memory()
        return rows_n.to(self._device, non_blocking=True)

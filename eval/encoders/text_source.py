"""The source of a text tower's input: tokens, the rows of a cache, or the live teacher."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from threetowers.cache.info import input_text
from threetowers.cache.read.caption_table import CaptionTable
from threetowers.eval.datasets.image_set import ImageSet
from threetowers.eval.encoders.cached_input import CachedInput

TextInput = Callable[[Sequence[str]], Tensor]  # the input of a text tower, of a batch of texts


class TextSource:
    """How captions, and texts that are none, become a text tower's input."""

    def __init__(self, tokens: TextInput, cached: CachedInput | None) -> None:
        """Make the source of one tower of a run.

        Args:
            tokens: The run's own tokens of texts.
            cached: What a cached tower takes; None for another tower.
        """
        self.cached = cached
        self._tokens = tokens

    def captions(self, data: ImageSet) -> TextInput:
        """Return what reads captions of a set.

        Raises:
            ManifestError: The cache, or the live teacher, is another one than that of the run, or the cache lacks a
                tar of the set; and when it is called, where a caption has no row.
            ValueError: The live teacher cannot be loaded.
        """
        cached = self.cached
        if cached is None or not cached.reads_rows:
            return self.texts()
        cache = cached.cache()
        with cached.explained():
            table = CaptionTable(cache, [cache.table.find(tar).id for tar in data.tars])

        def rows(captions: Sequence[str]) -> Tensor:
            with cached.explained():
                return torch.from_numpy(table.rows(captions))

        return rows

    def texts(self) -> TextInput:
        """Return what reads any text, which no cache holds.

        Raises:
            ManifestError: The live teacher is another one than that of the run.
            ValueError: It cannot be loaded, or is not allowed.
        """
        cached = self.cached
        if cached is None:
            return self._tokens
        if not cached.computes:
            raise ValueError(
                f"the text tower of this run takes rows of {cached.manifest.encoder}, and no cache has rows of class "
                "names, prompts or queries: let the teacher embed them (--live-teacher)"
            )
        teacher = cached.teacher.side("text")

        def embedded(texts: Sequence[str]) -> Tensor:
            return teacher.embed(texts, cached.manifest.feature)

        return embedded

    def __str__(self) -> str:
        """Return what a cached tower takes; nothing for another one."""
        return f"{self.cached}: {input_text(self.cached.manifest)}" if self.cached else ""

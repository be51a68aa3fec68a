"""The third tower of a run mixed into its main image tower."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, joined_digests
from threetowers.eval.encoders.fingerprint import model_fingerprint

EnsembleSpace = Literal["embedding", "logit"]


@dataclass(frozen=True)
class EnsembleOptions:
    """How the third tower's image embedding is mixed into the main tower's.

    Attributes:
        tower: Name of the third tower.
        weight: Weight w of the third tower, in 0..1; 0 is the main tower alone.
        space: embedding: norm((1 - w) f(I) + w h_g(I)), compared with g(T). logit: (1 - w) times the logit of f(I) and
            g(T), plus w times that of h_g(I) and g_h(T).
    """

    tower: str
    weight: float
    space: EnsembleSpace = "embedding"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"ensemble {self.tower}={self.weight}: expected a weight between 0 and 1")

    def __str__(self) -> str:
        return f"{self.tower}={self.weight:g}" + ("" if self.space == "embedding" else " (logits)")


class EnsembleEncoder(Encoder):
    """A run's main heads with its third tower mixed in, by `EnsembleOptions`.

    The parts have stores of their own, so that both are embedded once for all weights.
    """

    def __init__(self, main: Encoder, third: Encoder, options: EnsembleOptions) -> None:
        self.main = main
        self.third = third
        self.options = options
        self.search_device = main.search_device
        # In logit space the weighted sum of two scaled cosines is one scaled cosine of concatenated vectors.
        weights = ((1 - options.weight) * main.logit_scale, options.weight * third.logit_scale)
        self._roots = [np.float32(np.sqrt(weight / sum(weights))) for weight in weights]
        if options.space == "embedding":
            self.logit_scale = main.logit_scale
            self.dim = main.dim
        else:
            self.logit_scale = sum(weights)
            self.dim = main.dim + third.dim
        identity = "\n".join((main.info.digest, third.info.digest, repr(options)))
        self.info = replace(
            main.info,
            name=f"{main.info.name}+{options}",
            digest=hashlib.sha256(identity.encode()).hexdigest(),
            preprocessing=f"{main.info.preprocessing}; third: {third.info.preprocessing}",
            fingerprint=model_fingerprint(
                main=main.info.fingerprint, third=third.info.fingerprint, options=asdict(options)
            ),
            cache_manifest=joined_digests(main.info.cache_manifest, third.info.cache_manifest),
            recipe=f"{main.info.recipe} {options!r}" if main.info.recipe else None,
        )

    @property
    def cached_towers(self) -> tuple[str, ...]:
        """Those of both parts."""
        return tuple(dict.fromkeys((*self.main.cached_towers, *self.third.cached_towers)))

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield one batch: mixed embeddings, or with `features` the main tower's features."""
        if features:
            yield self.main.features(data, images)
            return
        main_ND = self.main.images(data, images)
        third_ND = self.third.images(data, images)
        if self.options.space == "logit":
            yield self._joined(main_ND, third_ND)
        else:
            yield (1 - self.options.weight) * main_ND + self.options.weight * third_ND

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield one batch: the main head's text embeddings, in logit space joined with the third tower's."""
        main_MD = self.main.texts(captions)
        yield main_MD if self.options.space == "embedding" else self._joined(main_MD, self.third.texts(captions))

    def raw_caption_batches(self, data: ImageSet, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield the same of captions of a set."""
        main_MD = self.main.captions(data, captions)
        in_main = self.options.space == "embedding"
        yield main_MD if in_main else self._joined(main_MD, self.third.captions(data, captions))

    def text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield the text embeddings as they are: they have unit norm already."""
        return self.raw_text_batches(captions)

    def caption_batches(self, data: ImageSet, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield the embeddings of captions as they are."""
        return self.raw_caption_batches(data, captions)

    def normalized(self, x_bD: Embeddings) -> Embeddings:
        """Return mixed image embeddings scaled to unit norm; joined ones, which have it already, as they are."""
        return super().normalized(x_bD) if self.options.space == "embedding" else self.checked(x_bD)

    def _joined(self, main_ND: Embeddings, third_ND: Embeddings) -> Embeddings:
        return np.concatenate([self._roots[0] * main_ND, self._roots[1] * third_ND], axis=1)

"""The third tower of a run mixed into its main image tower."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture
from threetowers.eval.encoders.encoder import Encoder

Space = Literal["embedding", "logit"]


@dataclass(frozen=True)
class Mixing:
    """How the third tower's image embedding is mixed into the main tower's. `alpha` 0 is the main tower alone.

    embedding: norm((1 - alpha) f(I) + alpha h_g(I)), compared with g(T)
    logit: (1 - alpha) times the logit of f(I) and g(T), plus alpha times that of h_g(I) and g_h(T)
    """

    tower: str
    alpha: float
    space: Space = "embedding"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"mixing {self.tower}={self.alpha}: the share must lie between 0 and 1")

    def __str__(self) -> str:
        return f"{self.tower}={self.alpha:g}" + ("" if self.space == "embedding" else " (logits)")


class Mixed:
    """A run's main pair with its third tower mixed in: two encoders as one, by `Mixing`."""

    def __init__(self, main: Encoder, third: Encoder, mixing: Mixing) -> None:
        self.main, self.third, self.mixing = main, third, mixing
        # In logit space the weighted sum of two scaled cosines is one scaled cosine of concatenated vectors.
        weights = (1 - mixing.alpha) * main.logit_scale, mixing.alpha * third.logit_scale
        self.logit_scale = main.logit_scale if mixing.space == "embedding" else sum(weights)
        self._shares = [np.float32(np.sqrt(weight / sum(weights))) for weight in weights]
        self.dim = main.dim if mixing.space == "embedding" else main.dim + third.dim
        self.sees_text = True
        parts = (main.facts.digest, third.facts.digest, repr(mixing))
        self.facts = replace(
            main.facts,
            name=f"{main.facts.name}+{mixing}",
            digest=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
            preprocessing=f"{main.facts.preprocessing}; third: {third.facts.preprocessing}",
            cache_manifest=third.facts.cache_manifest,
            recipe=f"{main.facts.recipe} {mixing!r}" if main.facts.recipe else None,
        )

    def images(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        main, third = self.main.images(data, pictures), self.third.images(data, pictures)
        if self.mixing.space == "logit":
            return self._joined(main, third)
        mixed = (1 - self.mixing.alpha) * main + self.mixing.alpha * third
        return np.asarray(mixed / np.linalg.norm(mixed, axis=1, keepdims=True), dtype=np.float32)

    def features(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        return self.main.features(data, pictures)

    def texts(self, captions: Sequence[str]) -> Floats:
        main = self.main.texts(captions)
        return main if self.mixing.space == "embedding" else self._joined(main, self.third.texts(captions))

    def _joined(self, main: Floats, third: Floats) -> Floats:
        return np.concatenate([self._shares[0] * main, self._shares[1] * third], axis=1)

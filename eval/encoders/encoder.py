"""What embeds images and captions, as every task sees it, whatever kind of model is behind it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture

Precision = Literal["float32", "bfloat16", "float16"]


class NoTextTower(ValueError):
    """Captions were given to a model that sees images only."""


@dataclass(frozen=True)
class ModelInfo:
    """What a record says of a model. `digest` is of its weights, `step` the optimizer steps it had trained, if known.

    precision: of the towers' forward pass          preprocessing: the transform before the image tower, in words
    cache_contract: digest of the contract, where the model reads cached rows
    recipe: digest of a run's config without its seed and folder; runs of one recipe are compared over their seeds
    """

    name: str
    digest: str
    step: int | None
    precision: str
    preprocessing: str
    cache_manifest: str | None = None
    recipe: str | None = None
    seed: int | None = None


class Described(Protocol):
    """What is known of a model before it is run.

    `dim` is the width of an embedding, `logit_scale` the learned exp(log_scale) of image and text (1.0 where there is
    none): cosines times it are the logits whose softmax is calibrated as far as the model is.
    """

    @property
    def facts(self) -> ModelInfo: ...
    @property
    def dim(self) -> int: ...
    @property
    def sees_text(self) -> bool: ...
    @property
    def logit_scale(self) -> float: ...


class Encoder(Described, Protocol):
    """A model as every task sees it."""

    def images(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        """Unit-norm embeddings (n, dim) float32."""
        ...

    def features(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        """The image tower's output (n, width) float32, before heads and normalisation: what probes are fitted on."""
        ...

    def texts(self, captions: Sequence[str]) -> Floats:
        """Unit-norm embeddings (n, dim) float32. Raises NoTextTower for a model that sees images only."""
        ...


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded and run.

    caches: for a model that reads cached rows, the cache of the evaluation images, by tower
    live_teacher: compute such rows by the teacher itself
    workers: processes that read and decode images beside the model; 0: none
    embeddings: folder where embeddings are kept, so that each is computed once; None: nowhere
    """

    caches: Mapping[str, Path] = field(default_factory=dict)
    live_teacher: bool = False
    device: str = "auto"
    precision: Precision = "float32"
    batch_size: int = 256
    workers: int = 1
    max_pixels: int = 50_000_000
    embeddings: Path | None = None

    def torch_device(self) -> torch.device:
        """The device meant: with "auto", the first GPU where there is one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class Tower(Described, Protocol):
    """What a kind of model gives, batch by batch; `Batched` makes an `Encoder` of it."""

    def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture], raw: bool) -> Iterator[Floats]:
        """Embeddings, or with `raw` features, of the pictures in order; not yet normalised."""
        ...

    def text_batches(self, captions: Sequence[str]) -> Iterator[Floats]:
        """Embeddings of the captions in order; not yet normalised. Raises NoTextTower."""
        ...


class Batched:
    """An encoder that computes what it is asked for."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower

    @property
    def facts(self) -> ModelInfo:
        return self.tower.facts

    @property
    def dim(self) -> int:
        return self.tower.dim

    @property
    def sees_text(self) -> bool:
        return self.tower.sees_text

    @property
    def logit_scale(self) -> float:
        return self.tower.logit_scale

    def images(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        return self._gather(self.image_batches(data, pictures))

    def features(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Floats:
        return self._gather(self.feature_batches(data, pictures))

    def texts(self, captions: Sequence[str]) -> Floats:
        return self._gather(self.text_batches(captions))

    def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Iterator[Floats]:
        """As `images`, in pieces."""
        return map(self._unit, self.tower.image_batches(data, pictures, raw=False))

    def feature_batches(self, data: EvaluationSet, pictures: Sequence[Picture]) -> Iterator[Floats]:
        """As `features`, in pieces."""
        return map(self._finite, self.tower.image_batches(data, pictures, raw=True))

    def text_batches(self, captions: Sequence[str]) -> Iterator[Floats]:
        """As `texts`, in pieces."""
        return map(self._unit, self.tower.text_batches(captions))

    def _gather(self, batches: Iterator[Floats]) -> Floats:
        parts = list(batches)
        if not parts:
            raise ValueError(f"{self.facts.name}: nothing to embed")
        return np.concatenate(parts)

    def _finite(self, x_bD: Floats) -> Floats:
        bad_b = np.atleast_1d(~np.isfinite(x_bD).all(axis=1))
        if bad_b.any():
            raise ValueError(
                f"{self.facts.name} gives NaN or infinity for {int(bad_b.sum())} of {len(bad_b)} inputs of a batch, "
                f"the first at place {int(bad_b.argmax())}: evaluate in float32, and see whether training diverged"
            )
        return x_bD

    def _unit(self, x_bD: Floats) -> Floats:
        norms_b1 = np.linalg.norm(self._finite(x_bD), axis=1, keepdims=True)
        # A row of zeros has no direction: it stays, and the ranks refuse it by name.
        unit_bD: Floats = np.divide(x_bD, np.where(norms_b1 > 0, norms_b1, 1), dtype=np.float32)
        return unit_bD


def file_digest(path: Path) -> str:
    """sha256 of a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

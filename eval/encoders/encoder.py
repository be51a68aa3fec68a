"""Models as every task sees them: images, features and captions to vectors, whatever kind of model computes them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from threetowers.cache.format.manifest import EncoderRuntime
from threetowers.cache.webdataset.images import MAX_PIXELS
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.arithmetic import PrecisionName
from threetowers.eval.encoders.embedding_store import Embeddings, EmbeddingStore
from threetowers.eval.search.index import Device


class NoTextTower(ValueError):
    """Captions were given to a model that sees images only."""


@dataclass(frozen=True)
class ModelInfo:
    """What identifies a model in records.

    Attributes:
        name: Name in records and tables.
        digest: SHA-256 of its weights.
        step: Optimizer steps it was trained for; None: unknown.
        precision: Of its forward pass.
        preprocessing: Transform before the image tower, in words.
        fingerprint: `model_fingerprint` of all that decides its embeddings and scores: what the other fields tell in
            words, and the architecture with its arguments, the heads, the tokenizer and the transform as they are.
        cache_manifest: Digests of the manifests of the caches whose rows it reads.
        recipe: Digest of a run's config without its seed and folder; runs of one recipe are compared over their seeds.
        seed: Seed of a run.
        tokenizer: Of a run's text tower, by name and sha256.
    """

    name: str
    digest: str
    step: int | None
    precision: str
    preprocessing: str
    fingerprint: str
    cache_manifest: str | None = None
    recipe: str | None = None
    seed: int | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class LoadOptions:
    """How models are loaded and run.

    Attributes:
        caches: For a model that reads cached rows, the cache of the evaluation images, or captions, by tower.
        live_teacher: Compute such rows by the teacher itself, where `caches` does not name a cache of them.
        device: cpu, cuda or cuda:N, for the models and for FAISS; auto takes a GPU if there is one.
        precision: Of the towers' forward pass; None: that in which a run was trained, float32 for other models.
        runtime: Of the forward pass of the image side of frozen encoders.
        batch_size: Images or captions per forward pass.
        workers: Processes that read and decode images beside the model; 0: none.
        max_pixels: Largest width x height of an image that is decoded.
        embeddings: Folder where embeddings are kept, so that each is computed once; None: they are not kept.
    """

    caches: Mapping[str, str | Path] = field(default_factory=dict)
    live_teacher: bool = False
    device: str = "auto"
    precision: PrecisionName | None = None
    runtime: EncoderRuntime = "torch"
    batch_size: int = 256
    workers: int = 1
    max_pixels: int = MAX_PIXELS
    embeddings: Path | None = None

    def torch_device(self) -> torch.device:
        """Return the device to run on. Raises ValueError for one that is not there."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"--device {self.device!r}: expected cpu, cuda, cuda:N or auto") from error
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {self.device!r}: found {torch.cuda.device_count()} GPUs; use cpu or auto")
        return device

    @property
    def search_device(self) -> Device:
        """Where FAISS searches: on the CPU for `cpu`, on that GPU for `cuda:N`, else on all GPUs that it sees."""
        return "auto" if self.device == "cuda" else self.device


class Encoder(ABC):
    """A model as every task sees it.

    A kind of model sets the attributes and implements `raw_image_batches` and `raw_text_batches`.

    Attributes:
        info: What identifies the model in records.
        dim: Width of its embeddings.
        sees_text: Whether it embeds captions.
        by_runtime: Whether `LoadOptions.runtime` is what runs its image side.
        logit_scale: The learned inverse temperature of image and text; 1.0 where there is none. Cosines times it are
            the logits whose softmax is calibrated as far as the model is.
        store: Where embeddings are kept; None: they are computed at each call.
        search_device: Where FAISS searches them, as `build_index` takes it.
    """

    info: ModelInfo
    dim: int
    sees_text: bool = True
    by_runtime: bool = False
    logit_scale: float = 1.0
    store: EmbeddingStore | None = None
    search_device: Device = "auto"

    @property
    def cached_towers(self) -> tuple[str, ...]:
        """The towers that are cached teachers, by the names that `LoadOptions.caches` knows them by."""
        return ()

    @abstractmethod
    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield embeddings, not yet normalised, or with `features` features, of images in their order."""

    @abstractmethod
    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield embeddings, not yet normalised, of captions in their order. Raises NoTextTower."""

    def raw_caption_batches(self, data: ImageSet, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield the same of captions of a set, which a model may find elsewhere than in their words."""
        return self.raw_text_batches(captions)

    def images(self, data: ImageSet, images: Sequence[EvalImage]) -> Embeddings:
        """Return unit-norm embeddings (n, dim), float32, of images of a set."""
        if self.store is None:
            return self._concatenate(self.image_batches(data, images))
        self._check_not_empty(images)
        return self.store.images("images", self.info.fingerprint, data, images, self.image_batches)

    def features(self, data: ImageSet, images: Sequence[EvalImage]) -> Embeddings:
        """Return the image tower's output (n, width), float32, before heads and normalisation: the input of probes."""
        if self.store is None:
            return self._concatenate(self.feature_batches(data, images))
        self._check_not_empty(images)
        return self.store.images("features", self.info.fingerprint, data, images, self.feature_batches)

    def texts(self, captions: Sequence[str]) -> Embeddings:
        """Return unit-norm embeddings (n, dim), float32. Raises NoTextTower for a model that sees images only."""
        if self.store is None:
            return self._concatenate(self.text_batches(captions))
        self._check_not_empty(captions)
        return self.store.texts(self.info.fingerprint, captions, self.text_batches)

    def captions(self, data: ImageSet, captions: Sequence[str]) -> Embeddings:
        """Return what `texts` returns, of captions of the samples of a set, for which a cache may have rows."""
        if self.store is None:
            return self._concatenate(self.caption_batches(data, captions))
        self._check_not_empty(captions)
        return self.store.texts(self.info.fingerprint, captions, partial(self.caption_batches, data))

    def image_batches(self, data: ImageSet, images: Sequence[EvalImage]) -> Iterator[Embeddings]:
        """Yield batches of what `images` returns."""
        return map(self.normalized, self.raw_image_batches(data, images, features=False))

    def feature_batches(self, data: ImageSet, images: Sequence[EvalImage]) -> Iterator[Embeddings]:
        """Yield batches of what `features` returns."""
        return map(self.checked, self.raw_image_batches(data, images, features=True))

    def text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield batches of what `texts` returns."""
        return map(self.normalized, self.raw_text_batches(captions))

    def caption_batches(self, data: ImageSet, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield batches of what `captions` returns."""
        return map(self.normalized, self.raw_caption_batches(data, captions))

    def normalized(self, x_bD: Embeddings) -> Embeddings:
        """Return the rows of a batch scaled to unit norm."""
        norms_b1 = np.linalg.norm(self.checked(x_bD), axis=1, keepdims=True)
        # A row of zeros has no direction: it stays, and the retrieval ranks refuse it by name.
        unit_bD: Embeddings = np.divide(x_bD, np.where(norms_b1 > 0, norms_b1, 1), dtype=np.float32)
        return unit_bD

    def checked(self, x_bD: Embeddings) -> Embeddings:
        """Return a batch as it is. Raises ValueError where it holds NaN or infinity."""
        bad_b = np.atleast_1d(~np.isfinite(x_bD).all(axis=1))
        if bad_b.any():
            raise ValueError(
                f"{self.info.name} gives NaN or infinity for {int(bad_b.sum())} of {len(bad_b)} inputs of a batch, "
                f"the first at position {int(bad_b.argmax())}: evaluate in float32, and check whether training diverged"
            )
        return x_bD

    def no_text_tower(self) -> NoTextTower:
        """Return the error of a model that is given captions but sees images only."""
        return NoTextTower(f"{self.info.name} sees images only: leave it out of tasks with captions or prompts")

    def _concatenate(self, batches: Iterator[Embeddings]) -> Embeddings:
        parts = list(batches)
        self._check_not_empty(parts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _check_not_empty(self, inputs: Sequence[object]) -> None:
        if not inputs:
            raise ValueError(f"{self.info.name}: nothing to embed")


def joined_digests(*digests: str | None) -> str | None:
    """Return the digests of some manifests as one, each once; None where there are none."""
    each = [digest for joined in digests if joined for digest in joined.split()]
    return " ".join(dict.fromkeys(each)) or None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

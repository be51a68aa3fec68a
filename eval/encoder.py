"""What embeds images and captions: our runs and exports, open_clip and timm models, the rows of a cache."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import xxhash

from threetowers.eval.embed import EvaluationSet, Floats, Picture

Precision = Literal["float32", "bfloat16", "float16"]
Space = Literal["embedding", "logit"]
KINDS = ("open_clip", "timm", "cache")


class NoTextTower(ValueError):
    """Captions were given to a model that sees images only."""


@dataclass(frozen=True)
class Facts:
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
    cache_contract: str | None = None
    recipe: str | None = None
    seed: int | None = None


class Encoder(Protocol):
    """A model as every task sees it.

    `dim` is the width of an embedding, `logit_scale` the learned exp(log_scale) of image and text (1.0 where there is
    none): cosines times it are the logits whose softmax is calibrated as far as the model is.
    """

    @property
    def facts(self) -> Facts: ...
    @property
    def dim(self) -> int: ...
    @property
    def sees_text(self) -> bool: ...
    @property
    def logit_scale(self) -> float: ...

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
class Loading:
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


def load_encoder(spec: str | Path, loading: Loading | None = None, mixing: Mixing | None = None) -> Encoder:
    """Return a model by what names it.

    a folder                    a finished run, or an export
    open_clip:NAME[:WEIGHTS]    an open_clip model; WEIGHTS a file or one of its pretrained tags, none: random
    timm:NAME[@SIZE][:WEIGHTS]  a timm model or a folder it saved, images only; WEIGHTS as of `cache build --weights`
    cache:PATH                  the rows of a cache as they are, images only

    Raises ValueError for a spec or folder that names no model, and for mixing in a model without a third tower.
    """
    loading = loading or Loading()
    kind, colon, rest = str(spec).partition(":")
    if kind in KINDS and colon:
        if mixing is not None:
            raise ValueError(f"{spec}: mixing needs a run with a third tower")
        name, _, weights = rest.partition(":")
        if not name:
            raise ValueError(f"{spec!r}: expected {kind}:NAME")
        return _kept(_other(kind, name, weights or None, loading, rest), loading)
    path = Path(spec)
    if not path.is_dir():
        raise ValueError(f"{spec!r} is no folder of a run or an export; other models: {', '.join(KINDS)}:NAME")
    from threetowers.eval.encoders.run import main_pair, third_pair

    main = _kept(main_pair(path, loading), loading)
    return main if mixing is None else Mixed(main, _kept(third_pair(path, mixing.tower, loading), loading), mixing)


class Tower(Protocol):
    """What a kind of model gives, batch by batch; `Batched` makes an `Encoder` of it."""

    @property
    def facts(self) -> Facts: ...
    @property
    def dim(self) -> int: ...
    @property
    def sees_text(self) -> bool: ...
    @property
    def logit_scale(self) -> float: ...

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
    def facts(self) -> Facts:
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
            cache_contract=third.facts.cache_contract,
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


def file_digest(path: Path) -> str:
    """sha256 of a file of weights."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pictures_digest(data: EvaluationSet, pictures: Sequence[Picture]) -> str:
    """Of which pictures, in which order: tars by fingerprint, samples by place and key."""
    digest = xxhash.xxh3_128()
    for tar in data.tars:
        digest.update(f"{tar.fingerprint}\n".encode())
    for picture in pictures:
        digest.update(f"{picture.tar}:{picture.ordinal}:{picture.key}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _other(kind: str, name: str, weights: str | None, loading: Loading, rest: str) -> Tower:
    if kind == "open_clip":
        from threetowers.eval.encoders.openclip import OpenClipTower

        return OpenClipTower(name, weights, loading)
    if kind == "timm":
        from threetowers.eval.encoders.classifier import ClassifierTower

        return ClassifierTower(name, weights, loading)
    from threetowers.eval.encoders.cached import CachedRows

    return CachedRows(rest, loading)


def _kept(tower: Tower, loading: Loading) -> Encoder:
    encoder = Batched(tower)
    if loading.embeddings is None:
        return encoder
    from threetowers.eval.kept import Kept

    return Kept(encoder, loading.embeddings)

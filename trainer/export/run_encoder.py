"""Finished runs and exports of ours as encoders, so that a trained model can teach the next one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import (
    FrozenEncoder,
    ImageEncoder,
    ImageModel,
    TextEncoder,
    TextModel,
    require_offered,
    state_digest,
)
from threetowers.cache.encoders.live import LiveTeachers
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer, Tokens
from threetowers.cache.format.manifest import Preprocessing, Side, TextProcessing
from threetowers.trainer.config import CacheTower
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.trained_model import TrainedModel, load_model
from threetowers.trainer.run.finished_run import finished_run_folder

KIND = "run"
HEAD = "head:"  # begins the name of a feature that is the output of a head


class RunHeads(nn.Module):
    """The features of one side of a run: the output of a tower, and of the heads on it, before normalisation.

    `pooled` is the tower's output, `projected` that of the deployed head, whose normalised form is the embedding of
    `load_model(...)`, and `head:NAME` that of any head on the same tower.
    """

    def __init__(self, trained: TrainedModel, deployed: str) -> None:
        super().__init__()
        config = trained.config
        self.tower = config.root_of(deployed)
        self._below = {name: head.of for name, head in config.heads.items() if config.root_of(name) == self.tower}
        self._deployed = deployed
        self.heads = nn.ModuleDict({name: trained.model.heads[name] for name in self._below})
        self.features = ("pooled", "projected", *(HEAD + name for name in self._below))

    def forward(self, tower_bw: Tensor, features: Sequence[str], name: str) -> tuple[Tensor, ...]:
        """Return the wanted features (b, D) of the tower's output; `name` is the encoder's, for messages."""
        known = {self.tower: tower_bw}

        def output_of(head: str) -> Tensor:
            if head not in known:
                known[head] = self.heads[head](output_of(self._below[head]))
            return known[head]

        for feature in features:
            require_offered(feature, self.features, name)
        heads = {"pooled": self.tower, "projected": self._deployed}
        return tuple(output_of(heads.get(feature, feature.removeprefix(HEAD))) for feature in features)


class RunImageModel(ImageModel):
    """The image side of a run: its image tower, or the frozen encoder whose cached rows it was trained on (LiT)."""

    def __init__(self, tower: nn.Module, heads: RunHeads, below: tuple[ImageModel, str] | None, name: str) -> None:
        """Join a tower and its heads.

        Args:
            tower: An image tower, or a `CachedTower` on the features of `below`.
            heads: On the tower.
            below: The model and the feature that make the rows of a cached tower; None for another tower.
            name: Of the encoder, for messages.
        """
        super().__init__()
        self.tower: Any = tower
        self.heads = heads
        self._below: ImageModel | None = below[0] if below else None
        self._feature = below[1] if below else ""
        self._name = name
        self.features = heads.features

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        if self._below is not None:
            (rows_bw,) = self._below(x_b3HW, (self._feature,))
            tower_bw = self.tower(rows_bw)
        else:
            tower_bw = self.tower.forward_normalized(x_b3HW)  # the pixels are normalised by now
        outputs: tuple[Tensor, ...] = self.heads(tower_bw, features, self._name)
        return outputs


class RunTextModel(TextModel):
    """The text side of a run: its text tower, with its own tokenizer."""

    def __init__(self, trained: TrainedModel, heads: RunHeads, prompt: str, max_length: int | None, name: str) -> None:
        """Join the text tower and its heads. Raises ValueError for a length that is not that of the run."""
        super().__init__()
        self.tower: Any = trained.model.towers[heads.tower]
        self.heads = heads
        self._name = name
        assert trained.tokenizer is not None
        self._tokenizer: Tokenizer = trained.tokenizer
        self._length = trained.config.data.context_length
        self._padded_in_full = trained.config.towers[heads.tower].sees_padding
        if max_length not in (None, self._length):
            raise ValueError(f"{name}: --max-length: found {max_length}, expected that of the run, {self._length}")
        self.features = heads.features
        self.processing = TextProcessing(
            tokenizer_digest=self._tokenizer.digest,
            prompt=prompt,
            max_length=self._length,
            pooling=str(self.tower.pool),
            normalize=False,
        )

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption up to its end token, as in training."""
        texts = [self.processing.prompt + caption for caption in captions]
        return self._tokenizer.tokenize(texts, self._length)

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return tokens (b, L) int64."""
        length = self._length if self._padded_in_full else max(len(caption.ids) for caption in tokens)
        tokens_bL = torch.full((len(tokens), length), self._tokenizer.special.pad)
        for row, caption in enumerate(tokens):
            tokens_bL[row, : len(caption.ids)] = torch.tensor(caption.ids)
        return {"tokens": tokens_bL}

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        outputs: tuple[Tensor, ...] = self.heads(self.tower(inputs["tokens"]), features, self._name)
        return outputs


class CachedTextModel(TextModel):
    """The text side of a run whose text tower is cached: the frozen encoder of the cache, and the heads on its rows."""

    def __init__(self, tower: nn.Module, heads: RunHeads, below: TextModel, feature: str, name: str) -> None:
        """Join a `CachedTower` and its heads with the model and the feature that make its rows."""
        super().__init__()
        self.tower = tower
        self.heads = heads
        self._below = below
        self._feature = feature
        self._name = name
        self.features = heads.features
        self.processing = below.processing

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption, as the frozen encoder takes them."""
        return self._below.tokenize(captions)

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return a batch of captions, as the frozen encoder takes it."""
        return self._below.collate(tokens)

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        (rows_bw,) = self._below(inputs, (self._feature,))
        outputs: tuple[Tensor, ...] = self.heads(self.tower(rows_bw), features, self._name)
        return outputs


@dataclass(frozen=True)
class CenterCrop:
    """The evaluation transform of runs: the largest central square, resized to `size` pixels by Pillow's bicubic."""

    size: int

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the (3, size, size) uint8 pixels of an RGB image."""
        pixels: npt.NDArray[np.uint8] = center_crop(image, self.size).numpy()
        return pixels


def load_run_encoder(name: EncoderName, options: EncoderOptions) -> FrozenEncoder:
    """Load a finished run, or an export in our own format, as an encoder of images and text.

    Args:
        name: Its folder. Its weights are those of the frozen encoder on whose cached rows it stands, with one side or
            both; where the sides stand on two encoders, the image side's. By default they are looked for where the
            run's config (`weights` of the tower) or the cache's manifest have them from.
        options: How it is loaded and run. Computed from float32 weights, whatever the precision of the run.

    Raises:
        ValueError: The folder holds no finished run, the frozen encoder below it cannot be loaded, or a size, prompt or
            length is not that of the run.
    """
    folder = finished_run_folder(name.name)
    full_name = f"{KIND}:{name.name}"
    trained = load_model(name.name, options.device, precision="float32")
    trained.model.requires_grad_(False)
    below = _encoders_below(trained, name, str(options.device))
    digest = state_digest(load_file(folder.weights))
    packages = ["torch", "timm", "pillow", *(trained.tokenizer.packages if trained.tokenizer else ())]
    for encoder in below.values():
        digest = hashlib.sha256(f"{digest} {encoder.weights_digest}".encode()).hexdigest()
        packages += [package for package in encoder.packages if package not in packages]
    return FrozenEncoder(
        full_name,
        name.name,
        digest,
        _image_side(trained, below.get("image"), name, options),
        _text_side(trained, below.get("text"), full_name, options),
        trained.logit_scale,
        tuple(packages),
    )


def _image_side(
    trained: TrainedModel, below: FrozenEncoder | None, name: EncoderName, options: EncoderOptions
) -> ImageEncoder:
    """Return the deployed image side; `below`: the frozen encoder whose rows it takes, if it does."""
    full_name = f"{KIND}:{name.name}"
    heads = RunHeads(trained, trained.config.deploy.image)
    tower: Any = trained.model.towers[heads.tower]
    if below is not None:
        side = below.side("image")
        model = RunImageModel(tower, heads, (side.model, trained.manifests[heads.tower].feature), full_name)
        preprocessing, transform = side.preprocessing, side.transform
    else:
        size = trained.config.data.side
        model = RunImageModel(tower, heads, None, full_name)
        mean, std = (tuple(float(x) for x in values.flatten()) for values in (tower.mean, tower.std))
        preprocessing = Preprocessing((size, size), "bicubic", 1.0, "center", mean, std, options.decode)
        transform = CenterCrop(size)
    if name.size is not None and (name.size, name.size) != preprocessing.input_size:
        height, width = preprocessing.input_size
        raise ValueError(f"{name}: expected images of the run's own size, {height}x{width}: leave out @{name.size}")
    return ImageEncoder(
        full_name,
        model,
        preprocessing,
        transform,
        torch.device(options.device),
        options.precision,
        options.runtime,
        options.compiled,
    )


def _text_side(trained: TrainedModel, below: FrozenEncoder | None, name: str, options: EncoderOptions) -> TextEncoder:
    """Return the deployed text side; `below`: the frozen encoder whose rows it takes, if it does."""
    heads = RunHeads(trained, trained.config.deploy.text)
    model: TextModel
    if below is None:
        model = RunTextModel(trained, heads, options.prompt or "", options.max_length, name)
    else:
        side = below.side("text")
        feature = trained.manifests[heads.tower].feature
        model = CachedTextModel(trained.model.towers[heads.tower], heads, side.model, feature, name)
        own = model.processing
        for flag, wanted, found in (
            ("--prompt", options.prompt, own.prompt),
            ("--max-length", options.max_length, own.max_length),
        ):
            if wanted not in (None, found):
                raise ValueError(f"{name}: {flag}: found {wanted!r}, expected that of the cached rows, {found!r}")
    return TextEncoder(name, model, torch.device(options.device), options.precision)


def _encoders_below(trained: TrainedModel, name: EncoderName, device: str) -> dict[Side, FrozenEncoder]:
    """Return the frozen encoders whose rows the deployed towers take, by side.

    Raises:
        ValueError: One of them cannot be loaded.
    """
    sides: dict[Side, str] = {"image": trained.image_tower, "text": trained.text_tower}
    cached = {side: tower for side, tower in sides.items() if tower in trained.manifests}
    manifests = {tower: trained.manifests[tower] for tower in cached.values()}
    weights = {}
    for tower, manifest in manifests.items():
        settings = trained.config.towers[tower]
        assert isinstance(settings, CacheTower)
        is_named = name.weights is not None and manifest.encoder == next(iter(manifests.values())).encoder
        weights[tower] = name.weights if is_named else settings.weights
    teachers = LiveTeachers(manifests, weights, device)
    found: dict[Side, FrozenEncoder] = {}
    for side, tower in cached.items():
        try:
            found[side] = teachers.teacher(tower)
        except ValueError as error:
            raise ValueError(
                f"{name}: its {side} side takes rows of {manifests[tower].encoder}, which is needed to make them: "
                f"{error}; name its weights as {KIND}:{name.name}:WEIGHTS, or as towers.{tower}.weights in the run's "
                "config"
            ) from error
    return found

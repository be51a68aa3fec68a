"""Finished runs and exports of ours as encoders, so that a trained model can teach the next one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    Tokens,
    require_offered,
    state_digest,
)
from threetowers.cache.encoders.live import live_teacher
from threetowers.cache.encoders.names import EncoderName, EncoderOptions
from threetowers.cache.encoders.sentencepiece_tokenizer import END, PAD, Tokenizer
from threetowers.cache.format.manifest import Preprocessing, TextProcessing
from threetowers.trainer.config import CacheTower, TextTower
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.trained_model import TrainedModel, load_model
from threetowers.trainer.model.model import clamp_log_scale
from threetowers.trainer.run_folder import RunFolder

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
            tower: A `TimmTower`, or a `CachedTower` on the features of `below`.
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
            tower_bw = self.tower.model(x_b3HW)  # the pixels are normalised by now
        outputs: tuple[Tensor, ...] = self.heads(tower_bw, features, self._name)
        return outputs


class RunTextModel(TextModel):
    """The text side of a run: its text tower, with its own tokenizer."""

    def __init__(self, trained: TrainedModel, heads: RunHeads, prompt: str, max_length: int | None, name: str) -> None:
        """Join the text tower and its heads. Raises ValueError for a length that is not that of the run."""
        super().__init__()
        self.tower = trained.model.towers[heads.tower]
        self.heads = heads
        self._name = name
        assert trained.tokenizer is not None
        self._tokenizer: Tokenizer = trained.tokenizer
        self._length = trained.config.data.context_length
        config = trained.config.towers[heads.tower]
        assert isinstance(config, TextTower)
        # Padding that no token sees, and that is not pooled, need not be there.
        self._padded_in_full = config.pool == "last" or not (config.mask_padding or config.causal)
        if max_length not in (None, self._length):
            raise ValueError(f"{name}: --max-length: found {max_length}, expected that of the run, {self._length}")
        self.features = heads.features
        self.processing = TextProcessing(
            tokenizer_digest=hashlib.sha256(self._tokenizer.model).hexdigest(),
            prompt=prompt,
            max_length=self._length,
            pooling=config.pool,
            normalize=False,
        )

    def tokenize(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each caption up to its end token, as in training."""
        texts = [self.processing.prompt + caption for caption in captions]
        room = self._length - 1
        return [Tokens([*pieces[:room], END], len(pieces) > room) for pieces in self._tokenizer.pieces(texts)]

    def collate(self, tokens: Sequence[Tokens]) -> Mapping[str, Tensor]:
        """Return tokens (b, L) int64."""
        length = self._length if self._padded_in_full else max(len(caption.ids) for caption in tokens)
        tokens_bL = torch.full((len(tokens), length), PAD)
        for row, caption in enumerate(tokens):
            tokens_bL[row, : len(caption.ids)] = torch.tensor(caption.ids)
        return {"tokens": tokens_bL}

    def forward(self, inputs: Mapping[str, Tensor], features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        outputs: tuple[Tensor, ...] = self.heads(self.tower(inputs["tokens"]), features, self._name)
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
        name: Its folder. Its weights are those of the frozen encoder on whose cached rows a LiT run stands; by default
            they are looked for where the run's config (`weights` of the tower) or the cache's manifest have them from.
        options: How it is loaded and run. Computed from float32 weights, whatever the precision of the run.

    Raises:
        ValueError: The folder holds no finished run, the frozen encoder below a LiT run cannot be loaded, or a size or
            length is not that of the run.
    """
    folder = RunFolder(Path(name.name))
    full_name = f"{KIND}:{name.name}"
    trained = load_model(folder.path, options.device, precision="float32")
    trained.model.requires_grad_(False)
    device = torch.device(options.device)
    digest = state_digest(load_file(folder.weights))
    packages = ["torch", "timm", "pillow", "sentencepiece"]

    image_heads = RunHeads(trained, trained.config.deploy.image)
    tower = trained.model.towers[image_heads.tower]
    if trained.sees_cached_rows:
        below = _encoder_below(trained, image_heads.tower, name, device)
        side = below.side("image")
        feature = trained.manifests[image_heads.tower].feature
        image_model = RunImageModel(tower, image_heads, (side.model, feature), full_name)
        preprocessing, transform = side.preprocessing, side.transform
        digest = hashlib.sha256(f"{digest} {below.weights_digest}".encode()).hexdigest()
        packages += [package for package in below.packages if package not in packages]
    else:
        image_model = RunImageModel(tower, image_heads, None, full_name)
        preprocessing = _preprocessing(tower, trained.config.data.side, options)
        transform = CenterCrop(trained.config.data.side)
    if name.size is not None and (name.size, name.size) != preprocessing.input_size:
        height, width = preprocessing.input_size
        raise ValueError(f"{name}: expected images of the run's own size, {height}x{width}: leave out @{name.size}")
    image = ImageEncoder(
        full_name,
        image_model,
        preprocessing,
        transform,
        device,
        options.precision,
        options.runtime,
        options.compiled,
    )
    text_heads = RunHeads(trained, trained.config.deploy.text)
    text_model = RunTextModel(trained, text_heads, options.prompt or "", options.max_length, full_name)
    text = TextEncoder(full_name, text_model, device, options.precision)
    return FrozenEncoder(full_name, name.name, digest, image, text, _logit_scale(trained), tuple(packages))


def _preprocessing(tower: Any, size: int, options: EncoderOptions) -> Preprocessing:
    mean, std = (tuple(float(x) for x in values.flatten()) for values in (tower.mean, tower.std))
    return Preprocessing((size, size), "bicubic", 1.0, "center", mean, std, options.decode)


def _encoder_below(trained: TrainedModel, tower: str, name: EncoderName, device: torch.device) -> FrozenEncoder:
    """Return the frozen encoder whose rows a cached tower takes. Raises ValueError where it cannot be loaded."""
    config = trained.config.towers[tower]
    assert isinstance(config, CacheTower)
    manifest = trained.manifests[tower]
    try:
        return live_teacher(manifest, name.weights or config.weights, str(device))
    except ValueError as error:
        raise ValueError(
            f"{name}: the images of this run are rows of {manifest.encoder}, which is needed to see others: {error}; "
            f"name its weights as {KIND}:{name.name}:WEIGHTS"
        ) from error


def _logit_scale(trained: TrainedModel) -> float | None:
    """Return the inverse temperature of the deployed heads; None if no contrastive term trained them together."""
    config = trained.config
    deployed = {config.deploy.image, config.deploy.text}
    for term in config.terms.values():
        if {term.x, term.y} == deployed and term.kind == "contrastive":
            log_scale = trained.model.log_scales[term.scale].detach().float()
            return float(clamp_log_scale(log_scale, config.loss.scale_max).exp())
    return None

"""A trained model, loaded for inference: from a finished run or an export of one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.cache.format.manifest import Manifest
from threetowers.trainer.config import CacheTower, ImageTower, Precision, Term, TextTower, TrainConfig, load_config
from threetowers.trainer.model.model import TowerModel, clamp_log_scale
from threetowers.trainer.model.state_dict import load_deduplicated
from threetowers.trainer.run.finished_run import finished_run_folder


def load_model(
    path: str | Path, device: torch.device | str = "cpu", precision: Precision | Literal["float16"] | None = None
) -> "TrainedModel":
    """Load the model of a finished run, or of an export in our own format.

    Args:
        path: Folder of the run or export, or its URL.
        device: Where the model computes.
        precision: In which it computes; None: that in which it was trained.

    Returns:
        The model in evaluation mode. `encode_images` and `encode_texts` return unit-norm embeddings in float32, so that
        `images @ texts.T` are cosines.

    Raises:
        ValueError: The folder holds no finished run.

    Examples:
        The example of `threetowers.trainer.train.train` loads the run that it trained.

        >>> load_model("runs/no-such-run")
        Traceback (most recent call last):
        ValueError: runs/no-such-run holds no finished run: config.yaml is missing; finish it with `threetowers train`
    """
    folder = finished_run_folder(path)
    for needed in (folder.config, folder.weights, folder.manifests):
        if not needed.exists():
            raise ValueError(
                f"{folder} holds no finished run: {needed.name} is missing; finish it with `threetowers train`"
            )
    config = load_config(folder.config)
    tokenizer = folder.load_tokenizer() if config.data.tokenizer else None
    manifests = folder.read_manifests()
    model = _model(config, tokenizer, manifests)
    load_deduplicated(model, load_file(folder.weights))
    model.set_precision(precision or model.precision)
    return TrainedModel(config, model.to(device).eval(), tokenizer, manifests)


@dataclass(frozen=True)
class TrainedModel:
    """Embeds images and texts with the deployed heads of a run; `load_model` returns one."""

    config: TrainConfig
    model: TowerModel
    tokenizer: Tokenizer | None  # None in a run without a text tower of its own
    manifests: dict[str, Manifest]  # of the caches that the run was trained with, by tower

    @property
    def image_tower(self) -> str:
        """The tower that the deployed image head stands on; a cached one in a LiT run."""
        return self.config.root_of(self.config.deploy.image)

    @property
    def text_tower(self) -> str:
        """The tower that the deployed text head stands on; a cached one where the text side is frozen."""
        return self.config.root_of(self.config.deploy.text)

    @property
    def sees_cached_rows(self) -> bool:
        """Whether the image side takes rows of a cache (LiT) instead of images."""
        return self.config.towers[self.image_tower].reads == "rows"

    @property
    def reads_cached_text(self) -> bool:
        """Whether the text side takes rows of a cache of text instead of tokens."""
        return self.config.towers[self.text_tower].reads == "rows"

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return next(self.model.parameters()).device

    @property
    def logit_scale(self) -> float | None:
        """The inverse temperature of the deployed heads; None if no term with a scale trained them together."""
        config = self.config
        deployed = {config.deploy.image, config.deploy.text}
        for term in config.terms.values():
            if {term.x, term.y} == deployed and term.has_scale:
                log_scale = self.model.log_scales[term.scale].detach().float()
                return float(clamp_log_scale(log_scale, config.loss.scale_max).exp())
        return None

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return unit-norm embeddings (b, D), float32.

        Args:
            images: Images (b, 3, S, S) uint8, with S = `config.data.image_size`; in a LiT run cached rows (b, width).
        """
        return self.model.encode_image({self.image_tower: images.to(self.device)})

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Return unit-norm embeddings (len(captions), D), float32.

        Raises:
            ValueError: The text side takes rows of a cache: `encode_tokens` takes them, and the encoder `run:FOLDER`
                embeds words by the encoder that the cache is of.
        """
        return self.encode_tokens(self.tokens(captions))

    @torch.inference_mode()
    def encode_tokens(self, tokens_bL: Tensor) -> Tensor:
        """Return unit-norm embeddings (b, D), float32, of tokens (b, L) int64 as the tokenizer returns them.

        Where the text side is cached they are of rows (b, width).
        """
        return self.model.encode_text({self.text_tower: tokens_bL.to(self.device)})

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Return the tokens (b, L) int64 of captions. Raises ValueError where the text side takes cached rows."""
        if self.tokenizer is None or self.reads_cached_text:
            encoder = self.manifests[self.text_tower].encoder
            raise ValueError(
                f"the text side takes rows of {encoder}, found words: embed them by the encoder run:FOLDER, or give "
                "rows of a cache"
            )
        return self.tokenizer.encode(captions, self.config.data.context_length)


def _model(config: TrainConfig, tokenizer: Tokenizer | None, manifests: Mapping[str, Manifest]) -> TowerModel:
    """Return the model of a run with random weights."""
    widths = {name: manifest.dim for name, manifest in manifests.items()}
    if tokenizer is None:
        return TowerModel(config, None, widths)
    return TowerModel(config, tokenizer.embedding_rows(config.data.vocab_size), widths, tokenizer.special.end)


def deployed_model(trained: TrainedModel) -> TrainedModel:
    """Return a model of the deployed heads and their towers alone, with the same weights and embeddings.

    Its one term is that between the deployed heads, which holds their scale and bias.
    """
    config = _deployed_config(trained.config)
    manifests = {name: manifest for name, manifest in trained.manifests.items() if name in config.towers}
    tokenizer = trained.tokenizer if config.data.tokenizer else None
    model = _model(config, tokenizer, manifests)
    state = trained.model.state_dict()
    load_deduplicated(model, {name: state[name] for name in model.state_dict()})
    model.set_precision(trained.model.precision)
    return TrainedModel(config, model.to(trained.device).eval(), tokenizer, manifests)


def _deployed_config(config: TrainConfig) -> TrainConfig:
    image, text = config.deploy.image, config.deploy.text

    # The heads on the way down from the deployed ones, and the towers at the bottom.
    heads, roots = set[str](), set[str]()
    for name in (image, text):
        while name in config.heads:
            heads.add(name)
            name = config.heads[name].of
        roots.add(name)

    towers = {}
    for name, tower in config.towers.items():
        if name not in roots:
            continue
        if not isinstance(tower, CacheTower):
            # The weights are in the folder, and nothing is trained.
            tower = replace(tower, init=None, frozen=False, trainable_blocks=None, layer_decay=1.0)
        if isinstance(tower, ImageTower | TextTower):
            tower = replace(tower, inherit=None)
        if isinstance(tower, TextTower) and tower.share is not None and tower.share.tower not in roots:
            tower = replace(tower, share=None)
        towers[name] = tower

    between = [term for term in config.terms.values() if {term.x, term.y} == {image, text}]
    scaled = [term for term in between if term.has_scale]
    if scaled:  # its teachers stay behind
        term = Term(scaled[0].x, scaled[0].y, weight=scaled[0].weight, scale=scaled[0].scale)
    elif between:
        term = between[0]
    elif config.scales():  # without an image-text term the heads were aligned through a third one
        term = Term(image, text, scale=config.scales()[0])
    else:
        term = Term(image, text, kind="l2")
    has_words = any(tower.reads == "tokens" for tower in towers.values())
    return replace(
        config,
        init=None,
        data=config.data if has_words else replace(config.data, tokenizer=None),
        towers=towers,
        heads={name: head for name, head in config.heads.items() if name in heads},
        terms={"image-text": term},
    )

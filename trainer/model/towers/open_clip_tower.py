"""The towers of open_clip's models, each by itself and with the model's own projection.

Below `model.`, tensors have open_clip's names: those of `visual` in an image tower, those of `text` in a text tower,
also of CLIP itself, whose text tower open_clip keeps at the top.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from threetowers.cache.encoders.openclip.model_config import (
    OpenClipConfig,
    default_preprocessing,
    is_in_package,
    is_whole,
    read_open_clip_config,
    require_open_clip,
)
from threetowers.cache.encoders.weights_file import one_line
from threetowers.trainer.config import OpenClipTower, TrainConfig
from threetowers.trainer.model.layers import WITH_PREVIOUS, Layers, number_layers
from threetowers.trainer.model.towers.feature_width import feature_width
from threetowers.trainer.model.towers.pointwise import subsample_before_pointwise

# What a run's own keys, or its `init`, decide.
OWNED = {
    "vision_cfg": {
        "image_size": "data.image_size is the size of images",
        "timm_model_pretrained": "the tower's `init` names its weights",
        "output_tokens": "a tower gives one vector an image",
    },
    "text_cfg": {
        "context_length": "data.context_length is the length of captions",
        "vocab_size": "data.vocab_size is the number of rows of the token embedding",
        "hf_model_pretrained": "the tower's `init` names its weights",
        "output_tokens": "a tower gives one vector a caption",
    },
}
# Modules that are numbered as layers, by the names that they have in open_clip.
TRANSFORMER = [(r"transformer\.resblocks\.(\d+)", None), (r"ln_post|ln_final", WITH_PREVIOUS)]
IMAGE_LAYERS = {"stem": r"conv\d|bn\d|class_embedding|positional_embedding|ln_pre"}
TEXT_LAYERS = {"stem": r"token_embedding|positional_embedding|cls_emb|transformer\.embeddings"}
RESNET_BLOCKS = [(r"layer(\d+)\.(\d+)", None)]
TRANSFORMERS_BLOCKS = [(r"transformer\.(?:encoder\.)?layer\.(\d+)", None)]
# The side of a model that is not wanted, as small as open_clip builds it.
NO_IMAGES: dict[str, Any] = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 1, "image_size": 1}
NO_TEXT: dict[str, Any] = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 1, "context_length": 1}


class OpenClipImageTower(nn.Module):
    """Images (b, 3, H, W) uint8 -> features (b, width), the model's embeddings before they are normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: OpenClipTower, image_size: int) -> None:
        """Build the tower with random weights.

        Raises:
            ValueError: open_clip cannot build it, or it takes no images of this size.
        """
        super().__init__()
        self.image_size = image_size
        found = _checked_config(config)
        vision = found.vision | {"timm_model_pretrained": False, "output_tokens": False}
        own_size = vision.get("image_size", image_size)
        if "timm_model_name" not in vision:  # timm's are built for their own size, as open_clip does it
            vision["image_size"] = image_size
        self.model: Any = _build(config, found, vision_cfg=vision, text_cfg=NO_TEXT).visual
        if "timm_model_name" in vision and own_size != image_size:
            self.set_input_size(image_size)
        preprocessing = default_preprocessing(config.model, found)
        for name in ("mean", "std"):
            # Kept with the weights, which say in open_clip how their images are normalised.
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(1, 3, 1, 1))
        subsample_before_pointwise(self.model)
        self._scalars = give_scalars_a_dimension(self.model)
        self._matrix = _first_matrix(self.model)
        self.width = feature_width(self.model, config.model, config.args, image_size, remedy="choose another model")

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The transformer blocks; None in a model without plain ones."""
        if hasattr(self.model, "trunk"):
            blocks = getattr(self.model.trunk, "blocks", None)
            return blocks if blocks and isinstance(blocks[0], Block) else None
        return self.model.transformer.resblocks if hasattr(self.model, "transformer") else None

    def layers(self) -> Layers:
        """Return the tower's layers, with its projection behind them. Raises ValueError for a model without blocks."""
        trunk = getattr(self.model, "trunk", None)
        if trunk is not None:
            return number_layers(self, trunk.group_matcher(coarse=False), "model.trunk.")
        blocks = TRANSFORMER if self.blocks is not None else RESNET_BLOCKS
        return number_layers(self, IMAGE_LAYERS | {"blocks": blocks}, "model.")

    def set_input_size(self, image_size: int) -> None:
        """Make a timm model take images of another size, its positions resampled. Raises ValueError if it cannot."""
        self.image_size = image_size
        try:
            self.model.set_input_size(image_size)
        except Exception as error:  # each family of models raises its own kinds
            raise ValueError(
                f"the image tower takes no {image_size}-pixel images ({one_line(error)}); change data.image_size"
            ) from error

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward. Raises ValueError for a model that cannot."""
        timm_model = getattr(self.model, "trunk", None)
        try:
            if timm_model is not None:
                timm_model.set_grad_checkpointing(enable)
                return
            if self.blocks is None:
                raise AttributeError("its residual network keeps all activations")
            self.model.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"engine.activation_checkpointing: this image tower of open_clip has none ({error}); set it to false, "
                "or choose another model"
            ) from error

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors of open_clip's `visual`, in its shapes."""
        return _own_state(self.model, self._scalars)

    def forward_normalized(self, x_b3HW: Tensor) -> Tensor:
        """Return features (b, width) of images less `mean`, divided by `std`."""
        features_bw: Tensor = self.model(x_b3HW)
        return features_bw

    def forward(self, images_b3HW: Tensor) -> Tensor:
        """Return features (b, width), of the weights' type or, under autocast, of the last layer's."""
        dtype = self.model.get_parameter(self._matrix).dtype
        x_b3HW = (images_b3HW.to(torch.float32) / 255 - self.mean) / self.std
        return self.forward_normalized(x_b3HW.to(dtype).contiguous(memory_format=torch.channels_last))


class OpenClipTextTower(nn.Module):
    """Tokens (b, L) int64 -> features (b, width), the model's embeddings before they are normalised."""

    def __init__(
        self, config: OpenClipTower, vocab_size: int, context_length: int, embedding_rows: int | None = None
    ) -> None:
        """Build the tower with random weights.

        Args:
            config: The tower.
            vocab_size: Number of ids of the tokenizer, at least.
            context_length: Tokens that a caption has at most.
            embedding_rows: Rows of the token embedding; None: those of the model's config.

        Raises:
            ValueError: open_clip cannot build it, or it has too few rows or positions.
        """
        super().__init__()
        found = _checked_config(config)
        text = found.text | {
            "hf_model_pretrained": False,
            "output_tokens": False,
            "context_length": context_length,
            "vocab_size": embedding_rows or found.text.get("vocab_size", vocab_size),
        }
        self.model: Any = _build(config, found, vision_cfg=NO_IMAGES, text_cfg=text).text
        self.pool = found.pooling
        if self.model.vocab_size < vocab_size:
            raise ValueError(
                f"text tower: the token embedding of {config.model!r} has {self.model.vocab_size:,} rows, but "
                f"data.tokenizer has {vocab_size:,} ids; name the tokenizer of the model, as open_clip:NAME, or set "
                f"data.vocab_size: {vocab_size} for random weights"
            )
        if self.model.context_length < context_length:
            raise ValueError(
                f"text tower: {config.model!r} has {self.model.context_length} positions, found data.context_length: "
                f"{context_length}; lower it"
            )
        self._scalars = give_scalars_a_dimension(self.model)
        if getattr(self.model, "attn_mask", None) is not None:
            self.model.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
        self.width = self._feature_width()

    @property
    def blocks(self) -> nn.ModuleList | None:
        """The transformer blocks; None in a model of transformers."""
        found: nn.ModuleList | None = getattr(self.model.transformer, "resblocks", None)
        return found

    def layers(self) -> Layers:
        """Return the tower's layers, with its projection behind them. Raises ValueError for a model without blocks."""
        blocks = TRANSFORMER if self.blocks is not None else TRANSFORMERS_BLOCKS
        return number_layers(self, TEXT_LAYERS | {"blocks": blocks}, "model.")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for backward, and recompute the rest."""
        if self.blocks is not None:
            self.model.set_grad_checkpointing(enable)
        elif enable:
            self.model.transformer.activation_checkpointing_enable()
        else:
            self.model.transformer.activation_checkpointing_disable()

    def own_state(self) -> dict[str, Tensor]:
        """Return the tensors of open_clip's `text`, in its shapes."""
        return _own_state(self.model, self._scalars)

    def _feature_width(self) -> int:
        if self.blocks is not None and self.model.text_projection is None:
            return int(self.model.width)
        return int(self.model.output_dim)

    def forward(self, tokens_bL: Tensor) -> Tensor:
        """Return features (b, width)."""
        features_bw: Tensor = self.model(tokens_bL)
        return features_bw


def give_scalars_a_dimension(module: nn.Module) -> list[str]:
    """Make (1,) of each parameter without dimensions, which DeepSpeed cannot hold; products with it stay the same.

    Returns:
        Their names.
    """
    scalars = [name for name, p in module.named_parameters() if p.ndim == 0]
    for name in scalars:
        path, _, leaf = name.rpartition(".")
        p = module.get_parameter(name)
        module.get_submodule(path).register_parameter(leaf, nn.Parameter(p.detach().reshape(1), p.requires_grad))
    return scalars


def _own_state(model: nn.Module, scalars: Collection[str]) -> dict[str, Tensor]:
    return {name: p.reshape(()) if name in scalars else p for name, p in model.state_dict().items()}


def _checked_config(config: OpenClipTower) -> OpenClipConfig:
    """Return the config of a tower's model. Raises ValueError where `args` name what other keys decide."""
    require_open_clip(config.model)
    for section, keys in OWNED.items():
        given = {} if is_whole(config.args) else config.args.get(section, {})
        for key, reason in keys.items():
            if isinstance(given, dict) and key in given:
                raise ValueError(f"args: found {section}: {{{key}: {given[key]!r}}}, but {reason}; leave it out")
    return read_open_clip_config(config.model, config.args)


def resolve_open_clip_towers(config: TrainConfig) -> TrainConfig:
    """Return a config whose towers of open_clip are built without the files of a model: their `args` are its config.

    Raises:
        ValueError: The files cannot be read.
    """
    towers = dict(config.towers)
    for name, tower in towers.items():
        if isinstance(tower, OpenClipTower) and not is_in_package(tower.model):
            try:
                towers[name] = replace(tower, args=_checked_config(tower).model)
            except ValueError as error:
                raise ValueError(f"towers.{name}: {error}") from error
    return replace(config, towers=towers)


def _build(config: OpenClipTower, found: OpenClipConfig, **sections: dict[str, Any]) -> Any:
    """Return a model of open_clip with random weights, of which one side is wanted."""
    import open_clip

    try:
        return open_clip.CustomTextCLIP(
            embed_dim=found.model["embed_dim"], quick_gelu=bool(found.model.get("quick_gelu")), **sections
        )
    except Exception as error:  # open_clip, timm and transformers each raise their own kinds
        given = f" with {config.args}" if config.args else ""
        raise ValueError(
            f"open_clip cannot create the {config.of} tower of {config.model!r}{given}: {one_line(error)}; change the "
            "tower's model or args"
        ) from error


def _first_matrix(module: nn.Module) -> str:
    """Return the name of a parameter whose type is that of the products: norms may stay float32."""
    return next(name for name, p in module.named_parameters() if p.ndim > 1)


def _cut_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cut a causal mask of all positions to those of the batch, whose captions may all be shorter."""
    mask, length = kwargs.get("attn_mask"), args[0].shape[1]
    if mask is not None and mask.ndim == 2:
        kwargs = kwargs | {"attn_mask": mask[:length, :length]}
    return args, kwargs

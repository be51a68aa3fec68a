"""Image models of transformers: the states of their patches, pooled."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import LAYER, ImageModel, require_offered
from threetowers.cache.encoders.huggingface.outputs import TowerHook, TowerOutput, joint_embedding, own_pooler
from threetowers.cache.encoders.image_features import TOKEN_FEATURES, ImageLayout, LayerOutputs, token_feature

CLASS_TOKENS = ("cls_token", "class_embedding")  # names of their parameters


class HfImageModel(ImageModel):
    """An image model of transformers, or the image side of an image-text model.

    - `pooled`: what the model's own classifier would see: its own vector, or the class token where that vector is a
      dense layer for another task, as ViT's, or the mean of the patches where there is neither.
    - `projected`: the joint space of an image-text model.
    - `cls`: the class token, where it has one.
    - `mean_patch`: the mean of the tokens of patches, where it has tokens.
    - `cls+mean_patch`: both, concatenated in this order.
    - `layer:NAME`: the output of a module as one vector (`mean_over_image`).

    Tokens are those after the last norm.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int], name: str) -> None:
        """Find out what a model offers, by a forward pass.

        Args:
            model: In evaluation mode, on its device.
            input_size: (height, width) of its input in pixels.
            name: Of the encoder, for messages.
        """
        super().__init__()
        self.model: Any = model
        self._name = name
        self._call: Any = getattr(model, "get_image_features", model)
        self._tower: Any = getattr(model, "vision_model", model)
        self._hook = TowerHook(self._tower, name)
        config = getattr(self.model.config, "vision_config", None) or self.model.config
        self._arguments = _size_arguments(self._call, config, input_size)
        blank_13HW = torch.zeros(1, 3, *input_size, device=next(model.parameters()).device)
        self._norm: Any = None
        self._norm = self._skipped_norm(blank_13HW)
        output, projected_1D = self._outputs(blank_13HW)
        self.layout = _layout(output.states, config, input_size)
        has_class = self.layout.prefix > 0 and any(
            parameter.rpartition(".")[2] in CLASS_TOKENS for parameter, _ in self._tower.named_parameters()
        )
        tokens: tuple[str, ...] = ()
        if output.states.ndim == 3:
            tokens = TOKEN_FEATURES if has_class else ("mean_patch",)
        self._has_class = has_class
        self.features = ("pooled", *(["projected"] if projected_1D is not None else []), *tokens)
        self._layers = LayerOutputs(model, self.layout, name)

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            if not feature.startswith(LAYER):
                reason = "the model has no joint space of images and text" if feature == "projected" else ""
                require_offered(feature, (*self.features, f"{LAYER}NAME"), self._name, reason)
        self._layers.begin(features)
        output, projected_bD = self._outputs(x_b3HW)
        found = {"projected": projected_bD} if projected_bD is not None else {}
        return tuple(found[one] if one in found else self._other(one, output) for one in features)

    def _other(self, feature: str, output: TowerOutput) -> Tensor:
        """Return a feature other than `projected`."""
        if feature.startswith(LAYER):
            return self._layers.vector(feature)
        if feature != "pooled":
            return token_feature(feature, output.states, self.layout.prefix)
        if output.pooler is not None and own_pooler(self._tower):
            return output.pooler.flatten(1)
        if output.states.ndim == 4:
            return output.states.mean((2, 3))
        return token_feature("cls" if self._has_class else "mean_patch", output.states, self.layout.prefix)

    def _outputs(self, x_b3HW: Tensor) -> tuple[TowerOutput, Tensor | None]:
        """Return states after the last norm and the model's own vector, and the joint-space embedding (b, D)."""
        result = self._call(pixel_values=x_b3HW, **self._arguments)
        output = self._hook.take()
        if self._norm is not None:
            output = output._replace(states=self._norm(output.states))
        return output, joint_embedding(result, self._call is not self.model, "image_embeds")

    def _skipped_norm(self, x_13HW: Tensor) -> Any:
        """Return the last norm of a model that applies it to its own vector alone, as CLIP's does; else None."""
        norm = getattr(self._tower, "post_layernorm", None)
        if norm is None:
            return None
        inputs = []
        handle = norm.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
        try:
            self._outputs(x_13HW)
        finally:
            handle.remove()
        return norm if all(x.ndim == 2 for x in inputs) else None


def _size_arguments(call: Any, config: Any, input_size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments by which a model takes images of a size that is not its own."""
    native = getattr(config, "image_size", None)
    takes = inspect.signature(getattr(call, "forward", call)).parameters
    own = native in (None, input_size[0], input_size, list(input_size))
    return {} if own or "interpolate_pos_encoding" not in takes else {"interpolate_pos_encoding": True}


def _layout(states: Tensor, config: Any, input_size: tuple[int, int]) -> ImageLayout:
    """Return where the parts of an image are in the outputs of a model.

    Before the patches stand a class token and perhaps registers or a token of distillation. A hierarchical model has
    fewer places in the end than patches, and no such token.
    """
    patch = getattr(config, "patch_size", None)
    if states.ndim != 3 or patch is None:
        return ImageLayout(input_size)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    prefix = states.shape[1] - (input_size[0] // height) * (input_size[1] // width)
    return ImageLayout(input_size, prefix, states.shape[1]) if prefix >= 0 else ImageLayout(input_size)

"""Image models of transformers: the states of their patches, pooled."""

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import LAYER, ImageModel, require_offered
from threetowers.cache.encoders.huggingface.outputs import captured_output, joint_embedding, own_pooler


class ImageOutputs(NamedTuple):
    """What an image model gives for a batch: vectors (b, D) and token states (b, L, D), None where it has none."""

    pooler_bD: Tensor | None
    projected_bD: Tensor | None
    class_bD: Tensor | None
    patches_bLD: Tensor


class HfImageModel(ImageModel):
    """An image model of transformers, or the image side of an image-text model.

    Its features are

    - `pooled`: what the model's own classifier would see: its own vector, or the class token where that vector is a
      dense layer for another task, as ViT's, or the mean of the patches where there is neither;
    - `projected`: the joint space of an image-text model;
    - `cls`, `mean_patch`, `cls+mean_patch`: the class token, the mean of the patches, and both side by side, after the
      last norm;
    - `layer:NAME`: the output of a module, by its name in the model, averaged over its tokens or places.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], name: str) -> None:
        """Find out what the model offers, by a forward pass.

        Args:
            model: In evaluation mode, on its device.
            size: Of its input (height, width) in pixels.
            name: Of the encoder, for messages.

        Raises:
            ValueError: It takes no such images.
        """
        super().__init__()
        self.model: Any = model
        self._name = name
        self._call: Any = getattr(model, "get_image_features", model)
        self._tower: Any = getattr(model, "vision_model", model)
        config = getattr(self.model.config, "vision_config", None) or self.model.config
        self._patches = _patch_count(config, size)
        self._arguments: dict[str, Any] = {}
        native = getattr(config, "image_size", None)
        takes = inspect.signature(getattr(self._call, "forward", self._call)).parameters
        if native not in (None, size[0], size, list(size)) and "interpolate_pos_encoding" in takes:
            self._arguments["interpolate_pos_encoding"] = True
        self._norm: Any = None
        self._norm = self._skipped_norm(size)
        found = self._outputs(self._blank(size))
        self.features = (
            "pooled",
            *(["projected"] if found.projected_bD is not None else []),
            *(["cls"] if found.class_bD is not None else []),
            "mean_patch",
            *(["cls+mean_patch"] if found.class_bD is not None else []),
        )

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        layers = [feature for feature in features if feature.startswith(LAYER)]
        for feature in features:
            if feature not in layers:
                require_offered(feature, (*self.features, f"{LAYER}NAME"), self._name)
        with contextlib.ExitStack() as stack:
            kept = {layer: stack.enter_context(captured_output(self._module(layer))) for layer in layers}
            outputs = self._outputs(x_b3HW)
        return tuple(
            _pool_places(kept[feature].states, self._name, feature) if feature in kept else _pool(outputs, feature)
            for feature in features
        )

    def _module(self, layer: str) -> nn.Module:
        name = layer.removeprefix(LAYER)
        modules: dict[str, nn.Module] = dict(self.model.named_modules())
        if name not in modules or not name:
            some = ", ".join(list(modules)[1:6])
            raise ValueError(f"{self._name}: {layer}: no such module; the first of its {len(modules) - 1} are {some}")
        return modules[name]

    def _outputs(self, x_b3HW: Tensor) -> ImageOutputs:
        with captured_output(self._tower) as output:
            projected_bD = joint_embedding(
                self._call(pixel_values=x_b3HW, **self._arguments), self._call is not self.model, "image_embeds"
            )
        states = output.states
        if states.ndim == 4:  # a feature map
            states = states.flatten(2).transpose(1, 2)
        states_bLD = states if self._norm is None else self._norm(states)
        # Before the patches stand a class token and perhaps registers or a token of distillation. A hierarchical model
        # has fewer places than patches, and no such token.
        before = max(0, states_bLD.shape[1] - self._patches) if self._patches else 0
        pooler_bD = output.pooler
        if pooler_bD is not None:
            pooler_bD = pooler_bD.flatten(1) if own_pooler(self._tower) else None
        class_bD = states_bLD[:, 0] if before else None
        return ImageOutputs(pooler_bD, projected_bD, class_bD, states_bLD[:, before:])

    def _skipped_norm(self, size: tuple[int, int]) -> Any:
        """Return the last norm of a model that applies it to its own vector alone, as CLIP's does; else None."""
        norm = getattr(self._tower, "post_layernorm", None)
        if norm is None:
            return None
        inputs = []
        handle = norm.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
        try:
            self._outputs(self._blank(size))
        finally:
            handle.remove()
        return norm if all(x.ndim == 2 for x in inputs) else None

    def _blank(self, size: tuple[int, int]) -> Tensor:
        return torch.zeros(1, 3, *size, device=next(self.model.parameters()).device)


def _patch_count(config: Any, size: tuple[int, int]) -> int | None:
    """Return the number of patches of an image; None for a model without patches of one size."""
    patch = getattr(config, "patch_size", None)
    if patch is None:
        return None
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return (size[0] // height) * (size[1] // width)


def _pool(outputs: ImageOutputs, feature: str) -> Tensor:
    class_bD, mean_bD = outputs.class_bD, outputs.patches_bLD.mean(1)
    if feature == "projected":
        assert outputs.projected_bD is not None
        return outputs.projected_bD
    if feature == "pooled":
        return next(x_bD for x_bD in (outputs.pooler_bD, class_bD, mean_bD) if x_bD is not None)
    if feature == "mean_patch":
        return mean_bD
    assert class_bD is not None
    return class_bD if feature == "cls" else torch.cat([class_bD, mean_bD], dim=1)


def _pool_places(x: Any, name: str, feature: str) -> Tensor:
    """Return the output of a module as (b, D): averaged over tokens (b, L, D), or over places (b, D, h, w)."""
    if isinstance(x, Tensor) and x.ndim in (2, 3, 4):
        return x if x.ndim == 2 else x.mean(1) if x.ndim == 3 else x.mean((2, 3))
    found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    raise ValueError(f"{name}: {feature}: expected an output (b, D), (b, L, D) or (b, D, h, w), found {found}")

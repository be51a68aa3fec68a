"""Tokens, maps and outputs of named modules as one vector an image: the features of image models but the pooled."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.encoder import LAYER

TOKEN_FEATURES = ("cls", "mean_patch", "cls+mean_patch")


@dataclass(frozen=True)
class ImageLayout:
    """Where the parts of an image are among the outputs of the modules of a model.

    Attributes:
        input_size: (height, width) of the image in pixels.
        prefix: Tokens before those of the patches: class, distillation and register tokens.
        tokens: Tokens of an image, prefix included; None for a model of maps, or one that merges tokens on its way.
        channels_last: Whether maps are (b, H, W, C) where their shape leaves it open.
    """

    input_size: tuple[int, int]
    prefix: int = 0
    tokens: int | None = None
    channels_last: bool = False


class LayerOutputs:
    """Keeps what modules give during a forward pass.

    Hooks stay once they are there, so that torch.compile finds the same model in each pass.
    """

    def __init__(self, model: nn.Module, layout: ImageLayout, name: str) -> None:
        """Keep the outputs of modules of `model`.

        Args:
            model: Whose modules are named as in its state dict, as `blocks.10`.
            layout: Of its outputs.
            name: Of the model, for messages.
        """
        self._model = model
        self._layout = layout
        self._name = name
        self._wanted: frozenset[str] = frozenset()
        self._hooked: set[str] = set()
        self._found: dict[str, Tensor] = {}

    def begin(self, features: Iterable[str]) -> bool:
        """Begin a forward pass that some features are wanted of; return whether there are layers among them.

        Raises:
            ValueError: The model has no module of a name.
        """
        self._wanted = frozenset(feature.removeprefix(LAYER) for feature in features if feature.startswith(LAYER))
        self._found = {}
        for layer in self._wanted - self._hooked:
            self._hook(layer)
        return bool(self._wanted)

    def vector(self, feature: str) -> Tensor:
        """Return what a layer gave in this pass: (b, D), as `mean_over_image` makes it.

        Raises:
            ValueError: The module did not run.
        """
        layer = feature.removeprefix(LAYER)
        if layer not in self._found:
            raise ValueError(
                f"{self._name}: {feature}: expected a module that runs once for an image, found one that does not run"
            )
        return self._found[layer]

    def _hook(self, layer: str) -> None:
        try:
            module = self._model.get_submodule(layer)
        except AttributeError:
            module = self._model
        if module is self._model:
            known = [name for name, _ in self._model.named_modules() if name.startswith(layer.partition(".")[0])]
            known = known[1:] or [name for name, _ in self._model.named_children()]
            raise ValueError(
                f"{self._name}: {LAYER}{layer}: expected the name of a module, as one of {', '.join(known[:8])}"
                f"{', ...' if len(known) > 8 else ''}"
            )
        module.register_forward_hook(self._keep(layer))
        self._hooked.add(layer)

    def _keep(self, layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if layer not in self._wanted:
                return
            if layer in self._found:
                raise ValueError(
                    f"{self._name}: {LAYER}{layer}: expected a module that runs once for an image, found one that runs "
                    "several times: choose the block that it is part of"
                )
            try:
                # Now, as the next module may write its own output over this one.
                self._found[layer] = mean_over_image(output, self._layout)
            except ValueError as error:
                raise ValueError(f"{self._name}: {LAYER}{layer}: {error}") from None

        return keep


def mean_over_image(x: Any, layout: ImageLayout) -> Tensor:
    """Return an output of a module as one vector an image.

    Args:
        x: Vectors (b, D), tokens (b, L, D), or maps (b, D, H, W) or (b, H, W, D). It is not kept.
        layout: Of the model.

    Returns:
        (b, D): vectors as they are, the mean of the tokens of patches, the mean of a map over space.

    Raises:
        ValueError: It is none of these.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"expected a tensor, found {type(x).__name__}")
    if x.ndim == 2:
        return x.clone()
    if x.ndim == 3:
        return x[:, _prefix(x.shape[1], layout) :].mean(1)
    if x.ndim == 4:
        first, last = (_is_space(size, layout.input_size) for size in (x.shape[2:], x.shape[1:3]))
        if first or last:
            channels_last = last and (layout.channels_last or not first)
            return x.mean((1, 2) if channels_last else (2, 3))
    raise ValueError(
        f"expected vectors (b, D), tokens (b, L, D) or maps (b, D, H, W) of an image of {layout.input_size} pixels, "
        f"found {tuple(x.shape)}"
    )


def token_feature(feature: str, x_bLD: Tensor, prefix: int) -> Tensor:
    """Return one of `TOKEN_FEATURES` of tokens (b, L, D): the class token first, `prefix` of them before patches."""
    parts = {"cls": lambda: x_bLD[:, 0], "mean_patch": lambda: x_bLD[:, prefix:].mean(1)}
    return torch.cat([parts[part]() for part in feature.split("+")], 1)


def _prefix(count: int, layout: ImageLayout) -> int:
    """Return how many of `count` tokens come before those of the patches."""
    if not layout.prefix or count == layout.tokens:
        return layout.prefix
    if layout.tokens is not None and count == layout.tokens - layout.prefix:  # before the prefix is added
        return 0
    raise ValueError(f"expected {layout.tokens} tokens, {layout.prefix} of them before those of patches, found {count}")


def _is_space(size: torch.Size, input_size: tuple[int, int]) -> bool:
    """Return whether (height, width) is that of an image that was made smaller: of the same shape but for rounding."""
    height, width = size
    return abs(width * input_size[0] - height * input_size[1]) < max(input_size)

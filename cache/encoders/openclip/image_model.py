"""The image towers of open_clip: what comes before their projection, after it, and inside."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from threetowers.cache.encoders.encoder import LAYER, ImageModel, require_offered
from threetowers.cache.encoders.image_features import (
    TOKEN_FEATURES,
    ImageLayout,
    LayerOutputs,
    token_feature,
)
from threetowers.cache.encoders.openclip.projection import Projection
from threetowers.cache.encoders.timm_encoder import timm_layout, timm_token_features


class OpenClipImages(ImageModel):
    """The image tower of an open_clip model.

    - `projected`: its embedding in the joint space of images and text, not normalised.
    - `pooled`: the tower's output before the projection. Where attention pooling projects as it pools (open_clip's
      ResNets, and timm towers with `abs_attn` or `rot_attn`), that is what the pooling gives.
    - `cls`, `mean_patch`, `cls+mean_patch`: the class token, the mean of the tokens of patches, and both concatenated,
      where the tower has them: after its final norm, or without one where the tower norms what is pooled instead. Not
      in towers with attention pooling of open_clip's own (CoCa), whose norm is behind it.
    - `layer:NAME`: the output of a module of the tower as one vector (`mean_over_image`).
    """

    def __init__(self, visual: nn.Module, input_size: tuple[int, int], name: str) -> None:
        """Find out what a tower offers.

        Args:
            visual: The tower (`model.visual`), in evaluation mode. Afterwards its own forward pass may not project.
            input_size: (height, width) of its input in pixels.
            name: Of the model, for messages.

        Raises:
            ValueError: It cannot compute an image of this size.
        """
        super().__init__()
        self.tower: _Tower = _tower(visual, input_size, name)
        self.features = ("projected", "pooled", *self.tower.token_features)
        self._name = name
        self._layers = LayerOutputs(visual, self.tower.layout, name)

    def forward(self, x_b3HW: Tensor, features: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the wanted features, (b, D) each."""
        for feature in features:
            if not feature.startswith(LAYER):
                require_offered(feature, (*self.features, f"{LAYER}NAME"), self._name)
        self._layers.begin(features)
        found = self.tower(x_b3HW, [feature for feature in features if feature in self.tower.token_features])
        return tuple(self._layers.vector(one) if one.startswith(LAYER) else found[one] for one in features)


class _Tower(nn.Module):
    """One kind of image tower: `projected`, `pooled` and the wanted ones of its `token_features`, by one pass."""

    token_features: tuple[str, ...] = ()

    def __init__(self, visual: Any, layout: ImageLayout) -> None:
        super().__init__()
        self.visual = visual
        self.layout = layout


class _WholeTower(_Tower):
    """A tower whose projection is no part of its own, as attention pooling is."""

    def forward(self, x_b3HW: Tensor, tokens: Sequence[str]) -> Mapping[str, Tensor]:
        x_bD = _first(self.visual(x_b3HW))
        return {"projected": x_bD, "pooled": x_bD}


class _VisionTransformer(_Tower):
    """open_clip's own vision transformer, without its projection."""

    def __init__(self, visual: Any, layout: ImageLayout) -> None:
        super().__init__(visual, layout)
        self.projection = Projection(visual.proj)
        visual.proj = None
        self._keeps = False
        self._tokens: list[Tensor] = []
        if visual.attn_pool is None:
            self.token_features = TOKEN_FEATURES
            last = visual.transformer if visual.final_ln_after_pool else visual.ln_post
            last.register_forward_hook(self._keep)

    def forward(self, x_b3HW: Tensor, tokens: Sequence[str]) -> Mapping[str, Tensor]:
        self._keeps = bool(tokens)
        pooled_bD = _first(self.visual(x_b3HW))
        found = {"pooled": pooled_bD, "projected": self.projection(pooled_bD)}
        if tokens:
            x_bLD = self._tokens.pop()
            found |= {feature: token_feature(feature, x_bLD, self.layout.prefix) for feature in tokens}
        return found

    def _keep(self, _module: nn.Module, _inputs: Any, x_bLD: Tensor) -> None:
        if self._keeps:
            self._tokens = [x_bLD]


class _TimmTower(_Tower):
    """A timm model inside open_clip, with a head of open_clip's, or timm's classifier as the projection."""

    def __init__(self, visual: Any, layout: ImageLayout) -> None:
        super().__init__(visual, layout)
        self.token_features = timm_token_features(visual.trunk, layout)
        self._projects = not isinstance(visual.trunk.get_classifier(), nn.Identity)

    def forward(self, x_b3HW: Tensor, tokens: Sequence[str]) -> Mapping[str, Tensor]:
        trunk, head = self.visual.trunk, self.visual.head
        x = trunk.forward_features(x_b3HW)
        found = {feature: token_feature(feature, x, self.layout.prefix) for feature in tokens}
        pooled = trunk.forward_head(x, pre_logits=True)
        projected_bD = head(trunk.forward_head(x) if self._projects else pooled)
        # Maps are pooled by open_clip's head, whose attention projects as it pools.
        pooled_bD = pooled if pooled.ndim == 2 else head.pool(pooled)
        return {"pooled": pooled_bD, "projected": projected_bD, **found}


def _tower(visual: Any, input_size: tuple[int, int], name: str) -> _Tower:
    """Return a tower as what it is, known by its parts."""
    if hasattr(visual, "trunk"):
        return _TimmTower(visual, timm_layout(visual.trunk, input_size, name))
    if hasattr(visual, "attn_pool") and hasattr(visual, "proj"):
        patches = [side // patch for side, patch in zip(input_size, visual.patch_size, strict=True)]
        return _VisionTransformer(visual, ImageLayout(input_size, 1, patches[0] * patches[1] + 1))
    return _WholeTower(visual, ImageLayout(input_size))


def _first(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return what is pooled: CoCa's tower gives its tokens too."""
    return output[0] if isinstance(output, tuple) else output

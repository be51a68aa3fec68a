"""The width of an image tower's features, and whether it has any."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.weights_file import one_line


def feature_width(model: nn.Module, name: str, args: Mapping[str, Any], image_size: int, remedy: str) -> int:
    """Return the width of the features of a model of images, found by a forward pass on one black image.

    Args:
        model: It takes images (b, 3, H, W) and returns features (b, width).
        name: The model's, for messages, as are `args`.
        args: What the model was built with besides.
        image_size: The side of the image.
        remedy: What else to change where the model does not fit.

    Raises:
        ValueError: The model takes no images of this size, or does not give one vector an image.
    """
    was_training = model.training
    with torch.no_grad():
        try:
            probe = model.eval()(torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # each family of models raises its own kinds
            raise ValueError(
                f"image tower: {name!r} does not take {image_size}-pixel images ({one_line(error)}); change "
                f"data.image_size, or {remedy}"
            ) from error
    model.train(was_training)
    if not isinstance(probe, Tensor) or probe.ndim != 2:
        found = tuple(probe.shape) if isinstance(probe, Tensor) else f"a {type(probe).__name__}"
        raise ValueError(
            f"image tower: {name!r} with args {dict(args)} gives {found} for an image, expected one vector (1, width); "
            f"change the tower's args, or {remedy}"
        )
    return int(probe.shape[1])

"""The size of the image in which the boxes of crops are counted."""

from collections.abc import Mapping
from typing import Any, Literal

from threetowers.cache.exchange.datacompdr.bad_reinforcement import BadReinforcement

ViewSize = Literal["image", "original"]  # as it lies in the tars, or before it was made smaller
Size = tuple[int, int]  # width and height in pixels


def original_size(fields: Mapping[str, Any], size: Size) -> Size:
    """Return the size that an image had before it was made smaller, as img2dataset states it.

    Args:
        fields: Of its sample, `original_width` and `original_height` among them.
        size: Of the image.

    Raises:
        BadReinforcement: The fields do not say, or the image was cropped or padded too.
    """
    original = fields.get("original_width"), fields.get("original_height")
    match original:
        case (int(width), int(height)) if width > 0 and height > 0:
            if abs(width * size[1] - height * size[0]) > max(width, height):  # more than a side is rounded by
                raise BadReinforcement(
                    f"the image of {size[0]} x {size[1]} pixels is no smaller form of the original of {width} x "
                    f"{height}: it was cropped or padded"
                )
            return width, height
    raise BadReinforcement(
        f"original_width and original_height in the json member are {original[0]} and {original[1]}, expected pixels "
        "(--view-size original)"
    )

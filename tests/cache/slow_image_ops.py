"""The operations on images as their definitions say, without Pillow, on bytes as (H, W, 3) float64."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.float64]
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def grey(image: Bytes) -> Bytes:
    return np.floor(image @ [19595, 38470, 7471] / 65536 + 0.5)


def blended(a: Bytes, b: Bytes, factor: float) -> Bytes:
    """From a to b and beyond, cut off, by single precision."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    return np.floor((a + np.float32(factor) * (b - a)).clip(0, 255)).astype(np.float64)


def sampled(image: Bytes, source: Callable[[Bytes, Bytes], tuple[Bytes, Bytes]]) -> Bytes:
    """Bilinear, cut off to whole bytes, where `source` maps the unit square; black outside."""
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width]
    u, v = source((x + 0.5) / width, (y + 0.5) / height)
    left, top = np.floor(u * width - 0.5).astype(int), np.floor(v * height - 0.5).astype(int)
    right_share, lower_share = u * width - 0.5 - left, v * height - 0.5 - top
    out = np.zeros_like(image)
    for row, row_share in ((top, 1 - lower_share), (top + 1, lower_share)):
        for column, share in ((left, 1 - right_share), (left + 1, right_share)):
            pixels = image[row.clip(0, height - 1), column.clip(0, width - 1)]
            out += (row_share * share)[..., None] * pixels
    inside = (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    return np.floor(np.where(inside[..., None], out, 0) + 1e-9)


def rotated(angle: float) -> Callable[[Bytes, Bytes], tuple[Bytes, Bytes]]:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return lambda u, v: (0.5 + cos * (u - 0.5) - sin * (v - 0.5), 0.5 + sin * (u - 0.5) + cos * (v - 0.5))


def smoothed(image: Bytes) -> Bytes:
    height, width, _ = image.shape
    out = image.copy()
    if min(height, width) > 2:
        windows = [(SMOOTH[y, x], image[y : height - 2 + y, x : width - 2 + x]) for y in range(3) for x in range(3)]
        out[1:-1, 1:-1] = np.floor(sum(share * window for share, window in windows) + 0.5)
    return out


def stretched(image: Bytes, measured: Bytes) -> Bytes:
    out = image.copy()
    for channel in range(3):
        low, high = measured[..., channel].min(), measured[..., channel].max()
        if low < high:
            out[..., channel] = np.floor((image[..., channel] - low) * 255 / (high - low)).clip(0, 255)
    return out


def equalized(image: Bytes, measured: Bytes) -> Bytes:
    out = image.copy()
    for channel in range(3):
        counted = measured[..., channel].ravel()
        step = int((counted < counted.max()).sum()) // 255
        for byte in range(256) if step else ():
            below = int((counted < byte).sum())
            out[image[..., channel] == byte, channel] = min(255, (below + step // 2) // step)
    return out


def slow_op(name: str, value: float, image: Bytes, measured: Bytes) -> Bytes:
    """Apply an operation to an image (H, W, 3), measuring another one."""
    ways: dict[str, Callable[[], Bytes]] = {
        "identity": lambda: image,
        "shear_x": lambda: sampled(image, lambda u, v: (u + value * v, v)),
        "shear_y": lambda: sampled(image, lambda u, v: (u, v + value * u)),
        "translate_x": lambda: sampled(image, lambda u, v: (u - value, v)),
        "translate_y": lambda: sampled(image, lambda u, v: (u, v - value)),
        "rotate": lambda: sampled(image, rotated(value)),
        "brightness": lambda: blended(np.zeros_like(image), image, value),
        "color": lambda: blended(np.repeat(grey(image)[..., None], 3, -1), image, value),
        "contrast": lambda: blended(np.full_like(image, math.floor(grey(measured).mean() + 0.5)), image, value),
        "sharpness": lambda: blended(smoothed(image), image, value),
        "posterize": lambda: image // 2 ** (8 - value) * 2 ** (8 - value),
        "solarize": lambda: np.where(image < value, image, 255 - image),
        "autocontrast": lambda: stretched(image, measured),
        "equalize": lambda: equalized(image, measured),
    }
    return ways[name]()

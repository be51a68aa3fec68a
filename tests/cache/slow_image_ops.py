"""The operations on images as their definitions say, pixel by pixel, on bytes as (H, W, 3) float64."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.float64]
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def grey(image: Bytes) -> Bytes:
    return np.floor(image @ [0.299, 0.587, 0.114] + 0.5)


def blended(a: Bytes, b: Bytes, factor: float) -> Bytes:
    """From a to b and beyond, cut off, by single precision."""
    return np.floor((a + np.float32(factor) * (b - a)).clip(0, 255))


def sampled(image: Bytes, source: Callable[[float, float], tuple[float, float]]) -> Bytes:
    """Bilinear, pixel by pixel, where `source` maps the unit square; black outside."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            u, v = source((x + 0.5) / width, (y + 0.5) / height)
            if not (0 <= u * width < width and 0 <= v * height < height):
                continue
            left, top = math.floor(u * width - 0.5), math.floor(v * height - 0.5)
            right_share, lower_share = u * width - 0.5 - left, v * height - 0.5 - top
            for row, row_share in ((top, 1 - lower_share), (top + 1, lower_share)):
                for column, share in ((left, 1 - right_share), (left + 1, right_share)):
                    pixel = image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                    out[y, x] += row_share * share * pixel
    return out


def rotated(angle: float) -> Callable[[float, float], tuple[float, float]]:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return lambda u, v: (0.5 + cos * (u - 0.5) - sin * (v - 0.5), 0.5 + sin * (u - 0.5) + cos * (v - 0.5))


def smoothed(image: Bytes) -> Bytes:
    out = image.copy()
    for y in range(1, image.shape[0] - 1):
        for x in range(1, image.shape[1] - 1):
            window = image[y - 1 : y + 2, x - 1 : x + 2]
            out[y, x] = np.floor((window * SMOOTH[..., None]).sum((0, 1)) + 0.5)
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
        if step:
            for at in np.ndindex(image.shape[:2]):
                below = int((counted < image[*at, channel]).sum())
                out[*at, channel] = min(255, (below + step // 2) // step)
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

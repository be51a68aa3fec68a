"""The operations of RandAugment on an RGB image: the meaning of the numbers that a cache stores for an augmented view.

An operation has a number, its *value*: a factor, an angle, a threshold. A view stores the ids of its operations with
their values, and whatever shows it again applies just these. So ids and meanings must never change; a new operation
is appended. The list, its order and its ranges are those of torchvision's `RandAugment`, which follows Cubuk et al.,
RandAugment (2020).

A teacher and a student see a view at different sizes, and both have to see the same change:

- Geometry is an affine map of the unit square, sampled bilinearly, black outside: a value is a share of the side.
- `contrast`, `autocontrast` and `equalize` depend on the whole image: its mean or its histogram. They take them from
  a second rendering of the view, the *measured* image (see `views.render_view`), which is the same for each size. So
  a view has one tone curve. Histograms of its own pixels would give another one at each size, because the extremes,
  which alone decide `autocontrast`, are averaged away when an image is reduced.
- All others act on single pixels, but for `sharpness`, which changes the finest detail there is at a size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps, ImageStat

N_OP_PARAMS = 2  # the id of an operation and its value
ROUNDING = 1e-6  # of a value as float32

Transform = Callable[[Image.Image], Image.Image]
Matrix = tuple[float, float, float, float, float, float]
Counts = npt.NDArray[np.int64]
OpParams = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageOp:
    """An operation.

    Attributes:
        name: its name.
        transform: what it does at a value, given the measured image.
        neutral: the value at strength 0.
        change: what strength 1 adds to it; 0 where there is no value.
        signed: whether the change may go both ways.
        whole: whether values are whole numbers.
        measures: whether the transform depends on the measured image.
    """

    name: str
    transform: Callable[[float, Image.Image], Transform]
    neutral: float = 0
    change: float = 0
    signed: bool = False
    whole: bool = False
    measures: bool = False

    def value(self, strength: float, sign: int) -> float:
        """Return the value at a strength of 0 to 1; `sign`, 1 or -1, is the direction if there are two."""
        value = self.neutral + (sign if self.signed else 1) * strength * self.change
        return round(value) if self.whole else value

    def accepts(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return for each number whether it is a value of this operation."""
        low, high = sorted((self.neutral - self.change if self.signed else self.neutral, self.neutral + self.change))
        inside = (values >= low - ROUNDING) & (values <= high + ROUNDING)
        return inside & (values == np.round(values)) if self.whole else inside


def _affine(matrix: Matrix) -> Transform:
    """Return the transform that shows at (u, v) of the unit square what was at (a·u + b·v + c, d·u + e·v + f)."""
    a, b, c, d, e, f = matrix

    def transform(image: Image.Image) -> Image.Image:
        width, height = image.size
        in_pixels = (a, b * width / height, c * width, d * height / width, e, f * height)
        return image.transform(image.size, Image.Transform.AFFINE, in_pixels, Image.Resampling.BILINEAR)

    return transform


def _shear_x(value: float, measured: Image.Image) -> Transform:
    return _affine((1, value, 0, 0, 1, 0))


def _shear_y(value: float, measured: Image.Image) -> Transform:
    return _affine((1, 0, 0, value, 1, 0))


def _translate_x(value: float, measured: Image.Image) -> Transform:
    """Move the image to the right by a share of its width."""
    return _affine((1, 0, -value, 0, 1, 0))


def _translate_y(value: float, measured: Image.Image) -> Transform:
    """Move the image down by a share of its height."""
    return _affine((1, 0, 0, 0, 1, -value))


def _rotate(value: float, measured: Image.Image) -> Transform:
    """Turn the image counterclockwise about its center by so many degrees."""
    cos = math.cos(math.radians(value))
    sin = math.sin(math.radians(value))
    return _affine((cos, -sin, (1 - cos + sin) / 2, sin, cos, (1 - cos - sin) / 2))


def _brightness(value: float, measured: Image.Image) -> Transform:
    """Multiply all bytes by a factor."""
    return lambda image: ImageEnhance.Brightness(image).enhance(value)


def _color(value: float, measured: Image.Image) -> Transform:
    """Multiply the distance of each pixel from its own grey by a factor."""
    return lambda image: ImageEnhance.Color(image).enhance(value)


def _contrast(value: float, measured: Image.Image) -> Transform:
    """Multiply the distance of all bytes from the mean grey by a factor."""
    grey = int(ImageStat.Stat(measured.convert("L")).mean[0] + 0.5)
    return lambda image: Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, value)


def _sharpness(value: float, measured: Image.Image) -> Transform:
    """Multiply the distance of each pixel from the smoothed image (3 x 3) by a factor."""
    return lambda image: ImageEnhance.Sharpness(image).enhance(value)


def _posterize(value: float, measured: Image.Image) -> Transform:
    """Keep so many of the upper bits of each byte."""
    return lambda image: ImageOps.posterize(image, int(value))


def _solarize(value: float, measured: Image.Image) -> Transform:
    """Invert the bytes from a threshold on."""
    return lambda image: ImageOps.solarize(image, value)  # type: ignore[arg-type]


def _autocontrast(value: float, measured: Image.Image) -> Transform:
    """Stretch each channel so that its darkest byte becomes 0 and its brightest 255."""
    return _tone_curves(measured, _stretching_curve)


def _equalize(value: float, measured: Image.Image) -> Transform:
    """Map each channel so that its bytes are about equally frequent."""
    return _tone_curves(measured, _equalizing_curve)


def _tone_curves(measured: Image.Image, curve: Callable[[Counts], Counts]) -> Transform:
    """Return the transform that maps the bytes of each channel by a curve made from its histogram."""
    histograms = np.asarray(measured.histogram(), np.int64).reshape(3, 256)
    table: list[int] = np.concatenate([curve(histogram) for histogram in histograms]).tolist()
    return lambda image: image.point(table)


def _stretching_curve(histogram: Counts) -> Counts:
    found = np.flatnonzero(histogram)
    low, high = int(found[0]), int(found[-1])
    byte = np.arange(256)
    return byte if low == high else ((byte - low) * 255 // (high - low)).clip(0, 255)


def _equalizing_curve(histogram: Counts) -> Counts:
    """Return the curve of Pillow and torchvision: the cumulative counts, in steps of 1/255 of all but the last."""
    found = np.flatnonzero(histogram)
    step = int(histogram.sum() - histogram[found[-1]]) // 255
    if step == 0:
        return np.arange(256)
    below = np.cumsum(histogram) - histogram
    return ((below + step // 2) // step).clip(0, 255)


# The id of an operation is its position here.
OPS = (
    ImageOp("identity", lambda value, measured: lambda image: image),
    ImageOp("shear_x", _shear_x, change=0.3, signed=True),
    ImageOp("shear_y", _shear_y, change=0.3, signed=True),
    ImageOp("translate_x", _translate_x, change=150 / 331, signed=True),
    ImageOp("translate_y", _translate_y, change=150 / 331, signed=True),
    ImageOp("rotate", _rotate, change=30, signed=True),
    ImageOp("brightness", _brightness, neutral=1, change=0.9, signed=True),
    ImageOp("color", _color, neutral=1, change=0.9, signed=True),
    ImageOp("contrast", _contrast, neutral=1, change=0.9, signed=True, measures=True),
    ImageOp("sharpness", _sharpness, neutral=1, change=0.9, signed=True),
    ImageOp("posterize", _posterize, neutral=8, change=-4, whole=True),
    ImageOp("solarize", _solarize, neutral=255, change=-255),
    ImageOp("autocontrast", _autocontrast, measures=True),
    ImageOp("equalize", _equalize, measures=True),
)


def op_problem(params_N2n: OpParams) -> str | None:
    """Return what is wrong with the first bad operation of N views, (N, 2 · n) ids and values; None if they are valid.

    A store of a later version may hold operations that this version does not know.
    """
    op_N, value_N = params_N2n.reshape(-1, N_OP_PARAMS).T
    known_N = np.isin(op_N, np.arange(len(OPS)))
    if not known_N.all():
        return f"operation {op_N[~known_N][0]:g}, expected one of 0 to {len(OPS) - 1}"
    for op_id in np.unique(op_N).astype(int).tolist():
        values = value_N[op_N == op_id]
        bad = ~OPS[op_id].accepts(values)
        if bad.any():
            return f"operation {op_id} ({OPS[op_id].name}) with the value {values[bad][0]:g}, which it does not have"
    return None


def operations(params_2n: OpParams) -> list[tuple[ImageOp, float]]:
    """Return the operations of one view and their values.

    Raises:
        ValueError: an operation is unknown, or has a value that it cannot have.
    """
    if len(params_2n) % N_OP_PARAMS:
        raise ValueError(f"{len(params_2n)} numbers of operations, expected an id and a value for each")
    problem = op_problem(params_2n[None])
    if problem:
        raise ValueError(problem)
    pairs = params_2n.reshape(-1, N_OP_PARAMS).tolist()
    return [(OPS[int(op_id)], value) for op_id, value in pairs]


def apply_ops(view: Image.Image, measured: Image.Image, ops: Sequence[tuple[ImageOp, float]]) -> Image.Image:
    """Apply operations to a view. The measured image, which may be the view itself, goes through them alike."""
    for op, value in ops:
        transform = op.transform(value, measured)
        changed = transform(view)
        measured = changed if measured is view else transform(measured)
        view = changed
    return view

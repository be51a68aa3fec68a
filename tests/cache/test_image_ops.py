"""The operations on images: against a slow reference and torchvision, at odd sizes, and with other numbers refused."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode, RandAugment
from torchvision.transforms.autoaugment import _apply_op

from tests.cache.slow_image_ops import slow_op
from threetowers.cache.format.image_ops import OPS, apply_ops, op_problem, operations

Draw = Callable[..., Image.Image]
NAMES = [op.name for op in OPS]
MEASURING = {"contrast", "autocontrast", "equalize"}


def values(name: str) -> list[float]:
    op = OPS[NAMES.index(name)]
    return sorted({float(np.float32(op.value(m / 30, sign))) for m in (0, 5, 9, 30) for sign in (1, -1)})


def apply(name: str, value: float, image: Image.Image, measured: Image.Image) -> Image.Image:
    op = OPS[NAMES.index(name)]
    return op.transform(value, measured)(image)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(31, 31), (24, 17), (3, 1), (1, 1)])
def test_operations_are_as_defined(name: str, size: tuple[int, int], draw: Draw) -> None:
    image, measured = draw(3, size), draw(4, (29, 29))
    pixels, counted = np.asarray(image, np.float64), np.asarray(measured, np.float64)
    for value in values(name):
        found = apply(name, value, image, measured)
        assert (found.size, found.mode) == (size, "RGB")
        expected = slow_op(name, value, pixels, counted)
        assert np.abs(np.asarray(found, np.float64) - expected).max() <= 1 + 1e-9
        assert np.asarray(image).tolist() == pixels.tolist(), "the image itself is not changed"


@pytest.mark.parametrize("name", sorted(MEASURING))
def test_some_operations_depend_on_the_measured_image(name: str, draw: Draw) -> None:
    image = draw(3, (20, 20))
    value = values(name)[-1]
    one, other = (apply(name, value, image, draw(seed, (30, 30))) for seed in (4, 5))
    assert OPS[NAMES.index(name)].measures
    assert np.asarray(one).tolist() != np.asarray(other).tolist()


@pytest.mark.parametrize("name", sorted(set(NAMES) - MEASURING))
def test_others_do_not(name: str, draw: Draw) -> None:
    image = draw(3, (20, 20))
    one, other = (apply(name, values(name)[-1], image, draw(seed, (30, 30))) for seed in (4, 5))
    assert not OPS[NAMES.index(name)].measures
    assert np.asarray(one).tolist() == np.asarray(other).tolist()


def test_ids_ranges_and_bytes_are_torchvisions(draw: Draw) -> None:
    side = 61
    image = draw(3, (side, side))
    space = RandAugment()._augmentation_space(31, (331, 331))
    assert [name.replace("_", "") for name in NAMES] == [name.lower() for name in space]
    for op, (name, (magnitudes, signed)) in zip(OPS, space.items(), strict=True):
        assert signed == op.signed
        for magnitude in (0, 5, 9, 30):
            for sign in (1, -1) if signed else (1,):
                theirs = sign * float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
                value = op.value(magnitude / 30, sign)
                if name.startswith("Translate"):  # whole pixels of the side, of 331 here
                    assert value == pytest.approx(theirs / 331, rel=1e-6)
                    theirs = round(value * side)
                    value = theirs / side
                else:
                    assert value == pytest.approx(theirs + op.neutral * signed, rel=1e-6)
                expected = _apply_op(image, name, theirs, InterpolationMode.BILINEAR, None)
                found = op.transform(value, image)(image)
                difference = np.asarray(found, np.int64) - np.asarray(expected, np.int64)
                assert np.abs(difference).max() <= 1, (name, value)
                assert (difference != 0).mean() < 0.03, (name, value)


def test_a_uniform_image_has_no_histogram_to_stretch() -> None:
    image = Image.new("RGB", (5, 4), (9, 200, 9))
    for name in ("autocontrast", "equalize"):
        assert np.asarray(apply(name, 0, image, image)).tolist() == np.asarray(image).tolist()


def test_the_measured_image_goes_through_the_operations_before(draw: Draw) -> None:
    """Rotated and then equalized: the black corners count; at one size, as if there were no measured image."""
    ops = operations(np.array([5, 21, 13, 0, 8, 1.3], np.float32))
    image, large = draw(3, (30, 30)), draw(3, (60, 60))
    rotated_30, rotated_60 = (apply("rotate", 21, each, each) for each in (image, large))
    equal_30, equal_60 = (apply("equalize", 0, each, rotated_60) for each in (rotated_30, rotated_60))
    expected = apply("contrast", float(np.float32(1.3)), equal_30, equal_60)
    assert np.asarray(apply_ops(image, large, ops)).tolist() == np.asarray(expected).tolist()
    own = apply_ops(image, image, ops)
    assert np.asarray(own).tolist() == np.asarray(apply_ops(image, image.copy(), ops)).tolist()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([14, 0], "operation 14, expected one of 0 to 13"),
        ([-1, 0], "operation -1, expected"),
        ([1.5, 0], "operation 1.5, expected"),
        ([np.nan, 0], "operation nan, expected"),
        ([0, 0, 6, 2.0], r"operation 6 \(brightness\) with the value 2,"),
        ([6, 0.05], r"operation 6 \(brightness\) with the value 0.05,"),
        ([6, np.nan], r"operation 6 \(brightness\) with the value nan,"),
        ([10, 6.5], r"operation 10 \(posterize\) with the value 6.5,"),
        ([10, 3], r"operation 10 \(posterize\) with the value 3,"),
        ([11, -1], r"operation 11 \(solarize\) with the value -1,"),
        ([13, 1], r"operation 13 \(equalize\) with the value 1,"),
        ([13, 0, 1], "3 numbers of operations, expected an id and a value for each"),
    ],
)
def test_other_numbers_are_refused(params: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operations(np.array(params, np.float32))


def test_all_values_that_can_be_drawn_are_accepted() -> None:
    for op_id, op in enumerate(OPS):
        drawn = [(op_id, op.value(magnitude / 30, sign)) for magnitude in range(31) for sign in (1, -1)]
        assert op_problem(np.array(drawn, np.float32)) is None
    assert operations(np.empty(0, np.float32)) == []

"""Declared views: their crops, that a stored box reproduces them, and that unknown policies are refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from threetowers.cache.format.image_ops import OPS
from threetowers.cache.format.views import Views, as_pixels, params_problem, random_box, render_view
from threetowers.cache.webdataset.images import decode_rgb

Draw = Callable[..., Image.Image]


def center(image: Image.Image) -> np.ndarray:
    return as_pixels(image.resize((16, 12)))


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    scale=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
)
def test_a_box_is_inside_the_image_and_has_the_area(width: int, height: int, scale: float, seed: int) -> None:
    left, top, right, bottom = random_box(width, height, scale, np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    area, aspect = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert area <= 1 + 1e-9
    touches = right - left > width * (1 - 1e-9) or bottom - top > height * (1 - 1e-9)
    assert touches or (area >= scale * (1 - 1e-9) and 3 / 4 - 1e-9 <= aspect <= 4 / 3 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    key=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 9),
    scale=st.floats(0.05, 1),
)
def test_params_are_a_function_of_seed_key_and_view(size: tuple[int, int], key: int, seed: int, scale: float) -> None:
    views = Views("crops:3", seed, scale)
    params = views.params(key, *size)
    assert params.shape == (3, 5)
    assert params.dtype == np.float32
    assert np.array_equal(params, Views("crops:3", seed, scale).params(key, *size))
    assert np.array_equal(params[:2], Views("crops:2", seed, scale).params(key, *size))
    assert not np.array_equal(params, views.params(key ^ 1, *size))
    assert (params[:, :4] >= 0).all()
    assert (params[:, :4] <= 1).all()
    assert set(params[:, 4].tolist()) <= {0.0, 1.0}
    for row in params:  # any stored box can be cut from any image of that size
        assert render_view(Image.new("RGB", size), row, (7, 5), "bicubic").size == (5, 7)


def test_stored_crops_reproduce_the_embedded_pixels(draw: Draw) -> None:
    image, views = draw(3, (61, 43)), Views("crops:4", seed=7, scale=0.3)
    pixels, params = views.pixels(image, 99, center, (12, 16), "bilinear")
    assert pixels.shape == (4, 3, 12, 16)
    assert len(np.unique(pixels.reshape(4, -1), axis=0)) == 4
    stored = np.frombuffer(params.tobytes(), np.float32).reshape(4, 5)
    for view, row in zip(pixels, stored, strict=True):
        assert np.array_equal(view, as_pixels(render_view(image, row, (12, 16), "bilinear")))


def test_a_box_is_cut_at_its_fractions(draw: Draw) -> None:
    image = draw(5, (64, 32))
    quarter = np.array([0.25, 0.5, 0.75, 1, 0], np.float32)
    expected = as_pixels(image.crop((16, 16, 48, 32)))
    assert np.array_equal(as_pixels(render_view(image, quarter, (16, 32), "bicubic")), expected)
    quarter[4] = 1
    assert np.array_equal(as_pixels(render_view(image, quarter, (16, 32), "bicubic")), expected[..., ::-1])


def test_drawn_parameters_are_these() -> None:
    """Whatever the versions of what draws them: crops of samples that a build left out are drawn when they are read."""
    found = Views("crops:3", seed=11, scale=0.4, augment="randaugment:2:9").params(0x1234567890ABCDEF, 640, 427)
    expected = [
        [0.07575507, 0, 0.7058731, 1, 1, 2, 0.09, 0, 0],
        [0.1251437, 0, 0.9873646, 1, 1, 12, 0, 13, 0],
        [0.1310565, 0.01636733, 0.8954543, 0.923462, 1, 12, 0, 7, 1.27],
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_augmentation_leaves_the_boxes_as_they_are() -> None:
    augmented, plain = (Views("crops:4", 3, 0.3, augment) for augment in ("randaugment:3:30", "none"))
    assert (plain.n_params, augmented.n_params) == (5, 11)
    for key in range(20):
        found = augmented.params(key, 50, 70)
        assert found.shape == (4, 11)
        assert np.array_equal(found[:, :5], plain.params(key, 50, 70))
        assert params_problem(found) is None


def test_operations_are_drawn_alike_with_both_signs() -> None:
    views = Views("crops:100", seed=5, augment="randaugment:2:9")
    drawn = np.concatenate([views.params(key, 40, 30)[:, 5:].reshape(-1, 2) for key in range(30)])
    counts = np.bincount(drawn[:, 0].astype(int), minlength=len(OPS))
    expected = len(drawn) / len(OPS)
    assert len(counts) == len(OPS)
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-squared of 13 degrees: 1 of 10,000 seeds is above
    for op_id, op in enumerate(OPS):
        values = drawn[drawn[:, 0] == op_id, 1]
        assert set(values) == {np.float32(op.value(0.3, sign)) for sign in ((1, -1) if op.signed else (1,))}
        assert not op.signed or 0.4 < (values > op.neutral).mean() < 0.6


@pytest.mark.parametrize("size", [(224, 224), (64, 48), (7, 31)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_augmented_views_replay_as_they_were_embedded(draw: Draw, size: tuple[int, int], interpolation: str) -> None:
    image, views = draw(3, (61, 43)), Views("crops:20", seed=7, scale=0.3, augment="randaugment:3:17")
    pixels, params = views.pixels(image, 99, center, size, interpolation)
    assert len(np.unique(params[:, 5::2])) == len(OPS), "all operations occur"
    stored = np.frombuffer(params.tobytes(), np.float32).reshape(20, 11)
    for view, row in reversed(list(zip(pixels, stored, strict=True))):
        assert np.array_equal(view, as_pixels(render_view(image, row, size, interpolation)))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
def test_views_of_images_of_other_modes(draw: Draw, encode: Callable[..., bytes], mode: str) -> None:
    """What is not RGB is made so when it is decoded, by build and trainer alike."""
    source = draw(8, (33, 29))
    image = decode_rgb(encode(source.convert(mode), "jpeg" if mode == "CMYK" else "png"))
    pixels, params = Views("crops:6", 1, 0.4, "randaugment:2:20").pixels(image, 5, center, (9, 13), "bicubic")
    again = decode_rgb(encode(source.convert(mode), "jpeg" if mode == "CMYK" else "png"))
    for view, row in zip(pixels, params, strict=True):
        assert np.array_equal(view, as_pixels(render_view(again, row, (9, 13), "bicubic")))


@pytest.mark.parametrize("op", [8, 12, 13])
def test_a_view_has_one_tone_curve_at_all_sizes(draw: Draw, op: int) -> None:
    """A byte becomes the same byte, whether the view is shown to a teacher or, at another size, to a student."""
    image, value = draw(3, (300, 200)), OPS[op].value(0.3, 1)
    box = np.array([0.1, 0.2, 0.9, 0.8, 1], np.float32)
    changes = {}
    for size, interpolation in (((224, 224), "bicubic"), ((97, 80), "bicubic"), ((160, 160), "bilinear")):
        plain = as_pixels(render_view(image, box, size, interpolation)).reshape(3, -1)
        changed = as_pixels(render_view(image, np.append(box, [op, value]).astype(np.float32), size, interpolation))
        for channel, (before, after) in enumerate(zip(plain, changed.reshape(3, -1), strict=True)):
            for pair in zip(before.tolist(), after.tolist(), strict=True):
                assert changes.setdefault((channel, pair[0]), pair[1]) == pair[1]
    assert any(before != after for (_, before), after in changes.items())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([0, 0, 1, 1, 0, 14, 0], "operation 14, expected one of 0 to 13"),
        ([0, 0, 1, 1, 0, 6, 3], r"operation 6 \(brightness\) with the value 3"),
        ([0, 0, 1, 1, 0, 6], "1 numbers of operations"),
        ([0, 0, 1, 1], "4 parameters of a view, expected 5 of its crop, and 2 of each operation"),
    ],
)
def test_parameters_that_cannot_be_shown_are_refused(draw: Draw, params: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_view(draw(1), np.array(params, np.float32), (8, 8), "bicubic")


def test_center_is_the_teachers_own_transform_and_flip_its_mirror(draw: Draw) -> None:
    image = draw(1)
    for policy, count in (("center", 1), ("center+flip", 2)):
        views = Views(policy)
        pixels, params = views.pixels(image, 1, center, (12, 16), "bicubic")
        assert views.count == count == len(pixels)
        assert not views.cropped
        assert not params.any()
        assert np.array_equal(pixels[0], center(image))
    assert np.array_equal(pixels[1], center(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("centre", {}, "expected center, center"),
        ("crops", {}, "crops:K with K"),
        ("crops:0", {}, "K from 1"),
        ("crops:-1", {}, "K from 1"),
        ("crops:101", {}, "to 100"),
        ("crops:2", {"scale": 0.0}, "0 < scale <= 1"),
        ("crops:2", {"scale": 1.5}, "0 < scale <= 1"),
        ("crops:2", {"seed": -1}, "seed >= 0"),
        ("center", {"scale": 0.5}, "have no seed, scale or augment"),
        ("center+flip", {"seed": 1}, "have no seed, scale or augment"),
        ("center", {"augment": "randaugment:2:9"}, "have no seed, scale or augment"),
        ("crops:2", {"augment": "randaugment"}, "augment 'randaugment': expected none, or randaugment:OPS:MAGNITUDE"),
        ("crops:2", {"augment": "randaugment:0:9"}, "1 to 8 operations"),
        ("crops:2", {"augment": "randaugment:9:9"}, "1 to 8 operations"),
        ("crops:2", {"augment": "randaugment:2:31"}, "magnitude of 0 to 30"),
        ("crops:2", {"augment": "randaugment:2:-1"}, "magnitude of 0 to 30"),
        ("crops:2", {"augment": "randaugment:2:9:1"}, "as randaugment:2:9"),
        ("crops:2", {"augment": "rand-m9-n2"}, "as randaugment:2:9"),
    ],
)
def test_other_policies_are_refused(policy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(policy, **options)

"""Declared views: their crops, that a stored box reproduces them, and that unknown policies are refused."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from threetowers.cache.format.views import Views, apply_crop, as_pixels, random_box

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
        assert apply_crop(Image.new("RGB", size), row, (7, 5)).size == (5, 7)


def test_stored_crops_reproduce_the_embedded_pixels(draw: Draw) -> None:
    image, views = draw(3, (61, 43)), Views("crops:4", seed=7, scale=0.3)
    pixels, params = views.pixels(image, 99, center, (12, 16), "bilinear")
    assert pixels.shape == (4, 3, 12, 16)
    assert len(np.unique(pixels.reshape(4, -1), axis=0)) == 4
    stored = np.frombuffer(params.tobytes(), np.float32).reshape(4, 5)
    for view, row in zip(pixels, stored, strict=True):
        assert np.array_equal(view, as_pixels(apply_crop(image, row, (12, 16), "bilinear")))


def test_a_box_is_cut_at_its_fractions(draw: Draw) -> None:
    image = draw(5, (64, 32))
    quarter = np.array([0.25, 0.5, 0.75, 1, 0], np.float32)
    expected = as_pixels(image.crop((16, 16, 48, 32)))
    assert np.array_equal(as_pixels(apply_crop(image, quarter, (16, 32))), expected)
    quarter[4] = 1
    assert np.array_equal(as_pixels(apply_crop(image, quarter, (16, 32))), expected[..., ::-1])


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
        ("center", {"scale": 0.5}, "have no seed or scale"),
        ("center+flip", {"seed": 1}, "have no seed or scale"),
    ],
)
def test_other_policies_are_refused(policy: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Views(policy, **options)  # type: ignore[arg-type]

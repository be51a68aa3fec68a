"""Each storage dtype against a slow reference and against torch, and its reported errors against decoded rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from threetowers.cache.format.dtypes import STORAGE_DTYPES, cosines, storage_cosines, storage_dtype

ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32),
)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS)
@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_a_decoded_row_is_within_half_a_step(name: str, rows: np.ndarray) -> None:
    dtype = storage_dtype(name)
    stored, scale = dtype.encode(rows)
    assert stored.dtype == dtype.stored
    assert (scale is not None) == dtype.scaled
    decoded = dtype.decode(stored, scale)
    assert decoded.dtype == np.float32
    absolute = 0.5000001 * np.abs(rows).max(axis=1, keepdims=True) / 127 if name == "int8" else 2.0**-25
    relative = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 0.0, "int8": 0.0}[name]
    if name != "float32":
        # The smallest scales are multiples of 2^-149, so that a stored number may be off by 127 halves of it.
        smallest = 128 * 2.0**-150
        assert (np.abs(decoded - rows) <= relative * np.abs(rows) + absolute + smallest).all()
    else:
        assert np.array_equal(decoded, rows)


@settings(max_examples=200, deadline=None)
@given(rows=hnp.arrays(np.float32, (3, 5), elements=st.floats(width=32)))
def test_bfloat16_rounds_as_torch_does(rows: np.ndarray) -> None:
    stored, _ = storage_dtype("bfloat16").encode(rows)
    ours = storage_dtype("bfloat16").decode(stored, None)
    theirs = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(stored[np.isnan(rows)], np.full(np.isnan(rows).sum(), 0x7FC0))


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_int8_equals_a_slow_reference(rows: np.ndarray) -> None:
    stored, scale = storage_dtype("int8").encode(rows)
    assert scale is not None
    for row, steps, step in zip(rows, stored, scale, strict=True):
        expected = np.float32(max(abs(float(x)) for x in row) / 127)
        assert step == pytest.approx(expected, rel=1e-6)
        for x, n in zip(row, steps, strict=True):
            assert int(n) == (round(float(np.float32(x) / step)) if step else 0)


@pytest.mark.parametrize("name", STORAGE_DTYPES)
def test_a_row_without_an_embedding_decodes_to_nan(name: str) -> None:
    dtype = storage_dtype(name)
    stored, scale = dtype.encode(np.full((2, 3), np.nan, np.float32))
    assert np.isnan(dtype.decode(stored, scale)).all()
    fill = np.full((2, 3), dtype.fill, dtype.stored)
    assert np.array_equal(stored, fill, equal_nan=name.startswith("float"))


@pytest.mark.parametrize("name", STORAGE_DTYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65520.0, 3.4e38])
def test_a_row_that_does_not_fit_is_nonfinite_and_has_cosine_zero(name: str, value: float) -> None:
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = value
    dtype = storage_dtype(name)
    finite = np.isfinite(dtype.decode(*dtype.encode(rows))).all(axis=1)
    fits = np.isfinite(value) and (name != "float16" or value < 65520) and (name != "bfloat16" or value < 3.39e38)
    assert finite.tolist() == [True, fits, True]
    found = storage_cosines(dtype, rows)
    assert (found[[0, 2]] > 1 - 1e-12).all()
    assert (found[1] == 0) == (not fits)


def test_an_outlier_lowers_the_cosine_of_int8_below_its_bound() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 256)).astype(np.float32)
    assert storage_cosines(storage_dtype("int8"), rows).min() > 0.999
    rows[7, 0] = 1000
    rows[7, 1:] = 3.9  # below half a step of the outlier's scale
    found = storage_cosines(storage_dtype("int8"), rows)
    assert found.argmin() == 7
    assert found[7] < storage_dtype("int8").min_cosine
    assert storage_cosines(storage_dtype("float16"), rows).min() > storage_dtype("float16").min_cosine


def test_dtypes_are_ordered_by_error_and_bytes() -> None:
    rows = np.random.default_rng(1).normal(size=(100, 300)).astype(np.float32)
    errors = {name: 1 - storage_cosines(dtype, rows).min() for name, dtype in STORAGE_DTYPES.items()}
    assert errors["float32"] < errors["float16"] < errors["bfloat16"] < errors["int8"] < 1e-3
    assert [storage_dtype(n).row_bytes(300) for n in ("float32", "float16", "bfloat16", "int8")] == [
        1200,
        600,
        600,
        304,
    ]
    with pytest.raises(ValueError, match="expected one of float16, float32, bfloat16, int8"):
        storage_dtype("float8")


def test_cosines_of_zero_rows() -> None:
    a, b = np.array([[0, 0], [0, 0], [3, 4]], np.float32), np.array([[0, 0], [1, 0], [3, 4]], np.float32)
    assert cosines(a, b).tolist() == [1, 0, 1]
    tiny = np.full((1, 4), 1e-9, np.float32)  # underflows to zero in float16
    assert storage_cosines(storage_dtype("float16"), tiny).tolist() == [0]

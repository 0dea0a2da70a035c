"""The roundings of tf32x3 that the tests give Triton's interpreter."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

from backends.triton.interpreter import tf32x3  # noqa: E402


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def high(x: np.ndarray) -> np.ndarray:
    """The 11 leading bits of a number, rounded to nearest: one product of tf32 reads no more."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.round(mantissa * 2**11), exponent).astype(np.float32)


@pytest.mark.parametrize("inner", [16, 32, 64])
def test_three_products_of_tf32_stand_for_one_of_float32(inner):
    """Twice the error of float32 that is added up term by term, and four units; one product of tf32 is far above."""
    a, b, d = draw(32, inner), draw(inner, 48), draw(32, 48)
    exact = a.astype(np.float64) @ b + d
    error = lambda y: np.linalg.norm(y - exact) / np.linalg.norm(exact)
    in_order = d.copy()
    for k in range(inner):
        in_order += a[:, k : k + 1] * b[k]
    ours = tf32x3(a, b, d)
    assert ours.dtype == np.float32
    allowed = 2.0 * error(in_order) + 4.0 * 2.0**-23
    assert 2.0**-26 < error(ours) <= allowed < error(high(a) @ high(b) + d) / 10.0


def test_numbers_of_few_bits_are_exact():
    a, b = np.round(draw(16, 16) * 100.0), np.round(draw(16, 32) * 100.0)
    assert np.array_equal(tf32x3(a, b, np.ones((16, 32), np.float32)), a @ b + 1.0)


def test_what_is_added_is_cut_off_towards_zero():
    ones, small = np.ones((1, 16), np.float32), np.full((16, 1), 2.0**-25, np.float32)
    small[0] = (
        1.0  # 1.75 units in the last place after eight products, then 3 of what is left, and 3.75 in all
    )
    assert tf32x3(ones, small, np.zeros((1, 1), np.float32)).item() == 1.0 + 3.0 * 2.0**-23
    assert np.isnan(tf32x3(ones * np.nan, small, np.zeros((1, 1), np.float32))).all()

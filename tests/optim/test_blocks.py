"""Blocks: their shapes, their scales, and what dequantizing gives."""

import math

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import numpy as jnp

from qwix_train.optim import _blocks

QTYPES = pytest.mark.parametrize("qtype", _blocks.QTYPES)
# Half of the widest step of a type, relative to the scale.
HALF_STEP = {"dynamic": 0.9 / 64 / 2, "int8": 1 / 127 / 2}


@hypothesis.given(st.lists(st.integers(1, 5000), max_size=4), st.integers(1, 4096))
def test_blocks_fit_and_are_not_small(shape, block_size):
    block = _blocks.block_shape(shape, block_size)
    assert math.prod(block) <= block_size
    assert all(1 <= b <= n for b, n in zip(block, shape, strict=True))
    # The first axis that does not fit ends it, at no less than half of what fits.
    if shape:
        assert 2 * block[-1] >= min(shape[-1], block_size)


@pytest.mark.parametrize(
    "shape",
    [(4096,), (4099,), (768, 3072), (4096, 8), (3, 3, 64, 128), (50257, 16), (999, 10)],
)
def test_bytes(shape):
    scales = math.prod(_blocks.scale_shape(shape, 256))
    assert math.prod(shape) + 4 * scales <= 0.3 * 4 * math.prod(shape)


def whole_blocks(scale, shape):
    """The scale of each element, of blocks of which the last may be shorter."""
    for axis, size in enumerate(shape):
        tile = -(-size // scale.shape[axis])
        scale = np.repeat(scale, tile, axis).take(range(size), axis)
    return scale


@pytest.mark.thinned(9)
@QTYPES
@pytest.mark.parametrize("shape", [(64,), (6, 40), (37,), (4, 3, 5), (53, 7)])
@pytest.mark.parametrize("squared", [False, True])
def test_error_is_half_a_step(qtype, shape, squared):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x = x**2 if squared else x
    codes, scale = _blocks.quantize(jax.device_put(x), qtype, 16)
    assert codes.shape == shape and codes.dtype == _blocks.code_dtype(qtype)
    assert scale.shape == _blocks.scale_shape(shape, 16)
    values = np.asarray(_blocks.dequantize(codes, scale, qtype))
    # The scale of integers is a step, that of the maps is the largest value.
    largest = np.abs(scale) * (127 if qtype == "int8" else 1)
    bound = whole_blocks(largest, shape) * HALF_STEP[qtype]
    assert (np.abs(values - x) <= bound * (1 + 1e-5)).all()
    if qtype == "dynamic":
        assert ((scale < 0) == squared).all() or not squared


@QTYPES
def test_quantizing_again_changes_nothing(qtype):
    # In particular it does not shrink the largest magnitudes, of either sign.
    rng = np.random.default_rng(0)
    x = jax.device_put(rng.normal(size=(64, 16)) * 10.0 ** rng.integers(-9, 3, (64, 1)))
    x = x.at[:8].set(x[:8] ** 2)
    codes, scale = _blocks.quantize(x, qtype, 16)
    values = _blocks.dequantize(codes, scale, qtype)
    largest = np.abs(np.asarray(x)).argmax(1)[:, None]
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(values), largest, 1),
        np.take_along_axis(np.asarray(x), largest, 1),
        rtol=1e-6,
    )
    again, scale_again = _blocks.quantize(values, qtype, 16)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(scale_again, scale, rtol=1e-6)


@QTYPES
def test_zeros_and_small_moments(qtype):
    # Second moments of small gradients are far below what a weight ever is.
    x = jnp.array([[0.0] * 16, [1e-30] * 16])
    values = _blocks.dequantize(*_blocks.quantize(x, qtype, 16), qtype)
    np.testing.assert_allclose(values, x, rtol=1e-6, atol=0)


@QTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_block(qtype, bad):
    x = jnp.ones((2, 16)).at[0, 3].set(bad)
    values = _blocks.dequantize(*_blocks.quantize(x, qtype, 16), qtype)
    assert np.isnan(values[0]).any() == np.isnan(bad)
    np.testing.assert_allclose(values[1], 1, rtol=1e-6)


@QTYPES
def test_bfloat16(qtype):
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(8, 16)).astype(jnp.bfloat16)
    )
    codes, scale = _blocks.quantize(x, qtype, 16)
    assert scale.dtype == jnp.bfloat16
    values = _blocks.dequantize(codes, scale, qtype)
    assert values.dtype == jnp.bfloat16
    largest = np.abs(x.astype(np.float32)).max(1, keepdims=True)
    error = np.abs(values.astype(jnp.float32) - x.astype(np.float32))
    assert (error <= largest * (HALF_STEP[qtype] + 2**-7)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("largest", [1e8, 1e20, np.inf])
def test_one_value_far_from_all_others_of_its_block(dtype, largest):
    x = np.random.default_rng(0).uniform(0.1, 1, size=(3, 16)).astype(np.float32)
    x[1, 5] = largest
    x[1, 6] = 0
    x = np.asarray(x, dtype)
    values = _blocks.dequantize(
        *_blocks.quantize(jax.device_put(x), "dynamic", 16), "dynamic"
    )
    values, x = np.asarray(values, np.float64), np.asarray(x, np.float64)
    biggest = float(jnp.finfo(dtype).max) / 4
    np.testing.assert_allclose(values[1, 5], min(largest, biggest), rtol=0.01)
    assert values[1, 6] == 0
    others = np.delete(x[1], [5, 6])
    # As fine as the signed map is; that block may have a scale four times too large.
    np.testing.assert_allclose(np.delete(values[1], [5, 6]), others, rtol=0.15)
    # Blocks without such a value are as they were.
    np.testing.assert_allclose(values[[0, 2]], x[[0, 2]], atol=0.9 / 64 / 2 + 0.004)


def test_what_is_positive_is_not_rounded_to_zero():
    x = np.full((1, 16), 1e-12, np.float32)
    x[0, :2] = 1e38, 3e37
    codes, scale = _blocks.quantize(jax.device_put(x), "dynamic", 16)
    assert (np.asarray(_blocks.dequantize(codes, scale, "dynamic")) > 0).all()

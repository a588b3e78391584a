"""Values on a grid, against integers in NumPy."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import numpy as jnp

from qwix_train.core.grid import Grid
from qwix_train.core.how import HowToQuantize
from qwix_train.odml import integer_grid

ROUND = {
    "even": np.round,
    "floor": np.floor,
    "away": lambda x: np.sign(x) * np.floor(np.abs(x) + 0.5),
}


def reference(x, scale, zero_point, low, high, rounding="even"):
    """The codes, in float64 and integers."""
    scaled = np.asarray(x, np.float64) / np.float64(scale)
    if rounding == "away":
        # LiteRT averages codes, and so rounds them away from the code zero.
        codes = ROUND[rounding](scaled + zero_point)
    else:
        codes = ROUND[rounding](scaled) + zero_point
    return np.clip(codes.astype(np.int64), low, high)


def narrow_how(qtype, channels):
    return HowToQuantize(qtype=f"{qtype}_narrow", channelwise_axes=channels)


@pytest.mark.parametrize("rounding", ROUND)
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    quarters=hnp.arrays(np.int32, 16, elements=st.integers(-1200, 1200)),
    exponent=st.integers(-10, 6),
    zero_point=st.integers(-128, 127),
    qtype=st.sampled_from(["int8", "int4"]),
    narrow=st.booleans(),
)
def test_values_are_those_of_integers(
    rounding, quarters, exponent, zero_point, qtype, narrow
):
    # Quarters of a step, so that floats are exact, and there are ties.
    scale = np.float32(2.0**exponent)
    x = (quarters / 4 * scale).astype(np.float32)
    bits = {"int8": 8, "int4": 4}[qtype]
    low, high = -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    zero_point = int(np.clip(zero_point, low, high))
    grid = Grid(scale, np.int32(zero_point), f"{qtype}_narrow" if narrow else qtype)
    codes = reference(x, scale, zero_point, low, high, rounding)
    y = integer_grid.on_grid(jax.device_put(x), grid, rounding)
    np.testing.assert_array_equal(y, (codes - zero_point) * scale)
    assert grid.codes == (low, high)
    np.testing.assert_allclose(
        grid.ends, [(low - zero_point) * scale, (high - zero_point) * scale]
    )
    if rounding == "even":
        np.testing.assert_array_equal(integer_grid.codes_of(x, grid), codes)
        # What is on the grid stays.
        again = integer_grid.on_grid(y, grid)
        np.testing.assert_array_equal(again, y)


@pytest.mark.slow
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    x=hnp.arrays(np.float32, 12, elements=st.floats(-50, 50, width=32)),
    ends=st.tuples(
        st.floats(-40, 0, width=32), st.floats(np.float32(0.1), 40, width=32)
    ),
)
def test_the_grid_of_a_range_is_near_every_value_in_it(x, ends):
    low, high = map(np.float32, ends)
    calibration = {"min": jnp.full(1, low), "max": jnp.full(1, high)}
    grid = integer_grid.of_calibration(calibration, "int8")
    step = (np.float64(high) - low) / 255
    np.testing.assert_allclose(grid.scale, step, 1e-6)
    y = integer_grid.on_grid(jax.device_put(x), grid)
    inside = (low <= x) & (x <= high)
    # Half a step, and as much at the ends, as the zero point is rounded.
    assert (np.abs(y - x)[inside] <= 1.001 * step).all()
    assert (y >= low - 0.51 * step).all() and (y <= high + 0.51 * step).all()
    # Zero is on the grid.
    assert integer_grid.on_grid(jnp.zeros(()), grid) == 0


def test_the_grid_of_a_symmetric_range_has_no_zero_point():
    grid = integer_grid.of_calibration({"absmax": jnp.full(1, 2.0)}, "int8")
    assert grid.zero_point.item() == 0
    np.testing.assert_allclose(grid.scale, 2 / 127.5, 1e-6)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("rounding", ROUND)
def test_gradients_pass_within_the_range_alone(rounding):
    grid = Grid(np.float32(0.5), np.int32(10))
    low, high = (-128 - 10) * 0.5, (127 - 10) * 0.5
    x = jnp.array([low - 0.3, low + 0.1, -0.7, 0.0, 0.2, high, high + 0.6])
    weights = jnp.arange(1.0, 8.0)

    def total(x):
        return jnp.sum(weights * integer_grid.on_grid(x, grid, rounding))

    expected = np.array([0, 2, 3, 4, 5, 6, 0])
    np.testing.assert_array_equal(jax.grad(total)(x), expected)
    _, tangent = jax.jvp(total, (x,), (jnp.ones_like(x),))
    assert tangent == expected.sum()


def test_the_scale_gets_no_gradient():
    def total(scale):
        return integer_grid.on_grid(jnp.float32(0.37), Grid(scale, 0)) ** 2

    assert jax.grad(total)(jnp.float32(0.1)) == 0


@pytest.mark.thinned(3)
@pytest.mark.parametrize("qtype, high", [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("channels", [(), (1,), (0, 2)])
def test_weights_are_symmetric_without_the_lowest_code(qtype, high, channels):
    w = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    grid = integer_grid.of_weight(jax.device_put(w), narrow_how(qtype, channels))
    shared = tuple(a for a in range(3) if a not in channels)
    absmax = np.abs(w).max(shared, keepdims=True)
    np.testing.assert_allclose(grid.scale, absmax / high, 1e-6)
    assert not np.any(grid.zero_point)
    codes = integer_grid.codes_of(w, grid)
    assert codes.min() >= -high and np.abs(codes).max() == high
    y = integer_grid.on_grid(jax.device_put(w), grid)
    np.testing.assert_allclose(y, codes * np.float64(grid.scale), 1e-6)
    # The largest of each channel is exact.
    np.testing.assert_allclose(
        np.abs(np.where(np.abs(w) == absmax, y - w, 0)).max(), 0, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_weight_of_a_channel_has_its_gradient(seed):
    w = jax.random.normal(jax.random.key(seed), (5, 40))

    def total(w):
        return integer_grid.on_grid(
            w, integer_grid.of_weight(w, narrow_how("int8", (1,)))
        ).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(w), np.ones((5, 40)))


@pytest.mark.slow
def test_a_channel_of_zeros_stays_zero():
    w = jnp.array([[0.0, 1.0], [0.0, -2.0]])
    grid = integer_grid.of_weight(w, narrow_how("int8", (1,)))
    np.testing.assert_allclose(grid.scale, [[1, 2 / 127]], 1e-6)
    np.testing.assert_array_equal(integer_grid.on_grid(w, grid)[:, 0], 0)
    grads = jax.grad(lambda w: integer_grid.on_grid(w, grid).sum())(w)
    assert np.isfinite(grads).all()


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.floats(np.float32(1e-6), np.float32(1e6), width=32), st.booleans())
def test_a_number_is_exact(value, negative):
    x = np.float32(-value if negative else value)
    grid = integer_grid.of_constant(jax.device_put(x), "int8")
    y = integer_grid.on_grid(jax.device_put(x), grid)
    np.testing.assert_allclose(y, x, 2e-7)
    assert integer_grid.codes_of(x, grid) == (-128 if negative else 127)


def test_a_constant_has_one_range_that_holds_zero():
    x = jnp.array([[2.0, 3.0], [7.0, 4.0]])
    grid = integer_grid.of_constant(x, "int8")
    assert grid.scale.shape == grid.zero_point.shape == ()
    np.testing.assert_allclose(grid.scale, 7 / 255, 1e-6)
    assert grid.zero_point == -128
    np.testing.assert_allclose(integer_grid.on_grid(x, grid), x, atol=7 / 255 / 2)


def test_a_tie_that_floats_miss_is_rounded_away():
    # As an average of four codes is: 2.5 steps, which floats make a little less.
    scale = np.float32(0.3)
    x = np.float32(np.nextafter(np.float32(2.5) * scale, np.float32(0)))
    grid = Grid(scale, np.int32(0))
    y = integer_grid.on_grid(jax.device_put(x), grid, "away")
    np.testing.assert_allclose(y, 3 * scale)
    np.testing.assert_allclose(integer_grid.on_grid(-x, grid, "away"), -3 * scale)

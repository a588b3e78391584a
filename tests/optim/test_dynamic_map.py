"""The dynamic maps against a list made as the 8-bit optimizers paper describes them."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.optim import _dynamic_map


def reference(signed):
    """The map by the description, as its authors' `create_dynamic_map` builds it.

    A byte is a sign, zeros that count the decade, an indicator bit, and a fraction of
    the bits that are left. A fraction stands for the mean of two neighbors among
    evenly spaced boundaries from 0.1 to 1. 0 and 1 are there as they are.
    """
    values = [0.0, 1.0]
    exponent_bits = 7
    for i in range(exponent_bits):
        fractions = 2 ** (i if signed else i + 1)
        boundaries = np.linspace(0.1, 1, fractions + 1)
        means = (boundaries[:-1] + boundaries[1:]) / 2
        decade = 10 ** (-(exponent_bits - 1) + i) * means
        values.extend(decade)
        if signed:
            values.extend(-decade)
    assert len(values) == 256
    return np.sort(values)


@pytest.mark.slow
@pytest.mark.parametrize("unsigned", [False, True])
def test_values(unsigned):
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = _dynamic_map.decode(codes, jnp.array(unsigned), jnp.float32)
    expected = reference(signed=not unsigned)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=0)
    encoded = _dynamic_map.encode(values, jnp.array(unsigned))
    np.testing.assert_array_equal(encoded, codes)


def test_ends():
    # Numbers that the paper's authors publish: the largest, and the two smallest.
    assert reference(signed=True)[[0, 126, 128, 255]] == pytest.approx(
        [-0.99296875, -5.5e-7, 5.5e-7, 1]
    )
    assert reference(signed=False)[[0, 1, 2, 255]] == pytest.approx(
        [0, 3.25e-7, 7.75e-7, 1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("unsigned", [False, True])
def test_codes_are_those_of_the_nearest_values(unsigned):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [10 ** rng.uniform(-8, 0, 20000), rng.uniform(0, 1, 20000), [0, 1]]
    ).astype(np.float32)
    values = reference(signed=not unsigned)
    # Around the middles between neighbors and around the ends of decades, too.
    middles = np.concatenate([(values[1:] + values[:-1]) / 2, values])
    near = (middles[:, None] * [1 - 1e-5, 1 + 1e-5]).ravel().astype(np.float32)
    x = np.clip(np.concatenate([x, near]), -1, 1)
    x = np.abs(x) if unsigned else np.concatenate([x, -x])
    x = x[(x >= values[0])]

    codes = np.asarray(_dynamic_map.encode(jax.device_put(x), jnp.array(unsigned)))
    distance = np.abs(x[:, None].astype(np.float64) - values)
    best = distance.argmin(1)
    if unsigned:  # What is positive stays so.
        best = np.where(x > 0, np.maximum(best, 1), best)
    chosen = np.take_along_axis(distance, codes[:, None].astype(int), 1)[:, 0]
    smallest = np.take_along_axis(distance, best[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, smallest, rtol=1e-4, atol=1e-13)
    assert (codes == best).mean() > 0.9995


def test_maps_are_chosen_element_by_element():
    x = jnp.array([[0.3, 0.5], [0.3, 0.5]])
    unsigned = jnp.array([[False], [True]])
    codes = jax.jit(_dynamic_map.encode)(x, unsigned)
    values = _dynamic_map.decode(codes, unsigned, jnp.float32)
    expected = [
        [values[np.abs(values - v).argmin()] for v in (0.3, 0.5)]
        for values in (reference(signed=True), reference(signed=False))
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-6)

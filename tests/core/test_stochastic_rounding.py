"""Stochastic rounding: to a neighbor, and to the value on average, for every type."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train.core import numerics
from qwix_train.core import stochastic_rounding as noise
from qwix_train.core.formats import levels as tables
from tests.core.reference import QTYPE_NAMES

DRAWS = 4000


def levels(qtype):
    """All values of a type, ascending."""
    if qtype == "nf4":
        return np.array(tables.NF4)
    if qtype.startswith("float8"):
        values = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, qtype))
        values = np.unique(values.astype(np.float64))
        return values[np.isfinite(values)]
    low, high = numerics.code_range(qtype)
    return np.arange(low, high + 1, 2 if qtype == "int1" else 1, dtype=np.float64)


def values_between(grid):
    """Values in all parts of a grid: of float8, subnormal ones, too."""
    rng = np.random.default_rng(0)
    at = rng.integers(0, len(grid) - 1, 40)
    share = rng.uniform(0, 1, 40)
    values = grid[at] + share * (grid[at + 1] - grid[at])
    return np.concatenate([values, grid[[0, -1]]]).astype(np.float32)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", noise.NOISE_NAMES)
@pytest.mark.parametrize("qtype", QTYPE_NAMES)
def test_every_type_rounds_to_a_neighbor_and_is_unbiased(qtype, name):
    grid = levels(qtype)
    x = values_between(grid)
    made = noise.noise_fn(name, jax.random.key(1))
    tiled = jnp.broadcast_to(x, (DRAWS, x.size))
    codes = jax.jit(lambda x: numerics.round_to_qtype(x, qtype, made))(tiled)
    assert codes.dtype == numerics.storage_dtype(qtype)
    rounded = np.asarray(numerics.codes_to_float(codes, qtype, jnp.float32), np.float64)
    below = grid[np.searchsorted(grid, x, "right") - 1]
    above = grid[np.minimum(np.searchsorted(grid, x, "left"), len(grid) - 1)]
    assert np.all((rounded == below) | (rounded == above))
    # A Bernoulli variable of one step; 8 random bits are off by up to 1/512 of it.
    step = np.maximum(above - below, np.abs(x) * 1e-6)
    share = np.clip((x - below) / step, 0, 1)
    error = 4.5 * np.sqrt(share * (1 - share) / DRAWS) + 1e-4
    error += 1 / 512 if name == "low_bit_uniform" else 0
    assert np.all(np.abs(rounded.mean(0) - x) <= error * step)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("qtype", ["int4", "int1", "float8_e4m3fn", "nf4"])
def test_values_beyond_the_ends_saturate_and_nan_is_what_it_is_without_noise(qtype):
    x = jnp.array([1e9, -1e9, jnp.inf, -jnp.inf, jnp.nan])
    nearest = numerics.round_to_qtype(x, qtype)
    got = numerics.round_to_qtype(x, qtype, lambda shape: jnp.full(shape, 0.2))
    np.testing.assert_array_equal(got.astype(jnp.float32), nearest.astype(jnp.float32))


@pytest.mark.slow
def test_noise_without_noise_is_rounding_to_nearest():
    x = jax.random.normal(jax.random.key(0), (2000,)) * 10
    for qtype in ("int4", "float8_e4m3fn", "float8_e5m2"):
        np.testing.assert_array_equal(
            numerics.round_to_qtype(x, qtype, jnp.zeros).astype(jnp.float32),
            numerics.round_to_qtype(x, qtype).astype(jnp.float32),
        )


def test_noise_along_some_axes_is_shared_along_the_others():
    made = noise.noise_fn("uniform", jax.random.key(0), (0, -1))
    assert made((3, 4, 5)).shape == (3, 1, 5)
    assert made(()).shape == ()
    # Axes of a convolution's gradient do not wrap around in that of a matrix product.
    assert noise.noise_fn("uniform", jax.random.key(0), (0, 3))((3, 4)).shape == (3, 1)
    assert noise.noise_fn("uniform", jax.random.key(0))((3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match="Unknown noise 'gauss'; choose from uniform"):
        noise.noise_fn("gauss", jax.random.key(0))


def test_the_key_of_data_depends_on_every_element_and_on_no_sharding():
    base = jax.random.key(3)
    data = jax.random.normal(jax.random.key(1), (16, 8))
    of = jax.jit(functools.partial(noise.key_of_data, base))
    keys = [of(data), of(data.at[3, 2].multiply(1.0001)), of(-data), of(data * 2)]
    bits = {tuple(np.asarray(jax.random.key_data(key))) for key in keys}
    assert len(bits) == len(keys)
    mesh = jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(data, NamedSharding(mesh, PartitionSpec("d")))
    assert of(sharded) == of(data)

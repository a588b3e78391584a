"""Stochastic rounding: neighbors, mean, exactness, and what float32 params get."""

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import P
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding

from qwix_train import optim
from tests import models


def neighbors(x):
    """The bfloat16 values at and below, and above, each of some float64 values."""
    nearest = x.astype(ml_dtypes.bfloat16)
    up, down = ml_dtypes.bfloat16(np.inf), ml_dtypes.bfloat16(-np.inf)
    is_above = nearest.astype(np.float64) > x
    below = np.where(is_above, np.nextafter(nearest, down), nearest)
    below = below.astype(ml_dtypes.bfloat16)
    return below.astype(np.float64), np.nextafter(below, up).astype(np.float64)


def rounded(params, updates, seed=0):
    """What the params become when updates are added."""
    tx = optim.stochastic_rounding(optax.identity(), seed)
    updates, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


def test_the_mean_is_the_sum():
    # Small steps up and down, across the end of a binade, through 0, and to 0.
    params = np.array([1.0, -1.0, 1.0, 2.0, 0.01, -3.0, 0.0, 1e-20, 1.0])
    updates = np.array([1e-3, 1e-3, -1e-3, -3e-3, -0.0137, 1.234, 1e-5, 3e-23, -1.0])
    count = 20_000
    low = jnp.broadcast_to(jnp.asarray(params, jnp.bfloat16), (count, len(params)))
    steps = jnp.broadcast_to(jnp.asarray(updates, jnp.float32), low.shape)
    result = np.asarray(rounded(low, steps)).astype(np.float64)

    sums = (np.asarray(low[0], np.float32) + np.asarray(steps[0])).astype(np.float64)
    below, above = neighbors(sums)
    assert ((result == below) | (result == above)).all()
    share = (sums - below) / (above - below)
    assert ((share > 0.005) & (share < 0.995)).sum() >= 6
    # Five standard deviations of the number of those that are rounded up.
    error = np.abs((result == above).mean(0) - share)
    assert (error <= 5 * np.sqrt(share * (1 - share) / count)).all()
    assert (error[share == 0] == 0).all()


def test_the_sum_with_an_update_is_exact():
    rng = np.random.default_rng(0)

    def numbers():
        signs = rng.choice([-1, 1], 100_000)
        return signs * 10 ** rng.uniform(-6, 3, 100_000)

    params = jnp.asarray(numbers(), jnp.bfloat16)
    # Some cancel all but the last bits.
    near = -np.asarray(params, np.float64) * (1 + rng.normal(size=100_000) * 1e-5)
    steps = np.where(rng.random(100_000) < 0.3, near, numbers()).astype(np.float32)
    tx = optim.stochastic_rounding(optax.identity())
    updates, _ = tx.update(jax.device_put(steps), tx.init(params), params)
    exact = np.asarray(params, np.float64) + np.asarray(updates, np.float64)
    below, above = neighbors(
        (np.asarray(params, np.float32) + steps).astype(np.float64)
    )
    added = np.asarray(optax.apply_updates(params, updates)).astype(np.float64)
    assert ((added == below) | (added == above)).all()
    np.testing.assert_allclose(added, exact, 1e-4, 1e-9)
    assert updates.dtype == jnp.float32


def test_small_steps_are_not_lost():
    def trained(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jnp.ones_like(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.full(512, 2.0, jnp.bfloat16)
        loop = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 1000)[0][0])
        return np.asarray(loop(params)).astype(np.float64)

    tx = optax.sgd(0.001)
    np.testing.assert_array_equal(trained(tx), 2.0)
    result = trained(optim.stochastic_rounding(tx))
    # The variance of a step is at most that of a step of 1/128, up or not.
    spread = np.sqrt(1000 * 0.001 / 128)
    assert abs(result.mean() - 1.0) < 5 * spread / np.sqrt(512)
    assert 0 < result.std() < 1.2 * spread


def test_moments_are_float32():
    rng = np.random.default_rng(0)
    params = jax.device_put(rng.normal(size=64).astype(jnp.bfloat16))
    grads = jax.device_put(rng.normal(size=64).astype(jnp.bfloat16))
    tx = optim.stochastic_rounding(optax.adam(0.1))
    _, state = tx.update(grads, tx.init(params), params)
    wide = grads.astype(jnp.float32)
    inner = optax.adam(0.1)
    _, expected = inner.update(wide, inner.init(wide))
    models.assert_same(state.inner_state, expected)


def test_other_dtypes_and_zeros():
    params = {"low": jnp.linspace(-1, 1, 99, dtype=jnp.bfloat16), "high": jnp.ones(3)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    models.assert_same(rounded(params, zeros), params)
    steps = {"low": zeros["low"], "high": jnp.full(3, 1e-5)}
    models.assert_same(rounded(params, steps)["high"], params["high"] + 1e-5)
    infinite = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    result = rounded(jnp.ones(3, jnp.bfloat16), infinite)
    np.testing.assert_array_equal(np.asarray(result, np.float32), infinite)


def test_noise_is_new_for_each_param_step_and_seed():
    x = jnp.ones(256, jnp.bfloat16)
    params, steps = {"a": x, "b": x}, {"a": x * 2**-9, "b": x * 2**-9}
    first = rounded(params, steps)
    models.assert_same(rounded(params, steps), first)
    assert (first["a"] != first["b"]).any()
    models.assert_differ(rounded(params, steps, seed=1), first)
    tx = optim.stochastic_rounding(optax.identity())
    one, state = tx.update(steps, tx.init(params), params)
    two, _ = tx.update(steps, state, params)
    assert (one["a"] != two["a"]).any()


def test_the_seed_can_be_injected():
    x = jnp.ones(256, jnp.bfloat16)
    make = optax.inject_hyperparams(optim.stochastic_rounding)
    tx, expected = make(optax.sgd(1.0), 7), optim.stochastic_rounding(optax.sgd(1.0), 7)
    updates, _ = tx.update(x / 512, tx.init(x), x)
    models.assert_same(updates, expected.update(x / 512, expected.init(x), x)[0])


def test_multi_steps():
    params, grads = jnp.ones(64, jnp.bfloat16), jnp.full(64, 2.0**-9, jnp.bfloat16)
    tx = optim.stochastic_rounding(optax.sgd(1.0))
    many = optax.MultiSteps(tx, 2)
    state = many.init(params)
    skipped, state = many.update(grads, state, params)
    models.assert_same(optax.apply_updates(params, skipped), params)
    updates, _ = many.update(grads, state, params)
    models.assert_same(updates, tx.update(grads, tx.init(params), params)[0])


@pytest.mark.slow
def test_sharded():
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    params = jnp.ones((16, 32), jnp.bfloat16)
    steps = jnp.full(params.shape, 2.0**-9)
    sharded = jax.device_put((params, steps), NamedSharding(mesh, P("model")))
    models.assert_same(rounded(*sharded), rounded(params, steps))


def test_errors():
    tx = optim.stochastic_rounding(optax.sgd(1.0))
    with pytest.raises(ValueError, match="the param 'a/kernel' is float16"):
        tx.init({"a": {"kernel": jnp.ones(2, jnp.float16)}})
    with pytest.raises(ValueError, match="all of these are float32, such as 'a/k"):
        tx.init({"a": {"kernel": jnp.ones(2)}, "b": jnp.ones(2)})
    params = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="stochastic_rounding needs the params"):
        tx.update(params, tx.init(params))

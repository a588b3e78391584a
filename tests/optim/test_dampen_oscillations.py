"""The dampening loss against NumPy; the toy problem of the paper settles with it."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from qwix_train import optim
from qwix_train.core.fake_quant import fake_quant
from qwix_train.core.how import HowToQuantize
from tests import models
from tests.optim import oscillating


def loss(w, frozen, name):
    """The dampening loss of section 4.2, with its constants from other params."""
    scale, zero, _, _ = oscillating.grid(frozen, name)
    target = scale * oscillating.levels(frozen, scale, zero)
    low, high = scale * (-4 - zero), scale * (3 - zero)
    return np.sum((target - np.clip(w, low, high)) ** 2)


@pytest.mark.parametrize("name", oscillating.HOWS)
def test_is_the_gradient_of_the_loss(name):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(9, 4)) * 2.5
    g = rng.normal(size=(9, 4))
    tx = optim.dampen_oscillations({"w": oscillating.HOWS[name]}, 0.3)
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.ones(3)}
    updates = {"w": jnp.asarray(g, jnp.float32), "b": jnp.ones(3)}
    result, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    models.assert_same(result["b"], updates["b"])

    expected = g.copy()
    for index in np.ndindex(*w.shape):
        step = np.zeros_like(w)
        step[index] = 1e-6
        slope = (loss(w + step, w, name) - loss(w - step, w, name)) / 2e-6
        expected[index] += 0.3 * slope
    np.testing.assert_allclose(result["w"], expected, 1e-4, 1e-4)


@pytest.mark.parametrize("qtype", ["nf4", "float8_e4m3fn", "int1"])
def test_other_types(qtype):
    how = HowToQuantize(qtype=qtype, channelwise_axes=[0])
    w = jax.device_put(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    tx = optim.dampen_oscillations({"": how}, 0.5)
    result, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    expected = w - fake_quant(w, how)
    if qtype == "int1":  # Its levels are half of the largest magnitude.
        inside = jnp.abs(w) <= jnp.abs(w).max(1, keepdims=True) / 2
        expected = jnp.where(inside, expected, 0)
    models.assert_close(result, expected)
    assert (jnp.abs(result) > 1e-3).any()


def test_tiles():
    how = HowToQuantize(qtype="int4", channelwise_axes=[1], tiled_axes={0: 4})
    w = jax.device_put(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))
    tx = optim.dampen_oscillations({"": how}, 0.5)
    result, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    columns = dataclasses.replace(how, tiled_axes={})
    tx = optim.dampen_oscillations({"": columns}, 0.5)
    for tile, found in zip(jnp.split(w, 2), jnp.split(result, 2), strict=True):
        expected, _ = tx.update(jnp.zeros_like(tile), tx.init(tile), tile)
        models.assert_close(found, expected)


def test_schedules():
    how = oscillating.HOWS["fixed"]
    w, zeros = jnp.array([0.25, 1.0]), jnp.zeros(2)
    make, found = optim.dampen_oscillations, []
    for tx in (
        make({"": how}, lambda count: 0.5 * count),
        optax.inject_hyperparams(make)({"": how}, lambda count: 0.5 * count),
    ):
        state = tx.init(w)
        for _ in range(3):
            updates, state = tx.update(zeros, state, w)
            found.append(updates.tolist())
    assert found == [[0, 0], [0.25, 0], [0.5, 0]] * 2


def test_weights_settle_on_the_nearest_level():
    sgd = optax.sgd(0.02)
    before, _ = oscillating.trained(sgd)
    # A weight at a threshold is pulled by at most 0.6, and a level that is nearest is
    # at most 0.5 from the optimum.
    dampen = optim.dampen_oscillations(
        {"": oscillating.HOWS["fixed"]}, optax.linear_schedule(0.0, 0.6, 500)
    )
    after, _ = oscillating.trained(optax.chain(dampen, sgd))
    assert oscillating.oscillating(before).mean() > 0.9
    assert not oscillating.oscillating(after).any()
    np.testing.assert_array_equal(after[-1], np.rint(oscillating.TARGETS))


def test_errors():
    how = oscillating.HOWS["fixed"]
    for value in -1.0, float("nan"):
        with pytest.raises(ValueError, match="coefficient=.*must not be negative"):
            optim.dampen_oscillations({"": how}, value)
    with pytest.raises(ValueError, match="coefficient=inf.*must be finite"):
        optim.dampen_oscillations({"": how}, float("inf"))
    with pytest.raises(TypeError, match="coefficient='cosine'.*a number, or a sched"):
        optim.dampen_oscillations({"": how}, "cosine")
    tx = optim.dampen_oscillations({"": how}, 0.1)
    with pytest.raises(ValueError, match="dampen_oscillations needs the params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

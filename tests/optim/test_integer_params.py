"""Stochastic rounding of params in integers: mean, ranges, quantized models."""

import jax
import numpy as np
import optax
import pytest
from jax import P
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding

import qwix_train
from qwix_train import QArray, dequantize, optim, quantize
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import WithAux
from tests import models


def rounded(params, updates, seed=0):
    """What the params become when updates are added."""
    tx = optim.stochastic_rounding(optax.identity(), seed)
    updates, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    return jax.jit(optax.apply_updates)(params, updates)


def test_the_mean_is_the_sum():
    # Small steps and large ones, up and down, through 0, to a level and to the ends.
    codes = np.array([0, 1, -1, 5, 100, -128, 126, 3, -3])
    steps = np.array([1e-3, -0.3, 1.5, 10.25, -0.999, 0.01, 0.9, -3.0, 2.5])
    count, scale = 20_000, 0.25
    param = QArray(
        jnp.broadcast_to(jnp.asarray(codes, jnp.int8), (count, len(codes))),
        jnp.full((1, 1), scale),
    )
    updates = jnp.broadcast_to(jnp.asarray(steps * scale, jnp.float32), param.shape)
    result = rounded(param, updates)
    assert result.qvalue.dtype == jnp.int8
    models.assert_same(result.scale, param.scale)

    found = np.asarray(result.qvalue).astype(int)
    exact = codes + (steps * scale).astype(np.float32).astype(np.float64) / scale
    below = np.floor(exact).astype(int)
    share = exact - below
    assert ((found == below) | (found == below + 1)).all()
    error = np.abs((found > below).mean(0) - share)
    # Five standard deviations of the number of those that are rounded up.
    assert (error <= 5 * np.sqrt(share * (1 - share) / count)).all()
    assert ((share > 0.005) & (share < 0.995)).sum() >= 6


@pytest.mark.thinned(3)
@pytest.mark.parametrize("qtype", ["int8", "int4", "int3"])
def test_a_range_grows_where_sums_leave_it(qtype):
    how = HowToQuantize(qtype=qtype, channelwise_axes=[1], tiled_axes={0: 1000})
    high = {"int8": 127, "int4": 7, "int3": 3}[qtype]
    codes = np.tile([[high, -high, 1]], (2000, 1))
    scale = np.full((2, 3), 0.5)
    array = QArray(
        jnp.asarray(codes, jnp.int8 if qtype == "int8" else jnp.int4),
        jnp.asarray(scale, jnp.float32),
        qtype=qtype,
    )
    steps = np.full(codes.shape, 0.2)
    steps[0] = 50.0  # Of one element of the first tiles.
    steps[:, 1] *= -1
    param = WithAux(array, how)
    result = rounded(param, jnp.asarray(steps, jnp.float32))
    assert result.how == how
    exact = codes * 0.5 + steps
    needed = np.where(exact > 0, exact / high, exact / -(high + 1))
    expected = np.maximum(needed.reshape(2, 1000, 3).max(1), scale)
    np.testing.assert_allclose(result.array.scale, expected, 1e-5)
    values = np.asarray(dequantize(result.array))
    wide = np.repeat(expected, 1000, 0)
    assert (np.abs(values - exact) <= wide * 1.001).all()
    error = (values - exact).reshape(2, 1000, 3).mean(1)
    assert (np.abs(error) <= 5 * 0.5 * expected / np.sqrt(1000)).all()


@pytest.mark.slow
def test_codes_without_an_update_stay():
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    )
    params = {
        "a": quantize(x, "int8"),
        "b": quantize(x, "int5", channelwise_axes=[0], scale_dtype=jnp.bfloat16),
        "c": quantize(x, "int4", tiled_axes={1: 16}),
    }
    models.assert_same(rounded(params, dict.fromkeys("abc", 0 * x)), params)


def test_small_steps_are_not_lost():
    target = jax.device_put(
        np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    )
    param = quantize(target + 0.5, "int8", channelwise_axes=[1])
    step = float(param.scale.max())
    tx = optim.stochastic_rounding(optax.sgd(0.01))

    def train(carry, _):
        param, state = carry
        grads = dequantize(param) - target
        updates, state = tx.update(grads, state, param)
        return (optax.apply_updates(param, updates), state), None

    loop = jax.jit(lambda p: jax.lax.scan(train, (p, tx.init(p)), None, 1000)[0][0])
    off = np.asarray(dequantize(loop(param)) - target)
    # An update of a hundredth of half of 1 is a fraction of a step, to nearest none.
    assert 0.01 * 0.5 < step / 2
    assert abs(off.mean()) < 0.01
    assert off.std() < 2 * step


def test_what_is_wrapped_sees_floats():
    rng = np.random.default_rng(0)
    x, g = (
        jax.device_put(rng.normal(size=(16, 8)).astype(np.float32)) for _ in range(2)
    )
    params = {"kernel": quantize(x, "int8"), "bias": jnp.ones(8)}
    grads = {"kernel": g, "bias": jnp.ones(8)}
    inner = optax.adamw(0.1, weight_decay=0.1)
    tx = optim.stochastic_rounding(inner)
    updates, state = tx.update(grads, tx.init(params), params)
    floats = {"kernel": dequantize(params["kernel"]), "bias": params["bias"]}
    expected, inner_state = inner.update(grads, inner.init(floats), floats)
    models.assert_same(state.inner_state, inner_state)
    models.assert_same(updates["bias"], expected["bias"])
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    moved = dequantize(optax.apply_updates(params, updates)["kernel"])
    sums = floats["kernel"] + expected["kernel"]
    assert jnp.abs(moved - sums).max() <= params["kernel"].scale.max() * 1.01


@pytest.mark.slow
def test_a_quantized_model_is_trained():
    rules = [models.rule("int8")]
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(32, 12)).astype(np.float32)
    )
    y = jnp.tanh(x[:, :3])
    model = models.Mlp()
    floats = jax.jit(model.init)(jax.random.key(0), x)["params"]
    _, params = qwix_train.ptq.quantize(model, floats, rules, x)
    assert any(isinstance(p, WithAux) for p in params["Dense_0"].values())

    def is_quantized(node):
        return isinstance(node, WithAux)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    def values(params):
        return jax.tree.map(
            lambda p: dequantize(p.array) if is_quantized(p) else p,
            params,
            is_leaf=is_quantized,
        )

    tx = optim.stochastic_rounding(optax.adam(3e-3))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(values(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), loss(values(params))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    for _ in range(200):
        params, state = step(params, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == shapes
    assert loss(values(params)) < 0.1 * first


@pytest.mark.slow
def test_sharded():
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    )
    param, updates = quantize(x, "int8", channelwise_axes=[0]), 0.01 * x
    sharded = jax.device_put((param, updates), NamedSharding(mesh, P("model")))
    models.assert_same(rounded(*sharded), rounded(param, updates))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_costs_one_element_its_step(bad):
    param = quantize(jnp.ones((2, 4)), "int8", channelwise_axes=[0])
    # Whole steps, so that there is nothing to round.
    step = np.float32(-3) * np.asarray(param.scale)
    updates = np.broadcast_to(step, (2, 4)).copy()
    updates[0, 1] = bad
    result = rounded(param, jax.device_put(updates))
    models.assert_same(result.scale, param.scale)
    expected = np.asarray(param.qvalue).astype(int) - 3
    expected[0, 1] += 3
    np.testing.assert_array_equal(result.qvalue, expected)


def test_errors():
    tx = optim.stochastic_rounding(optax.sgd(1.0))
    x = jnp.ones((2, 2))
    for param, reason in (
        (quantize(x, "nf4"), "is of type nf4"),
        (quantize(x, "int1"), "is of type int1"),
        (quantize(x, "int8", calibration_method="minmax"), "has zero points"),
    ):
        with pytest.raises(ValueError, match=f"the param 'a/w' {reason}, and it round"):
            tx.init({"a": {"w": param}})
    params = {"a": quantize(x, "int8")}
    with pytest.raises(TypeError, match="the gradient of 'a' is a QArray. Integers"):
        tx.update(params, tx.init(params), params)

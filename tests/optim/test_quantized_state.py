"""8-bit Adam and Lion against NumPy in float64; bytes, shardings and errors."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax import P
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding

from qwix_train import optim
from tests import models
from tests.optim.test_dynamic_map import reference

SHAPE, BLOCK = (8, 32), 16
MAPS = {True: reference(signed=True), False: reference(signed=False)}


def rounded(moment):
    """A moment in blocks of the last axis, each value rounded to the nearest."""
    result = []
    for block in moment.reshape(-1, BLOCK):
        values = MAPS[bool(block.min() < 0)]
        scale = max(block.max(), block.min() / values[0] if block.min() < 0 else 0)
        places = np.abs(block[:, None] / scale - values).argmin(1)
        if block.min() >= 0:
            places = np.where(block > 0, np.maximum(places, 1), places)
        result.append(values[places] * scale)
    return np.stack(result).reshape(moment.shape)


def adam_by_hand(params, grads, b1=0.9, b2=0.999, eps=1e-8, rate=0.01):
    mu, nu = np.zeros_like(params), np.zeros_like(params)
    for t, g in enumerate(grads, 1):
        mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g**2
        update = mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps)
        params = params - rate * update
        mu, nu = rounded(mu), rounded(nu)
    return params


def lion_by_hand(params, grads, b1=0.9, b2=0.99, rate=0.01, decay=1e-3):
    mu = np.zeros_like(params)
    for g in grads:
        update = np.sign(b1 * mu + (1 - b1) * g) + decay * params
        mu = rounded(b2 * mu + (1 - b2) * g)
        params = params - rate * update
    return params


@pytest.mark.parametrize(
    "tx, by_hand",
    [(optax.adam(0.01), adam_by_hand), (optax.lion(0.01), lion_by_hand)],
    ids=["adam", "lion"],
)
def test_steps_by_hand(tx, by_hand):
    rng = np.random.default_rng(0)
    params = rng.normal(size=SHAPE)
    # Gradients of which some are far smaller than others of their block.
    grads = rng.normal(size=(5, *SHAPE)) * 10 ** rng.uniform(-5, 0, SHAPE)
    tx = optim.quantized_state(tx, block_size=BLOCK, min_size=1)
    x, update = jnp.asarray(params, jnp.float32), jax.jit(tx.update)
    state = tx.init(x)
    for g in grads:
        updates, state = update(jnp.asarray(g, jnp.float32), state, x)
        x = optax.apply_updates(x, updates)
    error = np.abs(np.asarray(x) - by_hand(params, grads))
    # A tie between two codes, as float32 sees it, may be broken the other way.
    assert np.mean(error < 1e-6) > 0.99
    assert error.max() < 0.02


@pytest.mark.parametrize("make", [optax.adam, optax.lion])
@pytest.mark.parametrize("qtype", ["dynamic", "int8"])
def test_bytes(make, qtype):
    params = {"kernel": jnp.zeros((512, 768)), "head": jnp.zeros((768, 10))}
    tx = make(1e-3)

    def size(tx):
        leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
        return sum(x.size * x.dtype.itemsize for x in leaves if x.ndim)

    assert size(optim.quantized_state(tx, qtype)) <= 0.3 * size(tx)


@pytest.mark.slow
def test_what_is_small_is_as_it_was():
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(4095)}
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    tx, inner = optim.quantized_state(optax.adam(0.1)), optax.adam(0.1)
    state, float_state = tx.init(params), inner.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state)
        expected, float_state = inner.update(grads, float_state)
    models.assert_same(updates["bias"], expected["bias"])
    adam, (float_adam, _) = state.inner_state[0], float_state
    models.assert_same(adam.nu["bias"], float_adam.nu["bias"])
    models.assert_same(adam.count, float_adam.count)
    assert adam.nu["kernel"].dtype == jnp.uint8
    # A scalar is no moment, however small a moment may be.
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    state = optim.quantized_state(tx, min_size=1).init(params)
    assert state.inner_state.hyperparams["learning_rate"].dtype == jnp.float32


@pytest.mark.slow
def test_moments_keep_their_dtype():
    params = jnp.ones((64, 64), jnp.bfloat16)
    tx = optim.quantized_state(optax.adam(0.1, mu_dtype=jnp.float32))
    state = tx.init(params)
    # Optax makes this second moment float32 in its first update.
    _, state = tx.update(jnp.ones((64, 64)), state, params)
    adam = state.scales[0]
    assert (adam.mu.dtype, adam.nu.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize(
    "axis_type",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
)
@pytest.mark.parametrize("spec", [P(None, "model"), P("model", None)])
def test_shards_are_quantized_where_they_are(spec, axis_type):
    mesh = jax.make_mesh((8,), ("model",), (axis_type,))
    sharding = NamedSharding(mesh, spec)
    params = jax.device_put(jnp.ones((16, 2048)), sharding)
    tx = optim.quantized_state(optax.adam(0.1))
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        step = jax.jit(tx.update).lower(params, state, params).compile()
        _, state = step(params, state, params)
    assert "all-gather" not in step.as_text()
    assert "all-reduce" not in step.as_text()
    for tree in state.inner_state[0], state.scales[0]:
        assert tree.mu.sharding.is_equivalent_to(sharding, 2)
        assert tree.nu.sharding.is_equivalent_to(sharding, 2)


def test_the_compiler_does_not_compute_the_codes_of_zeros():
    # It would take half a minute for a matrix of 1024 x 4096.
    init = jax.jit(optim.quantized_state(optax.adam(0.1)).init)
    text = init.lower(jnp.ones((64, 64))).compile().as_text()
    assert " reduce(" in text


@pytest.mark.parametrize("qtype", ["dynamic", "int8"])
@pytest.mark.parametrize("tx", [optax.adam(0.01), optax.lion(0.01)])
def test_an_enormous_gradient_does_not_make_nan(tx, qtype):
    # Its square overflows in Adam's second moment.
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(6, *SHAPE)).astype(np.float32)
    grads[2, 0, 3] = 1e20
    ours = optim.quantized_state(tx, qtype, block_size=BLOCK, min_size=1)

    def trained(grads):
        params = jnp.zeros(SHAPE)
        state = ours.init(params)
        for gradient in grads:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params), state

    update = jax.jit(ours.update)
    params, state = trained(grads)
    for x in jax.tree.leaves((params, state)):
        assert np.isfinite(x).all()
    grads[2, 0, 3] = 0
    undisturbed, _ = trained(grads)
    # One block is disturbed: the first sixteen elements.
    models.assert_same(params.ravel()[BLOCK:], undisturbed.ravel()[BLOCK:])
    assert np.abs(params).max() < 0.1


@pytest.mark.parametrize("enormous", [1e8, 1e20])
def test_params_next_to_that_of_an_enormous_gradient_train_on(enormous):
    """On a quadratic, as those do that float Adam trains."""
    target = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)

    def distance(tx):
        def step(carry, i):
            params, state = carry
            grads = params - target
            grads = jnp.where(i == 5, grads.at[0, 7].set(enormous), grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def train(params):
            return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(506))[0][0]

        off = np.abs(train(jnp.zeros_like(target)) - target)[0]
        return np.delete(off, 7).mean()

    adam = optax.adam(0.01)
    assert distance(adam) < 0.01
    # 0.68 of 0.68 at first for 1e8, and 33 for 1e20, where moments became 0.
    assert distance(optim.quantized_state(adam, min_size=1)) < 0.02


def test_what_cannot_be_wrapped():
    for make in (
        optim.quantized_state,
        optim.stochastic_rounding,
        optim.lora_plus,
        functools.partial(optim.selective_transform, freeze=".*"),
    ):
        with pytest.raises(TypeError, match=r"\(0.001\): expected a transformation of"):
            make(1e-3)


def test_errors():
    with pytest.raises(ValueError, match="qtype='int4'.: choose from dynamic, int8"):
        optim.quantized_state(optax.adam(0.1), "int4")
    for value in 0, -1, 2.5:
        with pytest.raises(ValueError, match="block_size=.*must be a positive int"):
            optim.quantized_state(optax.adam(0.1), block_size=value)
    params = jnp.ones((64, 64))
    injected = optax.inject_hyperparams(optim.quantized_state)(optax.adam(0.1))
    with pytest.raises(ValueError, match="list it in static_args"):
        jax.jit(injected.init)(params)

    tx = optim.quantized_state(optax.adam(0.1))
    with pytest.raises(TypeError, match="the state of another transformation, a tuple"):
        tx.update(params, optax.adam(0.1).init(params))
    for other in {"qtype": "int8"}, {"block_size": 64}:
        state = optim.quantized_state(optax.adam(0.1), **other).init(params)
        with pytest.raises(ValueError, match="the qtype and the block_size that the"):
            tx.update(params, state)

"""Iterative freezing against NumPy, step by step; the toy problem of the paper."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import qwix_train
from qwix_train import optim
from qwix_train.core.how import HowToQuantize
from tests import models
from tests.optim import oscillating


class ByHand:
    """Algorithm 1 of arXiv 2203.11086, in float64."""

    def __init__(self, w, name, momentum):
        self.w, self.name, self.momentum = w, name, momentum
        scale, zero, _, _ = oscillating.grid(w, name)
        self.level = oscillating.levels(w, scale, zero)
        self.average = self.level.copy()
        self.frequency = np.zeros_like(w)
        self.direction = np.zeros_like(w)
        self.frozen = np.zeros(w.shape, bool)

    def step(self, update, threshold):
        w = np.where(self.frozen, self.w, self.w + update)
        scale, zero, low, high = oscillating.grid(w, self.name)
        reached = oscillating.levels(w, scale, zero)
        moved = np.zeros(w.shape, bool)
        for i in np.ndindex(*w.shape):
            m = self.momentum
            now = self.level[i] if self.frozen[i] else reached[i]
            change = now - self.level[i]
            oscillated = change != 0 and np.sign(change) == -self.direction[i]
            self.frequency[i] = m * oscillated + (1 - m) * self.frequency[i]
            if change != 0:
                self.direction[i] = np.sign(change)
            if self.frequency[i] > threshold and not self.frozen[i]:
                self.frozen[i] = True
                column = np.broadcast_to(zero, w.shape)[i]
                now = np.clip(np.rint(self.average[i] + column), -4, 3) - column
            self.level[i] = now
            self.average[i] = m * now + (1 - m) * self.average[i]
            moved[i] = self.frozen[i] and now != reached[i]
        moved &= (w != low) & (w != high)
        self.w = np.where(moved, np.clip(self.level * scale, low, high), w)


def held(state, level, frozen):
    """A state with weights that are frozen at levels, none of which changed before."""
    status = level * 8 + jnp.where(frozen, 4, 0) + 1
    return state._replace(status=status.astype(jnp.int16))


@pytest.mark.parametrize("name", oscillating.HOWS)
def test_steps_by_hand(name):
    rng = np.random.default_rng(0)
    momentum, thresholds = 0.2, np.linspace(0.5, 0.15, 40)
    by_hand = ByHand(rng.normal(size=(12, 4)) * 1.5, name, momentum)
    tx = optim.freeze_oscillations(
        {"w": oscillating.HOWS[name]},
        lambda count: jnp.asarray(thresholds, jnp.float32)[count],
        momentum,
    )
    params = {"w": jnp.asarray(by_hand.w, jnp.float32), "b": jnp.ones(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    assert state.status["w"].dtype == jnp.int16
    for threshold in thresholds:
        step = rng.normal(size=(12, 4)) * 0.5
        by_hand.step(step, threshold)
        updates = {"w": jnp.asarray(step, jnp.float32), "b": jnp.ones(3)}
        updates, state = update(updates, state, params)
        assert (updates["b"] == 1).all()
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], by_hand.w, 1e-4, 1e-4)
        np.testing.assert_array_equal(state.level["w"], by_hand.level)
        np.testing.assert_array_equal(state.direction["w"], by_hand.direction)
        np.testing.assert_array_equal(state.frozen["w"], by_hand.frozen)
        np.testing.assert_allclose(state.frequency["w"], by_hand.frequency, 1e-5)
        np.testing.assert_allclose(state.average["w"], by_hand.average, 1e-5, 1e-5)
    assert 0.2 < by_hand.frozen.mean() < 1


def test_weights_settle_where_they_were_most_of_the_time():
    sgd = optax.sgd(0.02)
    before, _ = oscillating.trained(sgd)
    # Not before weights and averages have arrived where they oscillate.
    threshold = optax.linear_schedule(1.0, 0.02, 700, transition_begin=500)
    freeze = optim.freeze_oscillations({"": oscillating.HOWS["fixed"]}, threshold)
    after, state = oscillating.trained(optax.chain(sgd, freeze))
    assert oscillating.oscillating(before).mean() > 0.9
    assert oscillating.oscillating(after).mean() < 0.1
    assert state[-1].frozen.mean() > 0.9
    distance = np.abs(after[-1] - np.asarray(oscillating.TARGETS))
    assert (distance < 0.6).mean() > 0.95


def test_the_largest_magnitude_stays():
    how = HowToQuantize(qtype="int4", channelwise_axes=[0])
    params = jnp.array([[1.0, -0.9, 0.2], [-2.0, 0.3, 0.5]])
    tx = optim.freeze_oscillations({"": how}, 0.0, momentum=1.0)
    # All are frozen, most of them at other levels than those where they are.
    state = held(tx.init(params), jnp.array([[5, -6, 2], [-7, 3, -8]]), True)
    assert state.frozen.all()
    for _ in range(5):
        updates, state = tx.update(jnp.ones_like(params), state, params)
        params = optax.apply_updates(params, updates)
    scale = np.array([[1.0], [2.0]]) / 7.5
    expected = [[7.5, -6, 2], [-7.5, 3, -7.5]] * scale
    np.testing.assert_allclose(params, expected, 1e-6)


@pytest.mark.slow
def test_frozen_levels_are_what_ptq_stores():
    rules = [models.rule("int4")]
    x = jax.device_put(np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32))
    model = models.Mlp()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    plan = qwix_train.plan(model, rules, x)
    tx = optax.chain(optax.sgd(1.0), optim.freeze_oscillations(plan, 0.3, momentum=0.2))
    state, update = tx.init(params), jax.jit(tx.update)
    for seed in range(30):
        keys = iter(jax.random.split(jax.random.key(seed), 20))
        grads = jax.tree.map(
            lambda p, keys=keys: 0.05 * jax.random.normal(next(keys), p.shape), params
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    ptq = qwix_train.quantize_model(model, qwix_train.PtqProvider(rules))
    abstract = jax.eval_shape(ptq.init, jax.random.key(0), x)["params"]
    stored = qwix_train.quantize_params(params, abstract)
    checked = 0
    for path, param in plan.params.items():
        if param.how is None:
            continue
        leaf, array, frozen, level = params, stored, state[-1].frozen, state[-1].level
        for name in path:
            leaf, array, frozen, level = (t[name] for t in (leaf, array, frozen, level))
        # The largest magnitude of a group keeps its value, whatever its level.
        axes = [a for a in range(leaf.ndim) if a not in param.how.channelwise_axes]
        largest = jnp.abs(leaf) == jnp.abs(leaf).max(axes, keepdims=True)
        counts = np.asarray(frozen & ~largest)
        codes = np.asarray(array.array.qvalue, np.int8)
        np.testing.assert_array_equal(codes[counts], np.asarray(level)[counts])
        checked += counts.sum()
    assert checked > 50


@pytest.mark.slow
def test_params_in_bfloat16():
    params = jax.device_put(
        np.random.default_rng(0).normal(size=(8, 8)).astype(jnp.bfloat16)
    )
    rounding = optim.stochastic_rounding(optax.sgd(0.1))
    freeze = optim.freeze_oscillations({"": oscillating.HOWS["fixed"]}, 0.1)
    tx = optax.chain(rounding, freeze)
    state, alone = tx.init(params), rounding.init(params)
    frozen = jnp.arange(64).reshape(8, 8) % 2 == 0
    state = (state[0], held(state[1], state[1].level, frozen))
    models.assert_same(state[1].frozen, frozen)
    grads = jnp.ones_like(params)
    updates, state = tx.update(grads, state, params)
    expected, _ = rounding.update(grads, alone, params)
    assert updates.dtype == jnp.float32
    models.assert_same(updates, jnp.where(frozen, 0, expected))


def test_hyperparams_can_be_injected():
    how = oscillating.HOWS["fixed"]
    w = jnp.array([0.4, 1.4])
    tx = optax.inject_hyperparams(optim.freeze_oscillations)({"": how}, 0.4, 0.5)
    plain = optim.freeze_oscillations({"": how}, 0.4, 0.5)
    state, plain_state = tx.init(w), plain.init(w)
    for step in 0.2, -0.2, 0.2:
        updates, state = tx.update(jnp.full(2, step), state, w)
        expected, plain_state = plain.update(jnp.full(2, step), plain_state, w)
        models.assert_same(updates, expected)
        w = optax.apply_updates(w, updates)
    assert plain_state.frozen.all()


def test_errors():
    how = oscillating.HOWS["fixed"]
    for value in -1.0, float("nan"):
        with pytest.raises(ValueError, match="threshold=.*must not be negative"):
            optim.freeze_oscillations({"": how}, value)
    with pytest.raises(TypeError, match="threshold=None.*a number, or a schedule"):
        optim.freeze_oscillations({"": how}, None)
    for value in 0.0, 1.5, float("nan"):
        with pytest.raises(ValueError, match="momentum=.*must be positive, and at"):
            optim.freeze_oscillations({"": how}, 0.1, value)
    with pytest.raises(ValueError, match="'a.*' is quantized to nf4, and only integer"):
        optim.freeze_oscillations({"a.*": HowToQuantize(qtype="nf4")}, 0.1)
    tx = optim.freeze_oscillations({"": how}, 0.1)
    with pytest.raises(ValueError, match="freeze_oscillations needs the params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

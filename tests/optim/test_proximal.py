"""Proximal methods against NumPy, and that params end on the grid that is exported."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from qwix_train import dequantize, optim
from qwix_train.core import numerics, qarray
from qwix_train.core.how import HowToQuantize
from tests import models
from tests.optim import oscillating

METHODS = ("proxquant", "parq")


class ByHand:
    """The updates of arXiv 1810.00861 and arXiv 2503.15748, in float64."""

    def __init__(self, w, name, method, period):
        self.w = self.latent = w
        self.name, self.method, self.period = name, method, period
        self.count, self.strength, self.grid = 0, 0, None

    def step(self, update, strength):
        is_latent = self.method == "parq"
        start, before = self.w, self.latent if is_latent else self.w
        due = is_latent and self.strength < 1 and self.count % self.period == 0
        if strength > 0 and (self.grid is None or due):
            self.grid = oscillating.grid(before, self.name)[:2]
        self.count, self.strength = self.count + 1, strength
        z = self.w = self.latent = before + update
        if strength == 0:
            return
        scale, zero = self.grid
        # All levels, and for each weight the two that it lies between.
        levels = scale * (np.arange(-4, 4)[:, None, None] - zero)
        if is_latent:
            z = np.clip(z, levels[0], levels[-1])
        nearest = scale * oscillating.levels(z, scale, zero)
        if strength == 1:
            # By one level at most, and to the grid before that.
            there = scale * oscillating.levels(start, scale, zero)
            most = scale * np.isclose(start, there, 1e-3, 1e-3)
            self.w = np.clip(nearest, there - most, there + most)
        elif is_latent:
            # The form of the paper's code: about the center of two levels.
            below = np.max(np.where(levels <= z, levels, levels[0]), 0)
            above = np.min(np.where(levels >= z, levels, levels[-1]), 0)
            center = (below + above) / 2
            self.w = np.clip(center + (z - center) / (1 - strength), below, above)
        else:
            distance = np.abs(z - nearest)
            shrunk = np.maximum(distance - strength * scale / 2, 0)
            self.w = nearest + np.sign(z - nearest) * shrunk


def params_and_updates(seed=0, size=0.05):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(16, 4)) * 1.5
    return w, (rng.normal(size=(16, 4)) * size for _ in iter(int, 1))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", oscillating.HOWS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_by_hand(method, name):
    w, steps = params_and_updates()
    by_hand = ByHand(w, name, method, period=3)
    strengths = [0, 0, *np.linspace(0.1, 0.9, 9), 1, 1, 1]
    tx = optim.proximal(
        {"w": oscillating.HOWS[name]},
        lambda count: jnp.asarray(strengths, jnp.float32)[count],
        method,
        calibration_period=3,
    )
    params = {"w": jnp.asarray(w, jnp.float32), "b": jnp.ones(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    for strength, step in zip(strengths, steps, strict=False):
        by_hand.step(step, strength)
        updates = {"w": jnp.asarray(step, jnp.float32), "b": jnp.ones(3)}
        new, state = update(updates, state, params)
        assert (new["b"] == 1).all()
        if strength == 0:
            models.assert_same(new, updates)
        params = optax.apply_updates(params, new)
        np.testing.assert_allclose(params["w"], by_hand.w, 1e-4, 1e-4)
        if method == "parq":
            np.testing.assert_allclose(state.latent["w"], by_hand.latent, 1e-5, 1e-5)
    scale = np.broadcast_to(state.scale["w"], by_hand.grid[0].shape)
    np.testing.assert_allclose(scale, by_hand.grid[0], 1e-5)


HOWS = {
    "int8 channel": HowToQuantize(qtype="int8", channelwise_axes=[1]),
    "int4 tile": HowToQuantize(qtype="int4", channelwise_axes=[1], tiled_axes={0: 16}),
    "int4 minmax": HowToQuantize(
        qtype="int4", channelwise_axes=[0], calibration_method="minmax"
    ),
    "int2 padded tile": HowToQuantize(qtype="int2", tiled_axes={0: 5}, pad_tiles=True),
    "int3 rms": HowToQuantize(qtype="int3", calibration_method="rms,1.5"),
    "int1": HowToQuantize(qtype="int1", channelwise_axes=[1]),
}


def quantized(array, state, how):
    """What export stores for a param, with the scale of its grid."""
    zero = state.zero_point
    if isinstance(zero, optax.MaskedNode):
        zero = None
    else:
        zero = zero.astype(numerics.storage_dtype(how.qtype))
    return qarray.quantize_with_scale_zero_point(array, how.qtype, state.scale, zero)


# bfloat16 does not hold all levels of int8.
CASES = [(name, jnp.float32) for name in HOWS]
CASES += [(name, jnp.bfloat16) for name in HOWS if "int8" not in name]


@pytest.mark.thinned(15)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_params_end_on_the_grid_that_is_stored(name, dtype, method):
    how = HOWS[name]
    rng = np.random.default_rng(0)
    w = jax.device_put(rng.normal(size=(64, 24)).astype(dtype))
    tx = optim.proximal({"": how}, optax.linear_schedule(0.0, 1.0, 5), method)

    @jax.jit
    def step(w, state, update):
        updates, state = tx.update(update, state, w)
        return optax.apply_updates(w, updates), state

    state, codes = tx.init(w), None
    for i in range(14):
        # After the annealing, too: also those that would jump over several levels.
        size = 0.5 if i > 8 else 0.02
        update = jnp.asarray(rng.normal(size=w.shape) * size, jnp.float32)
        w, state = step(w, state, update)
        if i < 6:
            continue
        stored = quantized(w, state, how)
        models.assert_same(dequantize(stored), w)
        if codes is not None:
            moved = np.abs(np.asarray(stored.qvalue, int) - codes).max()
            assert moved <= (2 if name == "int1" else 1)
            assert moved or i <= 8 or dtype == jnp.bfloat16
        codes = np.asarray(stored.qvalue, int)
    assert len(np.unique(codes)) > 1


@pytest.mark.thinned(6)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "calibration_method", [f"absmax,{7.5 / 7}", "minmax", "fixed,-2,2"]
)
def test_ranges_that_a_grid_reproduces(calibration_method, method):
    # With these, export without the scales finds the grid again.
    how = HowToQuantize(
        qtype="int4",
        channelwise_axes=() if "fixed" in calibration_method else [1],
        calibration_method=calibration_method,
    )
    w = jax.device_put(
        np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    )
    tx = optim.proximal({"": how}, optax.linear_schedule(0.0, 1.0, 4), method)
    state = tx.init(w)
    for _ in range(6):
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        w = optax.apply_updates(w, updates)
    stored, again = quantized(w, state, how), qarray.quantize_array(w, how)
    np.testing.assert_array_equal(again.qvalue, stored.qvalue)
    np.testing.assert_allclose(dequantize(again), w, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_learned_is_better_than_rounding(method):
    # Least squares with correlated inputs: the nearest levels are not the best ones.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 24)) @ (rng.normal(size=(24, 24)) + 0.5)
    x = jnp.asarray(x / np.linalg.norm(x, axis=0), jnp.float32)
    best = jax.device_put(rng.uniform(-3, 3, (24, 8)).astype(np.float32))
    steps = 1000

    def loss(w):
        return 0.5 * jnp.sum((x @ (w - best)) ** 2)

    # Proximal gradient descent has a pull in each update, so it takes a weaker one.
    end = {"proxquant": 0.05, "parq": 1.0}[method]
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, end, steps), optax.constant_schedule(1.0)], [steps]
    )
    tx = optax.chain(
        optax.adam(optax.linear_schedule(0.02, 0.0, steps)),
        optim.proximal({"": oscillating.HOWS["fixed"]}, schedule, method),
    )

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    @jax.jit
    def trained(w):
        return jax.lax.scan(step, (w, tx.init(w)), None, steps + 2)[0][0]

    learned, rounded = trained(best), jnp.clip(jnp.round(best), -4, 3)
    np.testing.assert_array_equal(learned, jnp.round(learned))
    assert loss(learned) < 0.6 * loss(rounded)


def test_hyperparams_can_be_injected():
    how = oscillating.HOWS["fixed"]
    w, zeros = jnp.array([0.25, 1.0]), jnp.zeros(2)
    make, found = optim.proximal, []
    for tx in (
        make({"": how}, lambda count: 0.25 * count),
        optax.inject_hyperparams(make, static_args=("method", "calibration_period"))(
            {"": how}, lambda count: 0.25 * count
        ),
    ):
        state = tx.init(w)
        for _ in range(3):
            updates, state = tx.update(zeros, state, w)
            found.append(updates.tolist())
    assert found == [[0, 0], [-0.125, 0], [-0.25, 0]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_seen(method):
    tx = optim.proximal({"": oscillating.HOWS["fixed"]}, 1.0, method)
    w, steps = jnp.ones(3), jnp.array([jnp.nan, jnp.inf, 0.0])
    updates, _ = tx.update(steps, tx.init(w), w)
    np.testing.assert_array_equal(w + updates, [np.nan, np.inf, 1])


def test_errors():
    how = oscillating.HOWS["fixed"]
    for value in -0.1, float("nan"):
        with pytest.raises(ValueError, match="schedule=.*must not be negative"):
            optim.proximal({"": how}, value)
    with pytest.raises(TypeError, match="schedule='linear'.*a number, or a schedule"):
        optim.proximal({"": how}, "linear")
    with pytest.raises(ValueError, match="method='ste'.: choose from proxquant, parq"):
        optim.proximal({"": how}, 1.0, "ste")
    for period in 0, 2.5:
        with pytest.raises(ValueError, match="calibration_period=.*a positive int"):
            optim.proximal({"": how}, 1.0, "parq", period)
    with pytest.raises(ValueError, match="'a' is quantized to nf4, and only the even"):
        optim.proximal({"a": HowToQuantize(qtype="nf4")}, 1.0)
    tx = optim.proximal({"": HowToQuantize(qtype="int8")}, 1.0)
    with pytest.raises(ValueError, match="in which the levels of int8 are too"):
        tx.init(jnp.ones(2, jnp.bfloat16))
    tx = optim.proximal({"": how}, 1.0)
    with pytest.raises(ValueError, match="proximal needs the params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

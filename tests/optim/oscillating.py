"""NumPy's view of grids in float64, and the toy problem of arXiv 2203.11086."""

import jax
import numpy as np
import optax
from jax import numpy as jnp

from qwix_train.core.fake_quant import fake_quant
from qwix_train.core.how import HowToQuantize

HOWS = {
    "absmax": HowToQuantize(
        qtype="int3", channelwise_axes=[1], calibration_method="absmax,1.1"
    ),
    "fixed": HowToQuantize(qtype="int3", calibration_method="fixed,-3.5,3.5"),
    "rms": HowToQuantize(
        qtype="int3", channelwise_axes=[1], calibration_method="rms,1.8"
    ),
    "minmax": HowToQuantize(
        qtype="int3", channelwise_axes=[1], calibration_method="minmax"
    ),
}


def grid(w, name):
    """Scale and zero point of int3 codes; one for each column, or for all.

    Also the extremes that the range comes from.
    """
    if name == "minmax":
        low = np.minimum(w.min(0, keepdims=True), 0)
        high = np.maximum(w.max(0, keepdims=True), 0)
        scale = (high - low) / 7
        return scale, np.clip(np.rint(-4 - low / scale), -4, 3), low, high
    zero, infinite = np.zeros((1, w.shape[1])), np.full((1, w.shape[1]), np.inf)
    if name == "absmax":
        high = np.abs(w).max(0, keepdims=True)
        return 1.1 * high / 3.5, zero, -high, high
    high = 3.5 + zero if name == "fixed" else 1.8 * np.sqrt((w**2).mean(0)[None])
    return high / 3.5, zero, -infinite, infinite


def levels(w, scale, zero):
    return np.clip(np.rint(w / scale + zero), -4, 3) - zero


TARGETS = jax.device_put(
    np.random.default_rng(0).uniform(-2.9, 2.9, 200).astype(np.float32)
)
"""Optima of weights whose levels are the integers."""


def trained(tx, steps=1500):
    """Trains weights rounded to integers to the targets, as section 2.2 does.

    Returns the levels of the last 300 steps, and the last state.
    """

    def loss(w):
        return 0.5 * jnp.sum((TARGETS - fake_quant(w, HOWS["fixed"])) ** 2)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), w

    w = jnp.linspace(-3, 3, 200)
    loop = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), None, steps))
    (_, state), history = loop(w)
    return np.rint(np.asarray(history[-300:])), state


def oscillating(history):
    """Which weights change their level."""
    return (history != history[:1]).any(0)

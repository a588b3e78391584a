"""Every transformation, something to transform, and a compiled loop."""

import functools

import jax
import numpy as np
import optax
from jax import numpy as jnp

from qwix_train import optim
from qwix_train.core.how import HowToQuantize

GRIDS = {".*layer/kernel": HowToQuantize(qtype="int4", channelwise_axes=[1])}
RAMP = optax.linear_schedule(0.0, 1.0, 2)
TRANSFORMS = {
    "lora_plus": lambda tx: optim.lora_plus(tx, ratio=4.0),
    "freeze": lambda tx: optim.selective_transform(tx, freeze=".*layer/kernel"),
    "train": lambda tx: optim.selective_transform(tx, train=".*_lora_[ab]"),
    "dynamic": lambda tx: optim.quantized_state(tx, block_size=16, min_size=512),
    "int8": lambda tx: optim.quantized_state(tx, "int8", block_size=16, min_size=512),
    "stochastic_rounding": optim.stochastic_rounding,
    "dampen": lambda tx: optax.chain(optim.dampen_oscillations(GRIDS, 0.1), tx),
    "freeze_oscillations": lambda tx: optax.chain(
        tx, optim.freeze_oscillations(GRIDS, 0.5, momentum=0.5)
    ),
    "proxquant": lambda tx: optax.chain(tx, optim.proximal(GRIDS, RAMP)),
    "parq": lambda tx: optax.chain(tx, optim.proximal(GRIDS, RAMP, "parq", 2)),
}
SHAPES = {
    "kernel": (16, 64),
    "bias": (64,),
    "kernel_lora_a": (16, 8),
    "kernel_lora_b": (8, 64),
    "low": (16,),
}


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    leaves = {
        k: jnp.asarray(rng.normal(size=s).astype(dtype)) for k, s in SHAPES.items()
    }
    # Something to round stochastically: in bfloat16, and exact whatever the noise is.
    return {"layer": leaves | {"low": jnp.zeros(SHAPES["low"], jnp.bfloat16)}}


PARAMS, GRADS = tree(0), tree(1)


def assert_can_be_added(updates, params):
    """In the dtypes of the params, or wider: params keep theirs in either case."""
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert u.shape == p.shape
        assert u.dtype == p.dtype or (u.dtype, p.dtype) == (jnp.float32, jnp.bfloat16)


def run(tx, params=PARAMS, grads=GRADS, steps=3, each=False, **extra_args):
    """The params and the state after some steps, or each, of a compiled loop."""

    def step(grads, carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra_args)
        assert_can_be_added(updates, params)
        carry = (optax.apply_updates(params, updates), state)
        return carry, carry if each else None

    @jax.jit
    def loop(params, grads):
        # A carry of `scan` keeps its structure, shapes and dtypes.
        carry = (params, tx.init(params))
        last, all_ = jax.lax.scan(functools.partial(step, grads), carry, None, steps)
        if each:
            return [jax.tree.map(lambda x: x[i], all_) for i in range(steps)]
        return last

    return loop(params, grads)

"""LoRA+ against two learning rates written out."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from qwix_train import optim
from tests import models

RNG = np.random.default_rng(0)
PARAMS, GRADS = (
    {
        "dense": {
            "kernel_lora_a": jax.device_put(RNG.normal(size=(6, 2)).astype(np.float32)),
            "kernel_lora_b": jax.device_put(RNG.normal(size=(2, 4)).astype(np.float32)),
            "kernel_lora_magnitude": jax.device_put(
                RNG.normal(size=4).astype(np.float32)
            ),
        }
    }
    for _ in range(2)
)


def trained(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_is_a_higher_rate_of_b_alone():
    rates = {"b": optax.adamw(0.01 * 16), "other": optax.adamw(0.01)}
    labels = {"dense": {name: "other" for name in PARAMS["dense"]}}
    labels["dense"]["kernel_lora_b"] = "b"
    expected = trained(optax.partition(rates, labels))
    models.assert_close(trained(optim.lora_plus(optax.adamw(0.01))), expected, 1e-6)


def test_a_step_by_hand():
    new = trained(optim.lora_plus(optax.sgd(0.5), ratio=3.0), steps=1)
    for name, ratio in ("lora_a", 1), ("lora_b", 3), ("lora_magnitude", 1):
        before, grads = (t["dense"]["kernel_" + name] for t in (PARAMS, GRADS))
        expected = np.asarray(before, np.float64) - 0.5 * ratio * np.asarray(grads)
        np.testing.assert_allclose(new["dense"]["kernel_" + name], expected, 1e-6)


def test_the_ratio_can_be_injected():
    tx = optax.inject_hyperparams(optim.lora_plus)(optax.sgd(0.5), ratio=3.0)
    expected = trained(optim.lora_plus(optax.sgd(0.5), ratio=3.0))
    models.assert_close(trained(tx), expected, 1e-6)


def test_adapters_of_flax():
    model = nnx.LoRA(6, 2, 4, rngs=nnx.Rngs(0))
    tx = optim.lora_plus(optax.sgd(1.0), ratio=2.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.LoRAParam))
    updates = nnx.to_pure_dict(optimizer.update(model, grads))
    assert (updates["lora_a"] == -1).all() and (updates["lora_b"] == -2).all()


def test_errors():
    for ratio in 0, -1.0, float("nan"):
        with pytest.raises(ValueError, match="the ratio must be positive"):
            optim.lora_plus(optax.sgd(1.0), ratio=ratio)
    tx = optim.lora_plus(optax.sgd(1.0))
    with pytest.raises(ValueError, match="no B matrix.* params are dense/kernel_lora_"):
        tx.init({"dense": {"kernel_lora_a": jnp.ones(2), "kernel_lora_c": 0.0}})

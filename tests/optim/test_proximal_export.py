"""Params that an optimizer takes to their grid are what export stores, bit for bit."""

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import qwix_train
from qwix_train import dequantize, optim
from tests import models


@pytest.mark.thinned(6)
@pytest.mark.parametrize("method", ["proxquant", "parq"])
@pytest.mark.parametrize("calibration_method", ["absmax", "minmax", "rms,2.5"])
def test_what_is_stored_is_what_was_trained(calibration_method, method):
    rules = [
        qwix_train.QuantizationRule(
            weight_qtype="int4", weight_calibration_method=calibration_method
        )
    ]
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(32, 12)).astype(np.float32)
    )
    y = jnp.tanh(x[:, :3])
    model = models.Mlp()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    end = {"proxquant": 0.05, "parq": 1.0}[method]
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, end, 50), optax.constant_schedule(1.0)], [50]
    )
    drawn = optim.proximal(qwix_train.plan(model, rules, x), schedule, method)
    tx = optax.chain(optax.adam(3e-3), drawn)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, x) - y) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, first = tx.init(params), loss(params)
    for _ in range(55):
        params, state = step(params, state)
    assert loss(params) < first
    tree = qwix_train.attach(params, state)
    served, stored = qwix_train.ptq.quantize(model, tree, rules, x)
    for name, layer in params.items():
        models.assert_same(dequantize(stored[name]["kernel"].array), layer["kernel"])
    outputs = served.apply({"params": stored}, x)
    models.assert_close(outputs, model.apply({"params": params}, x))

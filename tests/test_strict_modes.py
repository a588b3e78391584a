"""The main paths under the settings with which others run JAX.

Most are errors of tracing, so that no path is compiled but where numbers matter.
"""

import contextlib

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    HowToQuantize,
    LoraRule,
    QtProvider,
    QtRule,
    QuantizationRule,
    calib,
    optim,
    ptq,
    quantize_model,
    wrap_train_step,
)
from tests import models

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
INT8 = dict(weight_qtype="int8", act_qtype="int8")


class Model(nn.Module):
    """A model that computes in bfloat16, and whose params are float32."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, dtype=jnp.bfloat16)(x))
        return nn.Dense(4, dtype=jnp.bfloat16)(x)


def params():
    model_params = {}
    for number, shape in enumerate([(8, 8), (8, 4)]):
        kernel = np.random.default_rng(number).normal(size=shape) / 3
        bias = jnp.zeros(shape[1], jnp.float32)
        layer = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": bias}
        model_params[f"Dense_{number}"] = layer
    return model_params


def state():
    tx = optax.sgd(0.1)
    apply = Model().apply
    return train_state.TrainState.create(apply_fn=apply, params=params(), tx=tx)


def train_step(state, x):
    def loss(params):
        out = state.apply_fn({"params": params}, x)
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def qat_step(x):
    return wrap_train_step(train_step, [QuantizationRule(**INT8)])(state(), x)


def learned_step(x):
    methods = dict(weight_calibration_method="lsq", act_calibration_method="lsq")
    rules = [QuantizationRule(**INT8, **methods)]
    scaled = qwix_train.attach(state(), rules, X)
    return wrap_train_step(train_step, rules)(scaled, x)


def static_step(x):
    rules = [QuantizationRule(**INT8, act_static_scale=True, rotation="hadamard")]
    with_ranges = qwix_train.attach(state(), rules, X)
    after, value = wrap_train_step(train_step, rules)(with_ranges, x)
    return after.params, after.quant_stats, value


def step_on_codes(x):
    rules = [QtRule(**INT8, bwd_qtype="int8", bwd_stochastic_rounding="uniform")]
    model, rngs = quantize_model(Model(), QtProvider(rules)), {}
    rngs["stochastic_rounding"] = jax.random.key(0)

    def loss(params):
        out = model.apply({"params": params}, x, rngs=rngs)
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    return jax.grad(loss)(params())


def served(rule):
    def path(x):
        model, quantized = ptq.quantize(Model(), params(), [rule], x)
        return model.apply({"params": quantized}, x)

    return path


def calibrated(**kwargs):
    rules = [QuantizationRule(**INT8, act_static_scale=True, **kwargs)]

    def path(x):
        observed = calib.observe(train_step, rules)
        return observed(observed.init(state(), x), state(), x)

    return path


def lora_step(x):
    rules = [LoraRule(rank=2, alpha=2.0, weight_qtype="int4", act_qtype="int8")]
    adapted = models.lora_state(
        Model().apply, params(), optax.sgd(0.1), rules, jax.random.key(0), x
    )
    adapted, value = train_step(adapted, x)
    return adapted.params, value


def optimizer(make):
    hows = {".*kernel": HowToQuantize(qtype="int4", channelwise_axes=[1])}

    def path(x):
        del x
        tx, tree = make(hows), params()
        return tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)

    return path


PATHS = {
    "qat": qat_step,
    "lsq": learned_step,
    "static": static_step,
    "codes": step_on_codes,
    "int8": served(QuantizationRule(**INT8)),
    "asymmetric": served(
        QuantizationRule(
            **INT8,
            weight_calibration_method="minmax",
            act_calibration_method="minmax",
        )
    ),
    "int4": served(QuantizationRule(weight_qtype="int4")),
    "tiles": served(QuantizationRule(weight_qtype="int4", tile_size=4)),
    "nf4": served(QuantizationRule(weight_qtype="nf4")),
    "mxfp4": served(
        QuantizationRule(weight_qtype="mxfp4", act_qtype="mxfp8", pad_tiles=True)
    ),
    "nvfp4": served(
        QuantizationRule(weight_qtype="nvfp4", act_qtype="nvfp4", pad_tiles=True)
    ),
    "mean": calibrated(),
    "moving average": calibrated(act_averaging="ema,0.9"),
    "mse": calibrated(act_observer="mse"),
    "lora": lora_step,
    "quantized_state": optimizer(
        lambda hows: optim.quantized_state(optax.trace(0.9), qtype="int8")
    ),
    "proximal": optimizer(lambda hows: optim.proximal(hows, 1.0)),
    "dampening": optimizer(lambda hows: optim.dampen_oscillations(hows, 1e-3)),
    "freezing": optimizer(lambda hows: optim.freeze_oscillations(hows, 0.1)),
}


@contextlib.contextmanager
def nothing_is_promoted():
    """No dtype and no rank, where NumPy's numbers keep their 64 bits."""
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.enable_x64(True),
    ):
        yield


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", PATHS)
def test_a_path_can_be_traced(name):
    with nothing_is_promoted():
        out = jax.eval_shape(PATHS[name], X)
    # The dtypes are those of the model whatever the default ones are.
    assert not any(x.dtype == jnp.float64 for x in jax.tree.leaves(out))


# Nothing is cached while leaks are looked for, so a few paths stand for all.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["qat", "static", "codes", "asymmetric", "mean", "lora"]
)
@pytest.mark.usefixtures("small_heap")
def test_no_tracer_leaks(name):
    with jax.check_tracer_leaks():
        jax.eval_shape(PATHS[name], X)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ["qat", "codes", "int4", "mse", "lora", "proximal"])
def test_no_nan_on_the_way(name):
    with jax.debug_nans(True):
        jax.jit(PATHS[name])(X)

"""A scale that stands beside a weight is its scale in training, as in export.

The reference is NumPy in float64.
"""

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import (
    QtProvider,
    QtRule,
    QuantizationRule,
    ptq,
    quantize_fn,
    wrap_eval_step,
)
from tests.models import assert_close, assert_same

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(8, 3)).astype(np.float32)
SCALE = np.array([[0.5, 0.25, 0.125]], np.float32)
X = RNG.normal(size=(4, 8)).astype(np.float32)
MODEL = nn.Dense(3, use_bias=False)


def evaluate(params, x) -> Any:
    return MODEL.apply({"params": params}, x)


def rule(method="absmax"):
    return [QuantizationRule(weight_qtype="int4", weight_calibration_method=method)]


def on_grid(zero: Any = 0):
    codes = np.clip(np.round(KERNEL.astype(np.float64) / SCALE) + zero, -8, 7)
    return (codes - zero) * SCALE


@pytest.mark.parametrize("method", ["absmax", "rms,2", "minmax"])
def test_the_scale_beside_a_weight_is_used(method):
    params = {"kernel": KERNEL, "kernel_scale": SCALE}
    zero: Any = 0
    if method == "minmax":
        zero = np.array([[-2, 0, 3]])
        params["kernel_zero_point"] = zero.astype(np.float32)
    out = wrap_eval_step(evaluate, rule(method))(params, X)
    assert_close(out, X.astype(np.float64) @ on_grid(zero))
    model, quantized = ptq.quantize(MODEL, params, rule(method), X)
    assert_close(out, model.apply({"params": quantized}, X))


def test_layers_under_scan_have_theirs():
    kernels = RNG.normal(size=(2, 8, 8)).astype(np.float32)
    scales = np.array([0.5, 0.1], np.float32)[:, None, None] * np.ones((2, 1, 8))
    params = {"w": kernels, "w_scale": scales.astype(np.float32)}

    def layers(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]

    out = quantize_fn(layers, QtProvider(rule()))(params, X)
    model, quantized = ptq.quantize(layers, params, rule(), X)
    assert_close(out, model(quantized, X))


def test_it_gets_no_gradient_and_the_weight_one_within_the_range():
    def loss(params):
        return jnp.sum(wrap_eval_step(evaluate, rule())(params, X))

    grads = jax.grad(loss)({"kernel": KERNEL, "kernel_scale": SCALE})
    assert_same(grads["kernel_scale"], np.zeros_like(SCALE))
    inside = np.abs(KERNEL) <= 7.5 * SCALE
    assert_close(grads["kernel"], X.sum(0)[:, None] * inside)


def test_a_param_that_the_model_reads_is_no_scale_of_ours():
    def layer(params, x):
        return x @ params["w"] * params["w_scale"]

    params = {"w": KERNEL, "w_scale": SCALE}
    quantized = quantize_fn(layer, QtProvider(rule()))
    alone = quantize_fn(lambda p, x: x @ p["w"], QtProvider(rule()))
    assert_close(quantized(params, X), alone({"w": KERNEL}, X) * SCALE)


def test_a_scale_that_does_not_fit_is_an_error():
    step = wrap_eval_step(evaluate, rule())
    with pytest.raises(ValueError, match=r"'kernel_scale' has shape \(1, 1\)"):
        step({"kernel": KERNEL, "kernel_scale": SCALE[:, :1]}, X)


def test_quantized_training_computes_its_own_scale_and_says_so():
    rules = [QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")]
    with pytest.raises(ValueError, match="'kernel' has a scale beside it"):
        params = {
            "kernel": jax.device_put(KERNEL),
            "kernel_scale": jax.device_put(SCALE),
        }
        wrap_eval_step(evaluate, rules)(params, X)

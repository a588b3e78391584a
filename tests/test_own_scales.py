"""A param of the model's own that is named as a scale of ours would be.

`encode` reads the weight alone, `__call__` its scale, too. The reference is NumPy.
"""

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix_train
from qwix_train import QtProvider, QuantizationRule, attach, ptq, quantize_fn
from tests.models import assert_close, assert_same

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(8, 3)).astype(np.float32)
OWN = np.array([[0.5, 0.25, 0.125]], np.float32)
X = RNG.normal(size=(4, 8)).astype(np.float32)
RULES = [QuantizationRule(weight_qtype="int4")]


def on_grid(scale):
    """The kernel on an int4 grid, in float64."""
    return np.clip(np.round(KERNEL.astype(np.float64) / scale), -8, 7) * scale


ABSMAX = X @ on_grid(np.abs(KERNEL.astype(np.float64)).max(0, keepdims=True) / 7.5)
TAKEN = X @ on_grid(OWN.astype(np.float64))


class Linen(nn.Module):
    def setup(self):
        self.kernel = self.param("kernel", lambda key: jax.device_put(KERNEL))
        self.kernel_scale = self.param("kernel_scale", lambda key: jax.device_put(OWN))

    def encode(self, x):
        return x @ self.kernel

    def __call__(self, x):
        return self.encode(x) * self.kernel_scale


class Nnx(nnx.Module):
    def __init__(self, own: Any = OWN, rngs: Any = None):
        self.kernel = nnx.Param(jax.device_put(KERNEL))
        if own is not None:
            self.kernel_scale = nnx.Param(jax.device_put(own))

    def encode(self, x):
        return x @ self.kernel[...]


def evaluate(model, x) -> Any:
    return model.encode(x)


PARAMS = {"kernel": jax.device_put(KERNEL), "kernel_scale": jax.device_put(OWN)}


@pytest.mark.parametrize("form", ["alone", "below", "bridged"])
def test_a_linen_module_declares_its_own(form):
    class Outer(nn.Module):
        def setup(self):
            self.inner = Linen() if form == "below" else nnx.bridge.to_linen(Nnx)

        def encode(self, x):
            inner: Any = self.inner
            return inner(x, nnx_method="encode")

        def __call__(self, x):
            return self.inner.encode(x)

    model = Linen() if form == "alone" else Outer()
    method = "encode" if form != "below" else "__call__"
    variables = {"params": PARAMS if form == "alone" else {"inner": PARAMS}}

    def step(variables, x) -> Any:
        return model.apply(variables, x, method=method)

    assert_close(qwix_train.wrap_eval_step(step, RULES)(variables, X), ABSMAX)


def test_and_keeps_it_when_it_is_quantized():
    model, params = ptq.quantize(Linen(), PARAMS, RULES, X, method="encode")
    assert_same(params["kernel_scale"], OWN)
    encoded = model.apply({"params": params}, X, method="encode")
    assert_close(encoded, ABSMAX)
    assert_close(model.apply({"params": params}, X), ABSMAX * OWN)


def test_no_learned_scale_takes_its_place():
    lsq = [QuantizationRule(weight_qtype="int4", weight_calibration_method="lsq")]
    with pytest.raises(ValueError, match="The model has a param 'kernel_scale'"):
        attach(PARAMS, lsq, X, model=Linen(), method="encode")


def test_what_is_attached_to_an_nnx_model_is_known():
    lsq = [QuantizationRule(weight_qtype="int4", weight_calibration_method="lsq")]

    class Alone(Nnx):
        def __call__(self, x):
            return self.encode(x)

    model = attach(Alone(None), lsq, X)
    model.kernel_scale.set_value(jax.device_put(OWN))
    model = nnx.merge(*nnx.split(model))
    assert_close(qwix_train.wrap_eval_step(evaluate, RULES)(model, X), TAKEN)
    quantized, _ = ptq.quantize(model, None, RULES, X)
    assert_close(quantized(X), TAKEN)


def test_what_an_nnx_model_has_is_taken_and_told():
    step = qwix_train.wrap_eval_step(evaluate, RULES)
    with pytest.warns(UserWarning, match="'kernel_scale' is taken for the scale of"):
        assert_close(step(Nnx(), X), TAKEN)
    model = Nnx(None)
    model.kernel_scale = nnx.Param(jax.device_put(OWN), attached=True)
    assert_close(step(model, X), TAKEN)


def test_a_scale_has_the_axes_of_its_param():
    step = qwix_train.wrap_eval_step(evaluate, RULES)
    assert_close(step(Nnx(OWN[0]), X), ABSMAX)


def test_a_function_in_a_step_may_be_one_of_several():
    def encode(params, x) -> Any:
        return x @ params["kernel"]

    step = qwix_train.wrap_eval_step(qwix_train.as_model(encode), RULES)
    with pytest.warns(UserWarning, match="the call does not compute with it"):
        assert_close(step(PARAMS, X), TAKEN)
    assert_close(quantize_fn(encode, QtProvider(RULES))(PARAMS, X), TAKEN)

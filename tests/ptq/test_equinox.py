"""Params of a function that are no dictionary: modules of Equinox, and lists."""

import equinox as eqx
import jax
import numpy as np
import pytest

import qwix_train
from qwix_train import QtProvider, WithAux, as_model, calib, ptq, quantize_fn
from tests import models

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
STATIC = [models.rule("int8", "int8", act_static_scale=True)]


def mlp():
    return eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))


def forward(model, x):
    return jax.vmap(model)(x)


def expected(model, x):
    """`mlp` by hand."""
    for i, layer in enumerate(model.layers):
        params = {"kernel": layer.weight.T, "bias": layer.bias}
        x = models.dense(params, np.maximum(x, 0) if i else x)
    return x


@pytest.mark.slow
def test_a_module_is_quantized():
    function, quantized = ptq.quantize(forward, mlp(), models.INT8, X)
    assert isinstance(quantized, eqx.nn.MLP)
    assert isinstance(quantized.layers[0].weight, WithAux)
    models.assert_close(function(quantized, X), expected(mlp(), X))
    other = jax.tree.map(lambda x: 2 * x if eqx.is_array(x) else x, mlp())
    again = ptq.quantize_params(
        other, ptq.abstract_params(forward, other, models.INT8, X)
    )
    models.assert_close(function(again, X), expected(other, X))


CASES = {
    "module": (forward, mlp, "dot_general0_rhs_scale"),
    "list": (
        lambda params, x: x @ params[0],
        lambda: [np.sin(np.arange(12, dtype=np.float32)).reshape(4, 3)],
        "dot_general0_lhs_scale",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_static_ranges_stand_beside_the_params(name):
    fn, make, scale = CASES[name]
    params = make()
    calibrator = calib.Calibrator(STATIC)
    calibrator.wrap(as_model(fn))(params, X)
    quant_stats = calibrator.quant_stats
    function, quantized = ptq.quantize(fn, params, STATIC, X, quant_stats=quant_stats)
    assert scale in quantized.leaves
    assert type(quantized.params) is type(params)
    want = quantize_fn(fn, QtProvider(STATIC, quant_stats=quant_stats))
    models.assert_close(eqx.filter_jit(function)(quantized, X), want(params, X))


@pytest.mark.slow
def test_learned_scales_stand_beside_the_params():
    rule = models.rule("int8", "int8", act_calibration_method="lsq")
    attached = qwix_train.attach(mlp(), [rule], X, model=forward)
    trained = quantize_fn(forward, QtProvider([rule]))(attached, X)
    function, quantized = ptq.quantize(forward, attached, [rule], X)
    models.assert_close(function(quantized, X), trained)

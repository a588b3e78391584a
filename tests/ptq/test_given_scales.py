"""Scales that stand next to params are those that PTQ stores."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, ptq
from tests import models

X = models.normal(4, 8, seed=0)
INT4 = [QuantizationRule(weight_qtype="int4")]
SCALE = jnp.float32([[0.1, 0.02, 0.3]])


def floats(**others):
    kernel = jax.random.normal(jax.random.key(1), (8, 3))
    return {"kernel": kernel, "bias": jnp.zeros(3), **others}


def codes(kernel, scale, zero=0):
    low, high = -8, 7
    return np.clip(np.round(np.asarray(kernel) / np.asarray(scale) + zero), low, high)


def layer(params, x):
    return x @ params["kernel"] + params["bias"]


@pytest.mark.parametrize("kind", ["linen", "function", "nnx"])
def test_a_weight_has_exactly_the_scale_that_is_given(kind):
    params = floats(kernel_scale=SCALE)
    if kind == "nnx":
        model = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
        model.kernel.set_value(params["kernel"])
        model.kernel_scale = nnx.Param(SCALE, attached=True)
        quantized, tree = ptq.quantize(model, None, INT4, X)
        assert not hasattr(quantized, "kernel_scale")
        out = quantized(X)
    else:
        model = nn.Dense(3) if kind == "linen" else layer
        quantized, tree = ptq.quantize(model, params, INT4, X)
        run = quantized.apply if kind == "linen" else quantized
        out = run({"params": tree} if kind == "linen" else tree, X)
    assert sorted(tree) == ["bias", "kernel"]
    array = tree["kernel"].array
    np.testing.assert_array_equal(array.scale, SCALE)
    want = codes(params["kernel"], SCALE)
    np.testing.assert_array_equal(array.qvalue.astype(int), want)
    np.testing.assert_allclose(out, X @ (want * SCALE), 1e-5, 1e-5)


def test_part_of_a_model_and_a_zero_point():
    rules = [QuantizationRule(weight_qtype="int4", weight_calibration_method="minmax")]
    abstract = ptq.abstract_params(layer, floats(), rules, X)
    zero = jnp.float32([[1.0, -3.0, 0.0]])
    part = {
        "kernel": floats()["kernel"],
        "kernel_scale": SCALE,
        "kernel_zero_point": zero,
    }
    array = ptq.quantize_params(part, abstract)["kernel"].array
    np.testing.assert_array_equal(array.zero_point.astype(int), zero)
    want = codes(part["kernel"], SCALE, zero)
    np.testing.assert_array_equal(array.qvalue.astype(int), want)
    del part["kernel_zero_point"]
    array = ptq.quantize_params(part, abstract)["kernel"].array
    assert not array.zero_point.astype(int).any()
    with pytest.raises(ValueError, match="has a zero point next to it"):
        symmetric = ptq.abstract_params(layer, floats(), INT4, X)
        ptq.quantize_params({**part, "kernel_zero_point": zero}, symmetric)


def test_methods_that_look_at_data_leave_it_alone():
    params = floats(kernel_scale=SCALE)
    method = ptq.Gptq(INT4)
    forward = qwix_train.as_model(layer)
    method.wrap(jax.jit(lambda params, x: forward(params, x)))(floats(), X)
    abstract = ptq.abstract_params(layer, floats(), INT4, X)
    array = method.quantize_params(params, abstract)["kernel"].array
    np.testing.assert_array_equal(
        array.qvalue.astype(int), codes(params["kernel"], SCALE)
    )
    (record,) = method.report.weights
    assert not record.applied and "stands next to it" in record.reason


def test_a_scale_that_the_model_computes_with_is_its_own():
    def scaled(params, x):
        return (x @ params["kernel"]) * params["kernel_scale"] + params["bias"]

    def scanned(params, x):
        def body(x, layer):
            return jnp.tanh((x @ layer["kernel"]) * layer["kernel_scale"]), None

        return jax.lax.scan(jax.checkpoint(body), x, params)[0]

    params = floats(kernel_scale=SCALE)
    quantized, tree = ptq.quantize(scaled, params, INT4, X)
    np.testing.assert_array_equal(tree["kernel_scale"], SCALE)
    assert tree["kernel"].array.scale.shape == SCALE.shape
    assert not np.array_equal(tree["kernel"].array.scale, SCALE)
    models.assert_close(quantized(tree, X), scaled(params, X), 0.2)
    stacked = {
        "kernel": jax.random.normal(jax.random.key(1), (3, 8, 8)),
        "kernel_scale": jnp.ones((3, 1, 8)),
    }
    _, tree = ptq.quantize(scanned, stacked, INT4, X)
    assert sorted(tree) == ["kernel", "kernel_scale"]


@pytest.mark.slow
def test_stacked_layers_of_nnx():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def layers(rngs):
                return nnx.Linear(8, 8, use_bias=False, rngs=rngs)

            self.layers = layers(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def run(layer, x):
                return jnp.tanh(layer(x))

            return run(self.layers, x)

    model = Stack(nnx.Rngs(0))
    scale = jnp.full((3, 1, 8), 0.07)
    model.layers.kernel_scale = nnx.Param(scale, attached=True)
    quantized, tree = ptq.quantize(model, None, INT4, X)
    np.testing.assert_array_equal(tree["layers"]["kernel"].array.scale, scale)
    x = X
    for kernel in np.asarray(model.layers.kernel.get_value()):
        x = jnp.tanh(x @ (codes(kernel, 0.07) * 0.07))
    np.testing.assert_allclose(quantized(X), x, 1e-4, 1e-4)


def test_scales_that_do_not_fit_are_named():
    abstract = ptq.abstract_params(layer, floats(), INT4, X)
    for scale, message in (
        (jnp.ones((8, 1)), r"'kernel_scale' has shape \(8, 1\)"),
        (SCALE.at[0, 1].set(jnp.nan), "'kernel_scale', a learned scale, is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ptq.quantize_params(floats(kernel_scale=scale), abstract)
    with pytest.raises(TypeError, match="'kernel_scale' is a float, not an array"):
        ptq.quantize_params(floats(kernel_scale=0.1), abstract)
    with pytest.raises(ValueError, match="'kernel': Cannot quantize .* int32"):
        ptq.quantize_params(
            floats(kernel=jnp.ones((8, 3), int), kernel_scale=SCALE), abstract
        )
    with pytest.raises(ValueError, match="'kernel_scale' is not one of the quantized"):
        ptq.quantize_params({"kernel_scale": SCALE}, abstract)
    minmax = [QuantizationRule(weight_qtype="int4", weight_calibration_method="minmax")]
    with pytest.raises(ValueError, match=r"'kernel_zero_point' has shape \(3,\)"):
        scales = {"kernel_scale": SCALE, "kernel_zero_point": jnp.zeros(3)}
        ptq.quantize_params(
            floats(**scales), ptq.abstract_params(layer, floats(), minmax, X)
        )
    learned = [QuantizationRule(weight_qtype="int4", weight_calibration_method="lsq")]
    abstract = ptq.abstract_params(layer, jax.eval_shape(floats), learned, X)
    with pytest.raises(ValueError, match="'kernel' has no scale: its rule has"):
        ptq.quantize_params(floats(), abstract)
    model = nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'kernel' has no scale: its rule has"):
        qwix_train.quantize_model(model, qwix_train.PtqProvider(learned), X)
    acts = [
        QuantizationRule(
            weight_qtype="int4", act_qtype="int8", act_calibration_method="lsq+"
        )
    ]
    abstract = ptq.abstract_params(layer, floats(), acts, X)
    with pytest.raises(ValueError, match="Learned scales come with the params"):
        ptq.quantize_params(floats(), abstract)
    one = {"dot_general0_lhs_scale": jnp.ones((1, 1))}
    with pytest.raises(ValueError, match="learned leaves of 'lsq', and its rule"):
        ptq.quantize_params(floats(**one), abstract)

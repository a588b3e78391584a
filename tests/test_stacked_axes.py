"""Layers that are stacked along any axis, and what stands beside their params."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import (
    LoraProvider,
    LoraRule,
    PtqProvider,
    QtProvider,
    QuantizationRule,
    attach,
    calib,
    ptq,
    quantize_model,
    wrap_train_step,
)
from tests import models
from tests.compare import assert_close

INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
STATIC = [QuantizationRule(**INT8, act_static_scale=True)]
MINMAX = [
    QuantizationRule(**INT8, act_static_scale=True, act_calibration_method="minmax")
]
# The last axis of the kernel is another than that of the bias: it is counted from the
# last in both.
AXES = [1, pytest.param(-1, marks=pytest.mark.slow)]
X = models.normal(4, 8)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Layers have ranges of different sizes.
        return 3 * nn.Dense(8)(x), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(3)(layers(name="layers")(x)[0])


class NnxScanned(nnx.Module):
    def __init__(self, axis, values):
        axes = nnx.StateAxes({nnx.Param: axis, ...: 0})

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=axes)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return 3 * layer(x)

        self.layers, self.run = make(nnx.Rngs(0)), run
        self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(1))
        for name, value in values.items():
            getattr(self.layers, name).set_value(jax.device_put(value))

    def __call__(self, x):
        return self.head(self.run(self.layers, x))


def stacked(axis):
    """The same params, stacked along an axis."""
    params = models.params_of(Scanned(0), X)
    layers = jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), params["layers"])
    return {**params, "layers": layers}


def static(axis, rules):
    """A static model, and its range of the scanned op."""
    model, params = Scanned(axis), stacked(axis)
    calibrator = calib.Calibrator(rules)
    calibrator.wrap(jax.jit(model.apply))({"params": params}, X)
    stats = calibrator.quant_stats
    served, quantized = ptq.quantize(model, params, rules, X, quant_stats=stats)
    trained = quantize_model(model, QtProvider(rules, quant_stats=stats))
    out = jax.jit(served.apply)({"params": quantized}, X)
    assert_close(out, jax.jit(trained.apply)({"params": params}, X))
    return out, quantized


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(STATIC, id="absmax"),
        pytest.param(MINMAX, id="minmax", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("axis", AXES)
def test_static_ranges(axis, rules):
    want, first = static(0, rules)
    got, found = static(axis, rules)
    assert_close(got, want)
    before, after = (x["layers"]["Dense_0"] for x in (first, found))
    for leaf in before.keys() - {"kernel", "bias"}:
        front, moved = (getattr(x[leaf], "array", x[leaf]) for x in (before, after))
        assert len(np.unique(front)) == 3
        np.testing.assert_array_equal(np.moveaxis(np.asarray(front), 0, axis), moved)


def test_static_ranges_of_an_nnx_model():
    def served(axis):
        values = stacked(axis)["layers"]["Dense_0"]
        model = NnxScanned(axis, values)
        calibrator = calib.Calibrator(STATIC)
        call = nnx.jit(lambda model, x: model(x))
        calibrator.wrap(call)(model, X)
        stats = calibrator.quant_stats
        return call(ptq.quantize(model, None, STATIC, X, quant_stats=stats)[0], X)

    assert_close(served(1), served(0))


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "cls"), [(1, ptq.Awq), (-1, ptq.SmoothQuant)])
def test_scales_of_inputs(axis, cls):
    def served(axis):
        model, params = Scanned(axis), stacked(axis)
        x = X * np.where(np.arange(8) == 1, 30, 1)
        method = cls([QuantizationRule(**INT8)])
        method.wrap(jax.jit(model.apply))({"params": params}, x)
        quantized = quantize_model(model, method.provider)
        abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
        params = method.quantize_params(params, abstract)
        return jax.jit(quantized.apply)({"params": params}, x)

    assert_close(served(axis), served(0))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, -1])
def test_adapters_and_static_ranges(axis):
    rules = [LoraRule(**INT8, act_static_scale=True, rank=2, alpha=4.0)]

    def served(axis):
        model, params = Scanned(axis), stacked(axis)
        calibrator = calib.Calibrator(STATIC)
        calibrator.wrap(jax.jit(model.apply))({"params": params}, X)
        abstract = jax.eval_shape(
            quantize_model(model, PtqProvider(STATIC)).init, jax.random.key(0), X
        )["params"]
        base = ptq.quantize_params(params, abstract, calibrator.quant_stats)
        adapted = quantize_model(model, LoraProvider(rules))
        made = jax.jit(adapted.init)(jax.random.key(0), X)["params"]
        held = {
            name: {**made[name], **base[name]}
            if name == "Dense_0"
            else {"Dense_0": {**made[name]["Dense_0"], **base[name]["Dense_0"]}}
            for name in made
        }
        return jax.jit(adapted.apply)({"params": held}, X)

    assert_close(served(axis), served(0))


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "method"), [(1, "lsq"), (-1, "lsq+")])
def test_scales_of_activations_that_are_trained(axis, method):
    rules = [QuantizationRule(**INT8, act_calibration_method=method)]

    def trained(axis):
        model = Scanned(axis)
        variables = attach({"params": stacked(axis)}, rules, X, model=model)
        out = jax.jit(wrap_train_step(model.apply, rules))(variables, X)
        served, params = ptq.quantize(model, variables["params"], rules, X)
        assert_close(jax.jit(served.apply)({"params": params}, X), out)
        return out

    assert_close(trained(axis), trained(0))


class Members(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            nn.Dense,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return members(8, name="members")(x)


@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_members_of_a_vmap_share_a_static_range(axis):
    model = Members(axis)
    params = models.params_of(model, X)
    trained = quantize_model(model, QtProvider(STATIC))
    variables = {**jax.jit(trained.init)(jax.random.key(0), X), "params": params}
    apply = jax.jit(functools.partial(trained.apply, mutable=["quant_stats"]))
    want, found = apply(variables, X)
    served = quantize_model(model, PtqProvider(STATIC))
    abstract = jax.eval_shape(served.init, jax.random.key(0), X)["params"]
    quantized = ptq.quantize_params(params, abstract, **found)
    assert_close(jax.jit(served.apply)({"params": quantized}, X), want)
    scale = quantized["members"]["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, np.abs(X).max() / 127.5, rtol=1e-6)
    stats = found["quant_stats"]
    served, quantized = ptq.quantize(model, params, STATIC, X, quant_stats=stats)
    assert_close(jax.jit(served.apply)({"params": quantized}, X), want)

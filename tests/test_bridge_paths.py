"""Modules below `nnx.bridge` have paths that rules can name."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qwix_train
from qwix_train import (
    QtProvider,
    QuantizationRule,
    calib,
    lora,
    ptq,
    quantize_model,
)
from tests import models

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
KEY = jax.random.key(0)
FIRST = [QuantizationRule(module_path=r".*/first", weight_qtype="int8")]
STATIC = [
    QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
]
ADAPTERS = [lora.LoraRule(module_path=r".*/first", rank=2, alpha=2.0)]


class NnxPair(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.second = nnx.Linear(8, 4, rngs=rngs)

    @nnx.jit
    def __call__(self, x):
        return self.second(self.first(x))


class LinenPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="second")(nn.Dense(8, name="first")(x))


class OfNnx(nn.Module):
    """A Linen model with two equal NNX parts."""

    @nn.compact
    def __call__(self, x):
        for name in ("one", "two"):
            x = nnx.bridge.to_linen(NnxPair, name=name)(x)
        return nn.Dense(3)(x)


class OfLinen(nnx.Module):
    """An NNX model with a Linen part."""

    def __init__(self, part=None):
        part = LinenPair() if part is None else part
        self.part = nnx.bridge.ToNNX(part, rngs=nnx.Rngs(0)).lazy_init(X)
        self.last = nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(self.part(x))


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nnx.bridge.to_linen(NnxPair, name="pair")(x)


def paths(plan):
    return [op.op.where for op in plan.ops]


def test_paths_continue_below_nnx_modules_of_a_linen_model():
    plan = qwix_train.plan(OfNnx(), FIRST, X)
    parts = [
        f"{name}/{layer}/dot_general0"
        for name in ("one", "two")
        for layer in ("first", "second")
    ]
    assert paths(plan) == [*parts, "Dense_0/dot_general0"]
    assert [op.weights for op in plan.quantized_ops] == [
        (("one", "first", "kernel"),),
        (("two", "first", "kernel"),),
    ]


def test_paths_continue_below_linen_modules_of_an_nnx_model():
    plan = qwix_train.plan(OfLinen(), FIRST, X)
    assert paths(plan) == [
        "part/first/dot_general0",
        "part/second/dot_general0",
        "last/dot_general0",
    ]
    assert [op.weights for op in plan.quantized_ops] == [(("part", "first", "kernel"),)]


def test_paths_continue_through_two_bridges():
    plan = qwix_train.plan(OfLinen(Inner()), FIRST, X)
    assert paths(plan)[:2] == [
        "part/pair/first/dot_general0",
        "part/pair/second/dot_general0",
    ]


@pytest.mark.parametrize("kind", [OfNnx, OfLinen])
def test_the_plan_a_step_and_the_quantized_models_agree(kind):
    if kind is OfNnx:
        model, params = OfNnx(), jax.jit(OfNnx().init)(KEY, X)["params"]
        args, call = (params,), lambda params: OfNnx().apply({"params": params}, X)
        quantized, codes = ptq.quantize(model, params, FIRST, X)
        qat = quantize_model(model, QtProvider(FIRST)).apply({"params": params}, X)
        out = quantized.apply({"params": codes}, X)
        kernels = [codes["one"]["first"]["kernel"], codes["one"]["second"]["kernel"]]
    else:
        model = OfLinen()
        args, call = (model,), lambda model: model(X)
        quantized, _ = ptq.quantize(model, None, FIRST, X)
        qat = quantize_model(model, QtProvider(FIRST))(X)
        out = quantized(X)
        kernels = [quantized.part.first["kernel"], quantized.part.second["kernel"]]
    assert [isinstance(k, qwix_train.WithAux) for k in kernels] == [True, False]
    models.assert_close(out, qat)
    models.assert_close(qwix_train.wrap_eval_step(call, FIRST)(*args), qat)


def test_adapters_stand_below_both_bridges():
    model = quantize_model(OfNnx(), lora.LoraProvider(ADAPTERS))
    params = jax.jit(model.init)(KEY, X)["params"]
    assert [name for name in params["one"]["first"] if "lora" in name]
    assert not [name for name in params["one"]["second"] if "lora" in name]
    floats = jax.jit(OfNnx().init)(KEY, X)
    models.assert_close(model.apply({"params": params}, X), OfNnx().apply(floats, X))
    model = quantize_model(OfLinen(), lora.LoraProvider(ADAPTERS), X, rngs=nnx.Rngs(0))
    assert isinstance(model.part.first["kernel_lora_a"], nnx.LoRAParam)
    models.assert_close(lora.merge(model, X)(X), OfLinen()(X))


@pytest.mark.slow
def test_ranges_of_a_linen_part_are_kept_in_the_nnx_model():
    model = qwix_train.attach(OfLinen(), STATIC, X)
    step = qwix_train.wrap_train_step(lambda model, x: model(x), STATIC)
    step = nnx.jit(step)
    step(model, X)
    step(model, 3 * X)
    statistics = model.part.first["dot_general0_lhs"].get_value()
    assert statistics["count"] == 2
    assert statistics["sum_of_absmax"] == 4


@pytest.mark.slow
def test_ranges_next_to_the_params_of_an_nnx_part_are_known_to_it():
    """Flax warns of variables that it does not know; tests fail at each warning."""
    params = jax.jit(OfNnx().init)(KEY, X)["params"]
    calibrator = calib.Calibrator(STATIC)
    calibrator.wrap(lambda params: OfNnx().apply({"params": params}, X))(params)
    stats = calibrator.quant_stats
    model, codes = ptq.quantize(OfNnx(), params, STATIC, X, quant_stats=stats)
    assert "dot_general0_lhs_scale" in codes["one"]["first"]
    out = model.apply({"params": codes}, X)
    qat = quantize_model(OfNnx(), QtProvider(STATIC, quant_stats=stats))
    models.assert_close(out, qat.apply({"params": params}, X))


@pytest.mark.slow
def test_statistics_in_the_collection_of_an_nnx_part_are_known_to_it():
    model = quantize_model(OfNnx(), QtProvider(STATIC))
    variables = jax.jit(model.init)(KEY, X)
    _, updated = model.apply(variables, X, mutable=["quant_stats"])
    statistics = updated["quant_stats"]["two"]["first"]["dot_general0_lhs"]
    assert statistics["count"] == 1


def test_params_of_an_nnx_module_that_does_not_exist_are_still_named():
    params = jax.jit(OfNnx().init)(KEY, X)["params"]
    params["one"]["third"] = {"kernel": np.ones((2, 2), np.float32)}
    model = quantize_model(OfNnx(), QtProvider(FIRST))
    with pytest.warns(UserWarning, match="unknown module paths .*\n.*third"):
        model.apply({"params": params}, X)

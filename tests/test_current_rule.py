"""Kernels that ask for the rule of their module while the model is traced."""

import functools

import jax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp
from jax.experimental import pallas as pl

from qwix_train import (
    LoraProvider,
    LoraRule,
    PtqProvider,
    QtProvider,
    QuantizationRule,
    current_rule,
    plan,
    quantize_fn,
    quantize_model,
    wrap_train_step,
)
from tests import models
from tests.compare import assert_close, assert_same

INT8 = QuantizationRule(module_path="experts", op_names=("gmm",), weight_qtype="int8")
DENSE = QuantizationRule(module_path="Dense.*", weight_qtype="int4")


def rounded(x, rule):
    """What a kernel of the model's own does with its rule."""
    return x if rule is None else jnp.round(x * 4) / 4


def asking(x):
    return rounded(x, current_rule("gmm"))


@jax.custom_vjp
def custom(x):
    return asking(x)


custom.defvjp(lambda x: (asking(x), None), lambda _, g: (2 * g,))


def pallas(x):
    def kernel(x, out):
        out[...] = rounded(x[...], current_rule("gmm"))

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x)


KERNELS = {
    "plain": asking,
    "jit": jax.jit(asking),
    "custom_vjp": custom,
    "jit of custom_vjp": jax.jit(custom),
    "pallas": pallas,
}


class Experts(nn.Module):
    kernel: str

    @nn.compact
    def __call__(self, x):
        return KERNELS[self.kernel](x * self.param("w", nn.initializers.ones, ()))


class Linen(nn.Module):
    kernel: str

    @nn.compact
    def __call__(self, x):
        x = Experts(self.kernel, name="experts")(x)
        return nn.Dense(3)(Experts(self.kernel, name="others")(x))


class NnxExperts(nnx.Module):
    def __init__(self, kernel):
        self.w, self.kernel = nnx.Param(jnp.ones(())), kernel

    def __call__(self, x):
        return KERNELS[self.kernel](x * self.w[...])


class Nnx(nnx.Module):
    def __init__(self, kernel):
        self.experts, self.others = NnxExperts(kernel), NnxExperts(kernel)
        self.Dense_0 = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.Dense_0(self.others(self.experts(x)))


X = models.normal(2, 4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_linen_kernels_get_the_rule_of_their_module(kernel):
    model = Linen(kernel)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    before = model.apply(variables, X)
    quantized = quantize_model(model, QtProvider([INT8]))
    # One of the two modules asks in vain.
    expected = model.apply(variables, rounded(X, INT8))
    for apply in quantized.apply, jax.jit(quantized.apply):
        assert_close(apply(variables, X), expected)
    if kernel != "pallas":  # that has no derivative
        # In the forward rule of a custom_vjp, too.
        out, pullback = jax.vjp(lambda v: quantized.apply(v, X), variables)
        assert_close(out, expected)
        pullback(out)
    # Neither the float model nor one of other rules finds what was compiled for these.
    assert_same(model.apply(variables, X), before)
    other = quantize_model(model, QtProvider([DENSE]))
    assert_close(
        other.apply(variables, X),
        quantize_model(Linen("plain"), QtProvider([DENSE])).apply(variables, X),
    )


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kernel", KERNELS)
def test_nnx_kernels_get_the_rule_of_their_module(kernel):
    model = Nnx(kernel)
    quantized = quantize_model(model, QtProvider([INT8]), X)
    expected = model(rounded(X, INT8))
    assert_close(quantized(X), expected)
    assert_close(nnx.jit(quantized)(X), expected)


def test_the_plan_lists_what_kernels_ask_for():
    found = plan(Linen("plain"), [INT8, DENSE], X)
    assert [request[:3] for request in found.requests] == [
        (0, "experts", "gmm"),
        (None, "others", "gmm"),
    ]
    assert found.unused_rules == ()
    assert "a kernel in experts asked for gmm: rule 0" in str(found)
    assert "a kernel in others asked for gmm: no rule matches" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "provider",
    [
        PtqProvider([INT8, DENSE]),
        LoraProvider([INT8, LoraRule(module_path="Dense.*", rank=2, alpha=2.0)]),
    ],
    ids=lambda provider: type(provider).__name__,
)
def test_other_modes_answer(provider):
    quantized = quantize_model(Linen("plain"), provider)
    variables = jax.jit(quantized.init)(jax.random.key(0), X)
    apply = jax.jit(quantized.apply)
    assert_close(apply(variables, X), apply(variables, rounded(X, INT8)))


def test_a_wrapped_step_answers():
    model = Linen("jit of custom_vjp")
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def step(variables, x):
        return jax.value_and_grad(lambda v: jnp.sum(model.apply(v, x)))(variables)

    loss, _ = jax.jit(wrap_train_step(step, [INT8]))(variables, X)
    assert_close(loss, step(variables, rounded(X, INT8))[0])
    assert_same(step(variables, X)[0], jax.jit(step)(variables, X)[0])


def test_a_rule_without_names_is_for_kernels_too():
    def fn(params, x):
        return asking(x) @ params

    rule = QuantizationRule(module_path="", weight_qtype="int8")
    quantized = quantize_fn(fn, QtProvider([rule]))
    params = jnp.ones((4, 1))
    weight_only = quantize_fn(lambda params, x: x @ params, QtProvider([rule]))
    assert_close(quantized(params, X), weight_only(params, rounded(X, rule)))
    assert current_rule("gmm") is None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(module, x):
            return custom(x), None

        scan = nn.scan(body, variable_axes={}, split_rngs={}, length=2)
        return scan(self, x)[0]


def test_a_forward_rule_in_a_loop_answers():
    model = quantize_model(Scanned(), QtProvider([QuantizationRule()]))
    apply = functools.partial(model.apply, {})
    assert_close(apply(X), rounded(X, DENSE))
    out, pullback = jax.vjp(apply, X)
    assert_close(out, rounded(X, DENSE))
    assert_close(pullback(out)[0], 4 * out)

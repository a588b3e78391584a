"""Methods of quantized models: by name, as functions, and those that were left out."""

import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import PtqProvider, QtProvider, quantize_model
from tests import models

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
KEY = jax.random.key(0)


class Codec(nn.Module):
    def setup(self):
        self.first = nn.Dense(3)
        self.second = nn.Dense(4)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.first(x)

    def decode(self, x):
        return self.second(x)

    def scaled(self, x):
        return 2 * self(x)

    def both(self, x):
        return self.second(self.encode(x))

    def width(self):
        return self.first.features

    def while_large(self, x):
        while jnp.max(x) > 1:
            x = x / 2
        return self(x)


class NnxCodec(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.encode(x)

    def encode(self, x):
        return self.first(x)

    def scaled(self, x):
        return 2 * self(x)


def quantized(provider=QtProvider, methods=("__call__", "encode")):
    model = quantize_model(Codec(), provider(models.INT8), methods=methods)
    return model, jax.jit(model.init)(KEY, X)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("provider", [QtProvider, PtqProvider])
def test_a_method_that_is_given_as_a_function_runs_quantized(provider):
    model, variables = quantized(provider)
    floats = jax.jit(Codec().init)(KEY, X)
    want = models.dense(floats["params"]["first"], X)
    for method in ("encode", Codec.encode, Codec().encode, model.encode):
        models.assert_close(model.apply(variables, X, method=method), want)
    made = model.init(KEY, X, method=Codec.encode)
    assert jax.tree.structure(made["params"]["first"]) == jax.tree.structure(
        variables["params"]["first"]
    )


def test_a_method_that_was_left_out_and_reads_quantized_params_says_what_to_do():
    model, variables = quantized(PtqProvider)
    message = re.escape(
        "Codec.decode reads params that are quantized, such as 'second/kernel'. It is "
        "not among the methods=('__call__', 'encode',) that quantize_model was given. "
        "Have it run quantized, too: quantize_model(model, provider, "
        "methods=('__call__', 'encode', 'decode'))."
    )
    for method in ("decode", Codec.decode):
        with pytest.raises(ValueError, match=message):
            model.apply(variables, jnp.ones((2, 3)), method=method)


def test_a_method_that_was_left_out_and_stays_in_float_says_so():
    model, variables = quantized()
    hidden = jnp.ones((2, 3))
    message = r"Codec.decode runs 1 ops in float .*such as second/dot_general0\. .*'dec"
    with pytest.warns(UserWarning, match=message):
        out = model.apply(variables, hidden, method="decode")
    models.assert_same(out, Codec().apply(variables, hidden, method="decode"))


def test_only_what_runs_outside_of_quantized_methods_counts():
    model, variables = quantized()
    models.assert_close(
        model.apply(variables, X, method="scaled"), 2 * model.apply(variables, X)
    )
    assert model.apply(variables, method="width") == 3
    with pytest.warns(UserWarning, match="Codec.both runs 1 ops in float"):
        model.apply(variables, X, method="both")


def test_a_method_that_branches_on_values_runs():
    model, variables = quantized(PtqProvider)
    models.assert_close(
        model.apply(variables, 4 * X, method="while_large"), model.apply(variables, X)
    )


def test_methods_of_an_nnx_model_that_were_left_out():
    ptq = quantize_model(NnxCodec(), PtqProvider(models.INT8), X)
    models.assert_close(ptq.scaled(X), 2 * ptq(X))
    with pytest.raises(ValueError, match=r"NnxCodec.encode reads .*'first/kernel'"):
        ptq.encode(X)
    qat = quantize_model(NnxCodec(), QtProvider(models.INT8), X)
    with pytest.warns(UserWarning, match="NnxCodec.encode runs 1 ops in float"):
        qat.encode(X)

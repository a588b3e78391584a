"""Annotation of models for those who convert functions themselves."""

import jax
import numpy as np
import pytest
from flax import nnx

from qwix_train import odml, quantize_model
from qwix_train.odml.converter import to_flatbuffer
from tests.odml.small import INT8, Mlp, init, normal, stats_of


class NnxModel(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.relu(self.layer(x))


def exported(function, x):
    content = to_flatbuffer(function, [x], "f", ("x",), ("y",))
    return odml.LiteRTModel(content)


@pytest.fixture(scope="module")
def linen():
    x = normal(3, 8)
    variables = init(Mlp(), x)
    provider = odml.OdmlQatProvider(INT8)
    stats = stats_of(provider, Mlp().apply, variables, x)
    return variables, stats, x


@pytest.mark.slow
def test_linen_with_params_closed_over(linen):
    variables, stats, x = linen
    expected = odml.convert(Mlp(), variables, INT8, x, quant_stats=stats)
    provider = odml.OdmlConversionProvider(INT8, variables["params"], stats)
    model = quantize_model(Mlp(), provider)
    litert = exported(lambda x: model.apply(variables, x), x)
    assert litert.is_full_integer
    np.testing.assert_array_equal(litert(x), expected(x))
    # Within a compiled function the params are traced: those of the provider count.
    apply = jax.jit(model.apply)
    litert = exported(lambda x: apply(variables, x), x)
    np.testing.assert_array_equal(litert(x), expected(x))


def test_nnx_closed_over():
    model, x = NnxModel(), normal(3, 8)
    stats = stats_of(odml.OdmlQatProvider(INT8), lambda m, x: m(x), model, x)
    expected = odml.convert(model, None, INT8, x, quant_stats=stats)
    provider = odml.OdmlConversionProvider(INT8, nnx.state(model, nnx.Param), stats)
    litert = exported(quantize_model(model, provider), x)
    assert litert.is_full_integer
    np.testing.assert_array_equal(litert(x), expected(x))


def test_traced_params_that_the_provider_does_not_know(linen):
    variables, stats, x = linen
    model = quantize_model(Mlp(), odml.OdmlConversionProvider(INT8, {}, stats))
    with pytest.raises(ValueError, match="close over the variables"):
        jax.jit(model.apply)(variables, x)

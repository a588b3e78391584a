"""Biases in 32 bits, in the scale of the products that are added to them."""

import numpy as np
import pytest
from flax import linen as nn

from qwix_train import QuantizationRule, odml
from tests.odml.small import converted, init, module, normal

INT16 = odml.OdmlQatProvider([QuantizationRule(weight_qtype="int8", act_qtype="int16")])


def constant(values):
    return lambda key, shape, dtype: np.broadcast_to(values, shape).astype(dtype)


def small_products(self, x):
    kernel = nn.initializers.normal(1e-7)
    return nn.Dense(4, kernel_init=kernel, bias_init=constant([1, 0.2, -0.5, 0.9]))(x)


def dead_channels(self, x):
    x = nn.Conv(4, (3, 3))(x)
    scale = constant([1e-6, 1, 1e-9, 0])
    return nn.BatchNorm(
        use_running_average=True, scale_init=scale, bias_init=constant(0.7)
    )(x)


def large_bias(self, x):
    kernel = nn.initializers.normal(1e-3)
    return nn.Conv(4, (3, 3), kernel_init=kernel, bias_init=constant([50, 9, 5, -7]))(x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("call", "shape", "provider"),
    [
        (small_products, (4, 8), None),
        (dead_channels, (1, 4, 4, 2), None),
        (large_bias, (1, 4, 4, 2), INT16),
    ],
)
def test_a_bias_next_to_small_products_keeps_its_value(call, shape, provider):
    model, x = module(call), normal(*shape)
    variables = init(model, x)
    litert = converted(model, variables, x, provider=provider)
    (out,) = litert.report(x)
    # LiteRT rounds otherwise near the middle between two of 16 bits.
    assert out.max_steps < (1.1 if provider else 0.01)
    assert np.abs(litert(x) - model.apply(variables, x)).max() < 5 * out.scale


def test_a_bias_in_the_one_scale_of_a_weight():
    model, x = module(small_products), normal(4, 8)
    variables = init(model, x)
    provider = odml.OdmlQatProvider(
        [QuantizationRule(weight_qtype="int8", act_qtype="int8")],
        disable_per_channel_weights=True,
    )
    litert = converted(model, variables, x, provider=provider)
    np.testing.assert_allclose(litert(x)[0], [1, 0.2, -0.5, 0.9], atol=0.01)


def test_equal_biases_of_channels_with_different_scales():
    model = module(lambda self, x: nn.Dense(4, bias_init=constant(1.0))(x))
    x = normal(4, 8)
    variables = init(model, x)
    litert = converted(model, variables, x)
    (out,) = litert.report(x)
    assert out.max_steps < 1.01
    params = {k: np.float64(p) for k, p in variables["params"]["Dense_0"].items()}
    expected = np.float64(x) @ params["kernel"] + params["bias"]
    assert np.abs(litert(x) - expected).max() < 4 * out.scale

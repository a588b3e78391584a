"""What the converter leaves in floats, or on another grid, unless it is helped."""

import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train import QuantizationRule, odml
from tests.odml.small import converted, init, module, normal


def output_in_concatenation(self, x):
    t = jnp.tanh(x)
    return t, jnp.concatenate([t, 30 * x], -1)


def output_in_maximum(self, x):
    y = nn.Dense(8)(x)
    return y, jnp.maximum(y, 30 * x)


def halved_in_maximum(self, x):
    y = x * 0.5
    return y, jnp.maximum(y, 30 * x)


def two_concatenations(self, x):
    y = nn.Dense(4)(x)
    near, far = (jnp.concatenate([y, factor * x], -1) for factor in (3, 30))
    return nn.Dense(2)(near), nn.Dense(2)(far)


def repeated_output(self, x):
    y = nn.Dense(4, bias_init=nn.initializers.normal())(x)
    return y, y, nn.relu(y)


def input_and_its_activation(self, x):
    return x, nn.relu(x)


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    "call",
    [
        output_in_concatenation,
        output_in_maximum,
        two_concatenations,
        repeated_output,
        input_and_its_activation,
    ],
)
def test_each_reader_has_the_grid_of_training(call):
    model, x = module(call), normal(4, 8)
    variables = init(model, x)
    litert = converted(model, variables, x)
    assert litert.is_full_integer, litert.ops()
    for out, expected in zip(litert.report(x), model.apply(variables, x), strict=True):
        assert out.max_steps < 1.01 and out.equal > 0.9
        # The scale is that of the output itself; of a tanh it is fixed.
        values = np.float64(expected)
        length = max(values.max(), 0) - min(values.min(), 0)
        assert out.scale == 2**-7 or out.scale == pytest.approx(length / 255, 0.05)


def test_16_bit_output_that_a_maximum_reads():
    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int16")]
    model, x = module(halved_in_maximum), normal(4, 8)
    litert = converted(model, {}, x, provider=odml.OdmlQatProvider(rules))
    first, _ = litert.report(x)
    assert first.max_steps < 1.01
    assert first.scale == pytest.approx(np.abs(x).max() / 2 / 32767, 1e-3)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("config", "value"),
    [
        (((0, 0, 0), (1, 2, 1)), 0.0),
        (((1, -1, 2), (-1, 2, 0)), 1.0),
    ],
)
def test_padding_between_elements(config, value):
    model, x = module(lambda self, x: 2.0 * lax.pad(x, value, config)), normal(4, 8)
    litert = converted(model, {}, x)
    assert litert.is_full_integer, litert.ops()
    (out,) = litert.report(x)
    assert out.equal == 1


@pytest.mark.slow
@pytest.mark.parametrize("pool", [nn.max_pool, nn.avg_pool])
def test_pooling_of_a_sequence(pool):
    model, x = module(lambda self, x: pool(x, (3,), (2,), "SAME")), normal(2, 6, 4)
    litert = converted(model, {}, x)
    assert litert.is_full_integer, litert.ops()
    (out,) = litert.report(x)
    assert out.equal == 1

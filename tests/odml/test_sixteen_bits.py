"""Activations of 16 bits: what the converter leaves undone is done."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import QuantizationRule, calib, odml

RULES = [
    QuantizationRule(weight_qtype="int8", act_qtype="int16", act_averaging="minmax")
]


def converted(call, x, rules=RULES):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return call(self, x)

    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    calibrator = calib.Calibrator(odml.OdmlQatProvider(rules))
    calibrator.wrap(jax.jit(model.apply))(variables, x)
    stats = calibrator.quant_stats
    return model, variables, odml.convert(model, variables, rules, x, quant_stats=stats)


def conv(features, **kwargs):
    return nn.Conv(features, (3, 3), bias_init=nn.initializers.normal(0.5), **kwargs)


@pytest.mark.thinned(8)
@pytest.mark.parametrize(
    "call",
    [
        lambda self, x: nn.relu(conv(6)(x)),
        lambda self, x: conv(4, feature_group_count=4)(x),
        lambda self, x: conv(4)(x) + x,
        lambda self, x: conv(4)(x) - x * 0.5 + 1.0,
        lambda self, x: nn.Dense(3)(nn.avg_pool(nn.tanh(x), (2, 2), (2, 2))),
    ],
    ids=["conv", "depthwise", "residual", "constants", "dense"],
)
def test_outputs_are_those_of_float_but_for_the_weights(call):
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    model, variables, litert = converted(call, x)
    assert litert.is_full_integer
    assert {t.dtype for op in litert.ops() for t in op.outputs} <= {"int16", "float32"}

    def rounded(path, w):
        # Weights of 8 bits, with a scale for each channel; nothing else matters here.
        if path[-1].key != "kernel":
            return w
        w = np.asarray(w, np.float64)
        scale = np.abs(w).max(tuple(range(w.ndim - 1)), keepdims=True) / 127
        return jnp.asarray(np.round(w / scale) * scale, jnp.float32)

    exact = model.apply(jax.tree_util.tree_map_with_path(rounded, variables), x)
    span = np.abs(exact).max()
    error = np.abs(litert(x) - exact) / span
    # The very largest may lie beyond the range, which was found without rounding.
    assert error.max() < 1e-3 and np.mean(error > 3e-4) < 0.01


def test_two_types_in_a_row_are_an_error():
    rules = [
        QuantizationRule(module_path="Dense_1", weight_qtype="int8", act_qtype="int16"),
        QuantizationRule(weight_qtype="int8", act_qtype="int8"),
    ]
    with pytest.raises(ValueError, match=r"Dense_0/dot_general0.*int16 codes.*int8"):
        converted(lambda self, x: nn.Dense(3)(nn.Dense(4)(x)), jnp.ones((1, 2)), rules)


def test_an_op_without_16_bits_is_an_error():
    with pytest.raises(ValueError, match="gelu0.*no 16-bit form"):
        converted(lambda self, x: nn.gelu(nn.Dense(3)(x)), jnp.ones((1, 2)))


def test_dynamic_ranges_have_8_bits():
    rule = QuantizationRule(
        weight_qtype="int8", act_qtype="int16", act_static_scale=False
    )
    with pytest.raises(ValueError, match=r"Rule 0 \(act_qtype='int16'\).*8 bits"):
        odml.OdmlQatProvider([rule])

"""What training sees is what serving will compute.

The forward of QAT, on floats, must equal the same layers computed the way a quantized
model does: codes and scales of the stored params, quantized activations, and products
of integers (or fp8 numbers, or nf4 levels) rescaled afterwards.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qwix_train
from qwix_train.core import quantize_array

TYPES = ["int8", "int4", "int3", "int2", "int1", "nf4", "float8_e4m3fn", "float8_e5m2"]


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (64, 24))
        return x @ kernel.astype(x.dtype)


class Einsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (4, 64, 6))
        return jnp.einsum("bi,hid->bhd", x, kernel.astype(x.dtype))


class Conv(nn.Module):
    groups: int = 1

    @nn.compact
    def __call__(self, x):
        shape = (3, 3, 4 // self.groups, 8)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return jax.lax.conv_general_dilated(
            x.reshape(-1, 4, 4, 4),
            kernel.astype(x.dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


def serve(model, x, weight, act):
    """The layer's output, from quantized operands."""
    if isinstance(model, Dense):
        return qwix_train.dot(act, weight)
    if isinstance(model, Einsum):
        return qwix_train.einsum("bi,hid->bhd", act, weight)
    return qwix_train.conv_general_dilated(
        act,
        weight,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=model.groups,
    )


@pytest.mark.parametrize("model", [Dense(), Einsum(), Conv(), Conv(4)], ids=repr)
@pytest.mark.parametrize("weight_qtype", TYPES)
@pytest.mark.parametrize(
    "act_qtype", [None, "int8", "float8_e4m3fn"], ids=["weight-only", "int8", "fp8"]
)
@pytest.mark.parametrize("tile_size", [None, 16])
def test_qat_forward_equals_quantized_compute(
    model, weight_qtype, act_qtype, tile_size
):
    if isinstance(model, Conv) and tile_size:
        tile_size = None  # covered by the untiled case; tiles are refused for conv
    method = "rms,1.5" if weight_qtype == "int1" else "absmax"
    rule = qwix_train.QuantizationRule(
        weight_qtype=weight_qtype,
        act_qtype=act_qtype,
        tile_size=tile_size,
        weight_calibration_method=method,
    )
    check(model, rule, jnp.float32, tolerance=2e-6)


@pytest.mark.parametrize("model", [Dense(), Einsum(), Conv()], ids=repr)
@pytest.mark.parametrize("act_method", ["minmax", "fixed,-3,3", "fixed,-1,4"])
@pytest.mark.parametrize("weight_method", ["minmax", "rms,3", "absmax,0.8"])
def test_other_ranges(model, act_method, weight_method):
    rule = qwix_train.QuantizationRule(
        weight_qtype="int8",
        act_qtype="int8",
        weight_calibration_method=weight_method,
        act_calibration_method=act_method,
    )
    check(model, rule, jnp.float32, tolerance=4e-6)


@pytest.mark.parametrize("model", [Dense(), Einsum(), Conv()], ids=repr)
def test_bfloat16(model):
    rule = qwix_train.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    check(model, rule, jnp.bfloat16, tolerance=0.02)


def check(model, rule, dtype, tolerance):
    x = jax.random.normal(jax.random.key(1), (16, 64), dtype)
    variables = model.init(jax.random.key(0), x)
    plan = qwix_train.plan(model, [rule], x, variables=variables)
    (op,) = plan.quantized_ops
    how = plan.params["kernel",].how
    assert how is not None
    weight = quantize_array(variables["params"]["kernel"], how).astype(dtype)
    side = [i for i, h in enumerate(op.activations) if h is not None]
    act = x.reshape(op.op.operands[0].shape) if isinstance(model, Conv) else x
    if side:
        act_how = op.activations[side[0]]
        assert act_how is not None
        # An einsum may put either operand on the left of its product.
        act = quantize_array(act, act_how)
    expected = serve(model, x, weight, act)

    quantized = qwix_train.quantize_model(model, qwix_train.QtProvider([rule]))
    actual = quantized.apply(variables, x)
    assert actual.dtype == dtype
    actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
    # float8_e5m2 and large ranges: relative to the size of the result.
    size = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)

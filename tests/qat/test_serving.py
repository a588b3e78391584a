"""What training sees is what serving will compute.

The forward of QAT, on floats, must equal the same layers computed the way a quantized
model does: codes and scales of the stored params, quantized activations, and products
of integers (or fp8 numbers, or nf4 levels) rescaled afterwards. It must equal what the
PTQ model of the same rules computes from the quantized params.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qwix_train
from qwix_train import ptq
from qwix_train.core.qarray import quantize_array
from tests import models
from tests.pairwise import pairwise

pytestmark = pytest.mark.optimized

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


LAYERS = [
    *itertools.product([Dense(), Einsum()], [None, 16]),
    *itertools.product([Conv(), Conv(4)], [None]),
]


@pytest.mark.thinned(39)
@pytest.mark.parametrize(
    ("layer", "weight_qtype", "act_qtype"),
    pairwise(LAYERS, TYPES, [None, "int8", "float8_e4m3fn"]),
    ids=repr,
)
def test_qat_forward_equals_quantized_compute(layer, weight_qtype, act_qtype):
    model, tile_size = layer
    method = "rms,1.5" if weight_qtype == "int1" else "absmax"
    rule = qwix_train.QuantizationRule(
        weight_qtype=weight_qtype,
        act_qtype=act_qtype,
        tile_size=tile_size,
        weight_calibration_method=method,
    )
    check(model, rule, jnp.float32, tolerance=2e-6)


@pytest.mark.thinned(12)
@pytest.mark.parametrize(
    ("model", "act_method", "weight_method"),
    pairwise(
        [Dense(), Einsum(), Conv()],
        ["minmax", "fixed,-3,3", "fixed,-1,4"],
        ["minmax", "rms,3", "absmax,0.8"],
    ),
    ids=str,
)
def test_other_ranges(model, act_method, weight_method):
    rule = qwix_train.QuantizationRule(
        weight_qtype="int8",
        act_qtype="int8",
        weight_calibration_method=weight_method,
        act_calibration_method=act_method,
    )
    check(model, rule, jnp.float32, tolerance=4e-6)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("model", [Dense(), Einsum(), Conv()], ids=repr)
def test_bfloat16(model):
    rule = qwix_train.QuantizationRule(weight_qtype="int8", act_qtype="int8")
    check(model, rule, jnp.bfloat16, tolerance=0.02)


def check(model, rule, dtype, tolerance):
    x = models.normal(16, 64, seed=1, dtype=dtype)
    params = models.params_of(model, x)
    variables = {"params": params}
    plan = qwix_train.plan(model, [rule], x, variables=variables)
    (op,) = plan.quantized_ops
    how = plan.params["kernel",].how
    assert how is not None
    side = [i for i, h in enumerate(op.activations) if h is not None]

    @jax.jit
    def served(params, x):
        weight = quantize_array(params["kernel"], how).astype(dtype)
        act = x.reshape(op.op.operands[0].shape) if isinstance(model, Conv) else x
        if side:
            act_how = op.activations[side[0]]
            assert act_how is not None
            # An einsum may put either operand on the left of its product.
            act = quantize_array(act, act_how)
        return serve(model, x, weight, act)

    quantized = qwix_train.quantize_model(model, qwix_train.QtProvider([rule]))
    actual = jax.jit(quantized.apply)(variables, x)
    assert actual.dtype == dtype
    actual, expected = (np.asarray(a, np.float64) for a in (actual, served(params, x)))
    # float8_e5m2 and large ranges: relative to the size of the result.
    size = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = x.reshape(4, -1, 16, 4)
        w = self.param("kernel", nn.initializers.lecun_normal(), (16, 4, 8))
        scores = jnp.einsum("bqhd,bkhd->bhqk", heads, heads[:, ::-1])
        return jnp.einsum("bqhd,hde->bqe", heads, w.astype(x.dtype)), scores


def conv(features=8, size=3, **kwargs):
    return nn.Conv(features, (size, size), use_bias=False, **kwargs)


PRODUCTS = {
    "dense": Dense(),
    "general": nn.DenseGeneral((3, 8), axis=-1, use_bias=False),
    "einsum": Einsum(),
    "attention": Attention(),
}
CONVOLUTIONS = {
    "conv": conv(),
    "grouped": conv(feature_group_count=2, strides=2),
    "depthwise": conv(feature_group_count=4, padding="VALID"),
    "dilated": conv(kernel_dilation=2, padding="CIRCULAR"),
    "input dilated": conv(input_dilation=2, padding=1),
    "transposed": nn.ConvTranspose(8, (3, 3), strides=(2, 2), use_bias=False),
}
STORED = ["int8", "int5", "int4", "int2", "int1", *TYPES[-3:]]
ACTS = [None, "int8", "int4", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.thinned(33)
@pytest.mark.parametrize(
    ("name", "weight_qtype", "act_qtype", "tile_size", "dtype"),
    pairwise(
        [*PRODUCTS, *CONVOLUTIONS],
        STORED,
        ACTS,
        [None, 16],
        ["float32", "bfloat16"],
        # Convolutions have no tiles.
        allowed=lambda name, _w, _a, tile_size, _d: name in PRODUCTS or not tile_size,
    ),
)
def test_qat_forward_equals_ptq_model(name, weight_qtype, act_qtype, tile_size, dtype):
    model = PRODUCTS.get(name) or CONVOLUTIONS[name]
    if name == "attention" and tile_size:
        tile_size = 4  # of the axes that its two products sum over
    rule = qwix_train.QuantizationRule(
        weight_qtype=weight_qtype, act_qtype=act_qtype, tile_size=tile_size
    )
    if hasattr(model, "dtype"):
        model = model.clone(dtype=dtype)
    shape = (16, 4, 4, 4) if name in CONVOLUTIONS else (16, 64)
    x = models.normal(*shape, seed=1, dtype=dtype)
    params = models.params_of(model, x)
    qat = qwix_train.quantize_model(model, qwix_train.QtProvider([rule]))
    quantized, stored = ptq.quantize(model, params, [rule], x)
    (kernel,) = stored.values()
    assert kernel.array.qtype == weight_qtype
    apply = jax.jit(quantized.apply)
    got, expected = (
        apply({"params": stored}, x),
        jax.jit(qat.apply)({"params": params}, x),
    )
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        tolerance = 4e-6 if dtype == "float32" else 0.02
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

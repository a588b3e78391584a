import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core.conv import conv_general_dilated
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, dequantize, quantize, quantize_array
from tests.core.reference import QTYPE_NAMES

LAYOUT = ("NHWC", "HWIO", "NHWC")


def images(qtype="int8", method="absmax", axes=(0,), features=4):
    x = np.random.default_rng(0).normal(0.5, 1, (4, 7, 6, features))
    x = jnp.asarray(x, jnp.float32)
    if qtype is None:
        return x
    return quantize(x, qtype, channelwise_axes=axes, calibration_method=method)


def kernel(qtype="int8", method="absmax", features=4, axes=(3,)):
    x = np.random.default_rng(1).normal(-0.3, 1, (3, 2, features, 8))
    x = jnp.asarray(x, jnp.float32)
    if qtype is None:
        return x
    return quantize(x, qtype, channelwise_axes=axes, calibration_method=method)


def reference(lhs, rhs, strides=(1, 1), padding="SAME", **kwargs):
    lhs, rhs = (dequantize(x) if isinstance(x, QArray) else x for x in (lhs, rhs))
    return jax.lax.conv_general_dilated(
        lhs,
        rhs,
        strides,
        padding,
        dimension_numbers=LAYOUT,
        precision="highest",
        **kwargs,
    )


def check(lhs, rhs, strides=(1, 1), padding="SAME", integers=True, **kwargs):
    def fn(lhs, rhs):
        return conv_general_dilated(
            lhs, rhs, strides, padding, dimension_numbers=LAYOUT, **kwargs
        )

    got, want = jax.jit(fn)(lhs, rhs), reference(lhs, rhs, strides, padding, **kwargs)
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6 * np.abs(want).max())
    if integers is not None:
        text = str(jax.make_jaxpr(fn)(lhs, rhs))
        assert ("preferred_element_type=int32" in text) == integers


PAIRS = [
    (a, b)
    for a, b in itertools.product(QTYPE_NAMES, repeat=2)
    if "int8" in (a, b) or (a, b) in [("int4", "int4"), ("int3", "int2")]
    or {a, b} == {"float8_e4m3fn", "float8_e5m2"}
]  # fmt: skip


@pytest.mark.thinned(24)
@pytest.mark.parametrize("lhs_type, rhs_type", PAIRS)
def test_every_pair_of_types(lhs_type, rhs_type):
    integers = lhs_type.startswith("int") and rhs_type.startswith("int")
    check(images(lhs_type), kernel(rhs_type), integers=integers)


SETTINGS = [
    {},
    dict(feature_group_count=2),
    dict(feature_group_count=4),
    dict(batch_group_count=2),
    dict(strides=(2, 1), padding="VALID"),
    dict(lhs_dilation=(2, 2), padding=((2, 1), (1, 1))),
    dict(rhs_dilation=(2, 3), padding=((3, 0), (0, 2))),
]


@pytest.mark.thinned(9)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("methods", [("absmax", "absmax"), ("minmax", "minmax")])
def test_every_kind_of_convolution(setting, methods):
    features = 4 // setting.get("feature_group_count", 1)
    # With batch groups the scale of the input is shared.
    axes = () if "batch_group_count" in setting else (0,)
    check(
        images("int8", methods[0], axes),
        kernel("int4", methods[1], features),
        **setting,
    )


@pytest.mark.parametrize("methods", [("minmax", "absmax"), ("absmax", "minmax")])
def test_a_zero_point_on_one_side(methods):
    check(images("int8", methods[0]), kernel("int8", methods[1]))


def test_what_cannot_stay_in_integers_is_dequantized():
    check(images(axes=(0,)), kernel(), batch_group_count=2, integers=False)
    check(images(axes=(3,)), kernel(), integers=False)
    check(images(), kernel(axes=(2,)), integers=False)
    check(images(None), kernel(), integers=False)
    check(images(), kernel(None), integers=False)
    how = HowToQuantize(qtype="int8", tiled_axes={3: 2})
    check(images(), quantize_array(kernel(None), how), integers=False)


def test_a_sum_that_could_overflow_is_added_in_float():
    shape, size = (1, 1, 1, 140_000), 140_000
    lhs = quantize(-jnp.ones(shape), "int8", calibration_method="fixed,1")
    rhs = quantize(-jnp.ones((1, 1, size, 1)), "int8", calibration_method="fixed,1")
    got = conv_general_dilated(lhs, rhs, (1, 1), "VALID", dimension_numbers=LAYOUT)
    want = 140_000 * float(dequantize(lhs)[0, 0, 0, 0]) ** 2
    np.testing.assert_allclose(got.ravel(), [want], rtol=1e-4)


@pytest.mark.slow
def test_default_layout_and_dtypes():
    x = quantize(jnp.ones((1, 3, 8, 8), jnp.bfloat16), "int8")
    w = quantize(jnp.ones((4, 3, 3, 3), jnp.bfloat16), "int8", channelwise_axes=(0,))
    assert conv_general_dilated(x, w, (1, 1), "SAME").dtype == jnp.bfloat16
    wide = conv_general_dilated(
        x, w, (1, 1), "SAME", preferred_element_type=jnp.float32
    )
    assert wide.dtype == jnp.float32 and wide.shape == (1, 4, 8, 8)
    plain = conv_general_dilated(dequantize(x), dequantize(w), (1, 1), "SAME")
    assert plain.dtype == jnp.bfloat16

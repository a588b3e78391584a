import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwix_train.core.how import HowToQuantize
from qwix_train.core.packed_array import pack
from qwix_train.core.qarray import (
    QArray,
    WithAux,
    calibrate,
    compute_scale_zero_point,
    dequantize,
    quantize,
    quantize_array,
    quantize_with_scale_zero_point,
    validate_qarray,
)
from tests.core.reference import QTYPE_NAMES, expand, reference_dequantized
from tests.pairwise import pairwise

INTEGERS = [f"int{bits}" for bits in range(1, 9)]
LAYOUTS = [
    {},
    dict(channelwise_axes=(0, 1)),
    dict(channelwise_axes=(1,), tiled_axes={0: 4}),
    dict(tiled_axes={0: 5}, pad_tiles=True),
]
METHODS = ["absmax", "absmax,0.6", "minmax", "rms,1.5", "fixed,-1,2"]


def has_method(qtype, method, layout):
    del layout
    return qtype in INTEGERS or method not in ("minmax", "fixed,-1,2")


@pytest.mark.thinned(9)
@pytest.mark.parametrize(
    ("qtype", "method", "layout"),
    pairwise(QTYPE_NAMES, METHODS, LAYOUTS, allowed=has_method),
    ids=str,
)
def test_nearest_values_against_a_reference(qtype, method, layout):
    x = np.random.default_rng(0).normal(0.3, 1, (12, 6)).astype(np.float32)
    how = HowToQuantize(qtype=qtype, calibration_method=method, **layout)
    q = quantize_array(jax.device_put(x), how)
    got = np.asarray(dequantize(q), np.float64)
    want = reference_dequantized(x, how)
    # On a tie both neighbors are nearest, so errors are compared, not values.
    atol = 1e-6 * np.abs(x).max()
    np.testing.assert_allclose(np.abs(got - x), np.abs(want - x), rtol=0, atol=atol)


floats = st.floats(width=32, min_value=-1e4, max_value=1e4, allow_subnormal=False)
arrays = hnp.arrays(np.float32, st.sampled_from([(1,), (3, 4)]), elements=floats)
integer_hows = st.builds(
    HowToQuantize,
    qtype=st.sampled_from(INTEGERS),
    calibration_method=st.sampled_from(
        ["absmax", "absmax,0.5", "minmax", "fixed,-3,5"]
    ),
    channelwise_axes=st.sampled_from([(), (0,), (-1,)]),
)


@pytest.mark.slow
@hypothesis.given(arrays, integer_hows)
@hypothesis.settings(max_examples=50)
def test_round_trip_error_is_half_a_step_inside_the_range(x, how):
    calibration = calibrate(jax.device_put(x), how)
    q = quantize_array(jax.device_put(x), how)
    step = expand(q.scale, x.shape) * (2 if how.qtype == "int1" else 1)
    low = expand(calibration.get("min", -calibration.get("absmax", 0)), x.shape)
    high = expand(calibration.get("max", calibration.get("absmax", 0)), x.shape)
    inside = (x >= low) & (x <= high)
    # The zero point is rounded, which shifts the range by up to half a step.
    slack = 1.0 if q.zero_point is not None else 0.5
    error = np.abs(np.asarray(dequantize(q), np.float64) - x)
    assert (error <= slack * step * (1 + 1e-5) + 1e-30)[inside].all()


@pytest.mark.slow
@hypothesis.given(arrays, integer_hows, st.integers(-8, 8))
@hypothesis.settings(max_examples=40)
def test_codes_do_not_depend_on_the_unit(x, how, exponent):
    hypothesis.assume(how.calibration_method != "fixed,-3,5")
    # A scale near the threshold counts as that of an empty range.
    hypothesis.assume(not ((np.abs(x) > 0) & (np.abs(x) < 1e-10)).any())
    one = quantize_array(jax.device_put(x), how)
    other = quantize_array(jax.device_put(x * np.float32(2.0**exponent)), how)
    # Powers of two are exact, so that even ties agree.
    np.testing.assert_array_equal(
        one.qvalue.astype(jnp.int32), other.qvalue.astype(jnp.int32)
    )


@pytest.mark.slow
@hypothesis.given(
    arrays,
    st.sampled_from(QTYPE_NAMES),
    st.sampled_from(["absmax", "rms,2", "fixed,3", "minmax"]),
)
@hypothesis.settings(max_examples=50)
def test_quantizing_again_with_the_same_scale_changes_nothing(x, qtype, method):
    hypothesis.assume(method != "minmax" or qtype in INTEGERS)
    q = quantize(jax.device_put(x), qtype, calibration_method=method)
    again = quantize_with_scale_zero_point(
        dequantize(q), q.qtype, q.scale, q.zero_point
    )
    np.testing.assert_array_equal(
        np.asarray(again.qvalue.astype(jnp.float32)),
        np.asarray(q.qvalue.astype(jnp.float32)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("qtype", QTYPE_NAMES)
def test_special_arrays(qtype):
    zero = quantize(jnp.zeros((2, 3)), qtype)
    assert (zero.scale == 1).all()
    # Binary has no zero: it becomes plus the scale, which is that of an empty range.
    want = 1.0 if qtype == "int1" else 0.0
    assert (dequantize(zero) == want).all()
    for value in (1e-40, 5.0, -5.0, 3e38):
        out = np.asarray(dequantize(quantize(jnp.full((4,), value), qtype)))
        size = 0.0 if value == 1e-40 else abs(value)
        if qtype == "int1":
            size = max(size, 2.0)
        error = np.abs(out - (value if value != 1e-40 else 0))
        # Half a step: of int1 and int2 it is half and a third of the value.
        assert (error <= size * 0.72).all()
    assert dequantize(quantize(jnp.float32(2.0), qtype)).shape == ()
    assert (
        dequantize(quantize(jnp.zeros((0, 3)), qtype, channelwise_axes=(1,))).size == 0
    )


@pytest.mark.parametrize("qtype", QTYPE_NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tile_with_nan_or_infinity_shows(qtype, bad):
    x = jnp.array([[1.0, bad, -2.0], [1.0, 2.0, 3.0]])
    out = dequantize(quantize(x, qtype, channelwise_axes=(0,)))
    assert not np.isfinite(out[0]).any()
    assert np.isfinite(out[1]).all()


def test_a_given_range_saturates():
    x = jnp.array([np.nan, np.inf, -np.inf])
    out = dequantize(quantize(x, "int8", calibration_method="fixed,1"))
    np.testing.assert_allclose(out, [0, 1, -1], atol=0.005)


def test_scale_dtype_and_astype():
    x = jnp.ones((2, 2))
    q = quantize(x, "int8", scale_dtype=jnp.bfloat16)
    assert q.dtype == dequantize(q).dtype == jnp.bfloat16
    assert q.astype(jnp.float32).dtype == jnp.float32
    with pytest.raises(ValueError, match="not to <class 'jax.numpy.int8'>"):
        q.astype(jnp.int8)


def test_a_qarray_is_a_pytree_that_looks_like_an_array():
    q = quantize(jnp.ones((3, 4)), "int3", tiled_axes={0: 1, 1: 2})
    assert (q.shape, q.ndim, q.size, len(q)) == ((3, 4), 2, 12, 3)
    assert q.scale_tile_shape == (1, 2) and q.zero_point_tile_shape is None
    assert q.nbytes == 5 + q.scale.nbytes
    doubled = jax.jit(lambda q: jax.tree.map(lambda x: x, q))(q)
    assert isinstance(doubled, QArray) and doubled.qtype == "int3"
    assert jax.eval_shape(lambda: q).qtype == "int3"
    assert QArray(q.qvalue.astype(jnp.int8), q.scale).qtype == jnp.int8
    with pytest.raises(ValueError, match="Unknown quantized type"):
        QArray(jnp.zeros(3, jnp.uint8), jnp.ones(1))


def test_with_aux_carries_how():
    how = HowToQuantize(qtype="int8", channelwise_axes=[0])
    aux = WithAux(quantize_array(jnp.ones((2, 3)), how), how)
    leaves, tree = jax.tree.flatten(aux)
    assert len(leaves) == 2 and jax.tree.unflatten(tree, leaves).how == how
    assert (aux.shape, aux.ndim, aux.dtype) == ((2, 3), 2, jnp.float32)


def test_parts_that_do_not_fit():
    q = quantize(jnp.ones((4, 6)), "int8", calibration_method="minmax")
    for broken, message in [
        (q.replace(scale=jnp.ones((1,))), "scale of shape"),
        (q.replace(scale=jnp.ones((1, 4))), "scale of shape"),
        (q.replace(zero_point=jnp.ones((3, 1), jnp.int8)), "zero_point of shape"),
        (q.replace(zero_point=jnp.ones((1, 1))), "zero point is of dtype"),
        (q.replace(scale=jnp.ones((1, 1), jnp.int32)), "scale cannot be of dtype"),
        (q.replace(qvalue=q.qvalue.astype(jnp.int32)), "wider than a byte"),
    ]:
        with pytest.raises(ValueError, match=message):
            validate_qarray(broken)
    with pytest.raises(ValueError, match="does not fit the scale"):
        quantize_with_scale_zero_point(
            jnp.ones((4, 6)), "int8", jnp.ones((1, 1)), jnp.zeros((4, 1), jnp.int8)
        )
    with pytest.raises(ValueError, match="dtype int32"):
        quantize(jnp.ones(3, jnp.int32), "int8")


def test_scale_and_zero_point_are_those_of_the_parts():
    x = jnp.array([[0.0, 1.0, 3.0]])
    how = HowToQuantize(qtype="int4", calibration_method="minmax")
    scale, zero_point = compute_scale_zero_point(calibrate(x, how), "int4")
    q = quantize_array(x, how)
    assert q.scale == scale and q.zero_point == zero_point


@pytest.mark.parametrize("storage", [jnp.int8, jnp.int4])
def test_values_that_no_array_becomes_are_refused(storage):
    codes, scale = jnp.array([[-8, 7]], storage), jnp.ones((1, 1))
    assert dequantize(QArray(codes, scale, qtype="int4")).tolist() == [[-8, 7]]
    with pytest.raises(ValueError, match="A code is -8, and int3 has those from -4 to"):
        dequantize(QArray(codes, scale, qtype="int3"))
    # Of an array that was negated: codes of an integer type have no mirror image.
    assert dequantize(QArray(codes, -scale, qtype="int4")).tolist() == [[8, -7]]
    # Of an array with NaN in it, which has to show.
    assert jnp.isnan(dequantize(QArray(codes, jnp.nan * scale, qtype="int4"))).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda array, how: (WithAux(array, how), "is quantized.*dequantize\\(param"),
        lambda array, how: (array, "QArray is not an array.*dequantize\\(array\\)"),
        lambda array, how: (pack(array), "PackedQArray is not an array.*unpack"),
    ],
)
def test_a_quantized_array_is_not_made_into_an_array_of_numbers(make):
    how = HowToQuantize(qtype="int4", tiled_axes={0: 32}, channelwise_axes=(1,))
    value, message = make(quantize_array(jnp.ones((64, 2)), how), how)
    for use in (
        np.asarray,
        jnp.asarray,
        jnp.sin,
        lambda value: jnp.ones((3, 64)) @ value,
        lambda value: np.ones((3, 64), np.float32) * value,
        lambda value: jnp.dot(jnp.ones((3, 64)), value),
    ):
        with pytest.raises(TypeError, match=message):
            use(value)


def test_a_float_model_with_quantized_params_says_so():
    params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 64)))["params"]
    how = HowToQuantize(qtype="int8", channelwise_axes=(1,))
    kernel = WithAux(quantize_array(params["kernel"], how), how)
    with pytest.raises(TypeError, match="a model that was not quantized"):
        nn.Dense(2).apply({"params": {**params, "kernel": kernel}}, jnp.ones((1, 64)))


def test_what_is_no_array_is_refused():
    for value in ([1.0, 2.0], 1.5, None):
        with pytest.raises(TypeError, match="Expected an array, got .*jnp.asarray"):
            quantize(value, "int8")
    with pytest.raises(TypeError, match="Expected a QArray, got ndarray"):
        dequantize(np.ones(3))
    how = HowToQuantize(qtype="int8")
    with pytest.raises(TypeError, match=r"got WithAux.*param\.array"):
        dequantize(WithAux(quantize(jnp.ones(3), "int8"), how))

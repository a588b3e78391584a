"""Bit for bit the results of qwix 0.1.8, run eagerly, wherever it has one.

Where a scale is broadcast, or there is one scale, all codes agree but for some on exact
ties between two codes: with the bound 127.5 the largest magnitude is one. There the
reference takes the one code or the other by the last bits of the element, and under
`jax.jit` not always the same; ours is the even code, always.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from qwix_train.core.qarray import QArray, dequantize, quantize
from tests.core.reference import QTYPE_NAMES

pytestmark = pytest.mark.optimized

LAYOUTS = [
    {},
    dict(channelwise_axes=(0,)),
    dict(channelwise_axes=(0, 1)),
    dict(channelwise_axes=(1,), tiled_axes={0: 8}),
    dict(tiled_axes={0: 0.25, 1: 6}),
]
METHODS = ["absmax", "absmax,0.8", "minmax", "minmax,0.7", "rms,3", "fixed,-2,2"]
METHODS.append("fixed,-2,3")
DTYPES = [jnp.float32, jnp.bfloat16]
# The reference's `int1` quantizes everything to zero, and it takes zero points for
# int8 and int4 only.
QTYPES = [t for t in QTYPE_NAMES if t != "int1"]
SOME = ["int8", "int3", "float8_e4m3fn", "nf4"]


def supported(qtype, method):
    symmetric = method not in ("minmax", "minmax,0.7", "fixed,-2,3")
    return symmetric or qtype in ("int8", "int4")


def theirs(x, qtype, **kwargs):
    native = dict(int8=jnp.int8, int4=jnp.int4)
    return qwix.quantize(x, native.get(qtype, qtype), **kwargs)


def ties(x, q):
    """Marks the elements that lie exactly between two codes of an integer type."""
    scale = np.asarray(q.scale, np.float64)
    zero = 0 if q.zero_point is None else np.asarray(q.zero_point, np.float64)
    for axis, n in enumerate(x.shape):
        repeats = n // scale.shape[axis]
        scale = np.repeat(scale, repeats, axis)
        zero = zero if np.ndim(zero) == 0 else np.repeat(zero, repeats, axis)
    scaled = np.asarray(x, np.float64) / scale + zero
    # A last bit of the scale decides on which side the quotient of a tie falls.
    return np.abs(scaled - np.floor(scaled) - 0.5) < 2e-5


def compare(dtype, layout, qtypes):
    x = jax.device_put(np.random.default_rng(0).normal(size=(32, 24)).astype(dtype))
    codes = on_ties = 0
    for qtype, method in itertools.product(qtypes, METHODS):
        if not supported(qtype, method):
            continue
        kwargs = dict(calibration_method=method, **layout)
        want, got = theirs(x, qtype, **kwargs), quantize(x, qtype, **kwargs)
        context = f"{qtype} {method} {layout} {dtype}"
        assert got.qvalue.dtype == want.qvalue.dtype, context
        assert got.qtype == want.qtype, context
        parts = [("scale", got.scale, want.scale), ("code", got.qvalue, want.qvalue)]
        if want.zero_point is not None:
            parts.append(("zero point", got.zero_point, want.zero_point))
        parts.append(("value", dequantize(got), qwix.dequantize(want)))
        tied = ties(x, got) if qtype.startswith("int") else np.zeros(x.shape, bool)
        for name, a, b in parts:
            a, b = (np.asarray(v.astype(np.float32)) for v in (a, b))
            if name in ("code", "value"):
                a, b = np.where(tied, 0, a), np.where(tied, 0, b)
            np.testing.assert_array_equal(a, b, f"{name} of {context}")
        # On a tie the codes are neighbors.
        apart = got.qvalue.astype(jnp.int32) - want.qvalue.astype(jnp.int32)
        if tied.any():
            assert np.abs(np.asarray(apart))[tied].max() <= 1, context
        codes += x.size
        on_ties += int(tied.sum())
    return codes, on_ties


# All layouts and types: the next test.
@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(DTYPES[0], LAYOUTS[0]), (DTYPES[1], LAYOUTS[1])], ids=str
)
def test_quantize_and_dequantize(dtype, layout, record_property):
    codes, on_ties = compare(dtype, layout, SOME)
    record_property("codes", codes)
    record_property("on_ties", on_ties)
    assert codes > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(DTYPES[0], layout) for layout in LAYOUTS]
    + [(DTYPES[1], layout) for layout in LAYOUTS[::2]],
    ids=str,
)
def test_quantize_and_dequantize_every_type(dtype, layout, record_property):
    codes, on_ties = compare(dtype, layout, QTYPES)
    record_property("codes", codes)
    record_property("on_ties", on_ties)
    print(f"{codes} codes, {on_ties} of them on exact ties")


@pytest.mark.slow
def test_compiled_reference_differs_on_ties_only():
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    )
    for method in ("absmax", "minmax", "rms,3"):
        for axes in ((), (0,), (0, 1)):
            kwargs = dict(channelwise_axes=axes, calibration_method=method)
            want = jax.jit(lambda x: theirs(x, "int8", **kwargs))(x)
            got = quantize(x, "int8", **kwargs)
            differs = np.asarray(got.qvalue) != np.asarray(want.qvalue)
            assert not (differs & ~ties(x, got)).any()


@pytest.mark.parametrize("qtype", QTYPES)
def test_dequantizing_what_the_reference_stored(qtype):
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(32, 24)).astype(jnp.bfloat16)
    )
    stored = theirs(x, qtype, tiled_axes={0: 8})
    ours = QArray(stored.qvalue, stored.scale, stored.zero_point, stored.qtype)
    np.testing.assert_array_equal(
        dequantize(ours).astype(jnp.float32),
        qwix.dequantize(stored).astype(jnp.float32),
    )


@pytest.mark.parametrize("qtype", ["mxfp8", "mxfp4"])
def test_blocks_have_the_values_of_the_reference(qtype):
    """In bfloat16 it divides in that dtype, which may round a scale down."""
    x = np.random.default_rng(0).normal(size=(64, 24)) * np.exp2(np.arange(24) - 12)
    x = jax.device_put(x.astype(np.float32))
    layout = dict(channelwise_axes=(1,), tiled_axes={0: 32})
    want, got = theirs(x, qtype, **layout), quantize(x, qtype, **layout)
    np.testing.assert_array_equal(got.float_scale, want.scale.astype(jnp.float32))
    assert got.dtype == want.dtype and got.qtype == want.qtype
    values = [dequantize(got), qwix.dequantize(want)]
    np.testing.assert_array_equal(*(v.astype(jnp.float32) for v in values))


def test_nvfp4_of_a_tensor_whose_scale_is_one():
    """The reference has no scale of the tensor: as if it were 1."""
    x = np.random.default_rng(0).normal(size=(64, 24)) * np.exp2(np.linspace(-4, 8, 24))
    x[0, 0] = 6 * 448
    x = jax.device_put(x.astype(np.float32))
    layout = dict(channelwise_axes=(1,), tiled_axes={0: 16})
    want, got = theirs(x, "nvfp4", **layout), quantize(x, "nvfp4", **layout)
    assert got.tensor_scale is not None and got.tensor_scale.item() == 1
    np.testing.assert_array_equal(got.float_scale, want.scale.astype(jnp.float32))
    np.testing.assert_array_equal(dequantize(got), qwix.dequantize(want))


@pytest.mark.parametrize(
    "qtype", ["float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"]
)
def test_floats_have_the_values_of_the_reference(qtype):
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    )
    layout = dict(channelwise_axes=(1,), tiled_axes={0: 8})
    want = theirs(x, getattr(jnp, qtype), **layout)
    got = quantize(x, qtype, **layout)
    np.testing.assert_array_equal(got.scale, want.scale)
    np.testing.assert_array_equal(dequantize(got), qwix.dequantize(want))

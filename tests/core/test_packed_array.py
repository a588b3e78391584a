"""Packed arrays: the codes bit for bit, the scales within half a step, the size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qwix_train.core import packed_array
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, dequantize, quantize, quantize_array

NF4 = HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 64})


def array(*shape, seed=0, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def nibbles(packed, layout):
    """The bits of the codes, one by one as the layout says."""
    values = np.moveaxis(np.asarray(packed), layout.axis, -1)
    out = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), np.int64)
    half = layout.tile // 2
    for i in range(values.shape[-1]):
        first = i // half * layout.tile + i % half
        out[..., first] = values[..., i] % 16
        out[..., first + half] = values[..., i] // 16
    return np.moveaxis(out[..., : layout.length], -1, layout.axis)


def as_bits(codes):
    return np.asarray(codes).astype(np.int64) % 16


LAYOUTS = {  # shape, the tiled axis, the tile, layer axes: the packed axis, its tile
    "rows": ((128, 24), 0, 64, 0, -2, 64),
    "columns": ((5, 48), 1, 16, 0, -1, 16),
    "layers": ((3, 6, 8, 5), 2, 4, 1, -2, 4),
    "odd tiles": ((9, 12), 0, 3, 0, -1, 4),
    "a shorter tile": ((22, 6), 0, 8, 0, -2, 2),
    "odd everywhere": ((9, 5), 0, 3, 0, -1, 2),
    "one number": ((1,), 0, 1, 0, -1, 2),
}


@pytest.mark.thinned(15)
@pytest.mark.parametrize("qtype", ["nf4", "int4"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_are_kept(name, qtype):
    shape, axis, tile, layers, packed_axis, packed_tile = LAYOUTS[name]
    scale_shape = list(shape)
    scale_shape[axis] = -(-shape[axis] // tile)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, shape) - (8 if qtype == "int4" else 0)
    codes = jnp.asarray(codes, "uint4" if qtype == "nf4" else "int4")
    q = QArray(codes, jnp.full(scale_shape, 0.5), None, qtype)
    packed = packed_array.pack(q, layers)
    assert (packed.shape, packed.dtype, packed.qtype) == (q.shape, q.dtype, q.qtype)
    assert packed.layer_axes == layers
    assert (packed.layout.axis, packed.layout.tile) == (packed_axis, packed_tile)
    bits = nibbles(packed.packed, packed.layout)
    np.testing.assert_array_equal(bits, as_bits(codes))
    back = packed_array.unpack(packed)
    assert back.qvalue.dtype == codes.dtype
    np.testing.assert_array_equal(as_bits(back.qvalue), as_bits(codes))
    np.testing.assert_allclose(back.scale, 0.5, rtol=1e-6)


SCALES = (2, 10, 30)


def both_ways(scale):
    codes = jnp.ones((2, 40, 30), jnp.int4)
    packed = packed_array.pack(QArray(codes, scale, None, "int4"), 1)
    return packed, packed_array.unpack(packed).scale


@settings(max_examples=100)
@given(
    st.integers(0, 999), st.floats(-5, 5), st.floats(0, 3), st.sampled_from([0.0, 0.5])
)
def test_scales_are_within_half_a_step(seed, magnitude, spread, zeros):
    rng = np.random.default_rng(seed)
    scale = 10**magnitude * np.exp(spread * rng.normal(size=SCALES))
    scale = np.where(rng.random(SCALES) < zeros, 1e-30, scale).astype(np.float32)
    packed, back = jax.jit(both_ways)(scale)
    exact = scale.astype(np.float64).reshape(2, -1)
    mean = exact.mean(1, keepdims=True)
    np.testing.assert_allclose(packed.scale_mean, mean[:, 0], rtol=1e-5)
    for start, step in ((0, packed.scale_steps[:, 0]), (256, packed.scale_steps[:, 1])):
        block = slice(start, start + 256)
        want = np.abs(exact - mean)[:, block].max(1) / 127
        rounding = 1e-6 * np.abs(exact).max()
        np.testing.assert_allclose(step, want, rtol=1e-4, atol=rounding)
        error = np.abs(np.asarray(back, np.float64).reshape(2, -1) - exact)[:, block]
        assert np.all(error <= want[:, None] / 2 + rounding)
    assert np.all(np.asarray(back) >= 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_most_4_13_bits(dtype):
    x = array(768, 1024, dtype=dtype)
    packed = packed_array.quantize_packed(x, NF4)
    assert {a.dtype.itemsize for a in jax.tree.leaves(packed)} == {1, 4}
    on_device = sum(np.asarray(a).nbytes for a in jax.tree.leaves(packed))
    assert packed.nbytes == on_device
    assert packed.bits_per_param == on_device * 8 / x.size <= 4.13
    assert packed_array.unpack(packed).dtype == packed.dtype == dtype


@pytest.mark.slow
@pytest.mark.parametrize("qtype", ["nf4", "int4"])
def test_quantizes_as_in_two_steps(qtype):
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0, 2), tiled_axes={1: 16})
    x = array(3, 64, 40).at[1].multiply(50).at[2, :16].set(0)
    got = packed_array.quantize_packed(x, how, 1)
    want = packed_array.pack(quantize_array(x, how), 1)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    shapes = jax.eval_shape(lambda x: packed_array.quantize_packed(x, how, 1), x)
    assert jax.tree.structure(shapes) == jax.tree.structure(got)


@pytest.mark.slow
def test_each_layer_is_one_of_its_own():
    how = HowToQuantize(qtype="nf4", channelwise_axes=(0, 2), tiled_axes={1: 16})
    x = array(3, 64, 40) * jnp.array([1.0, 100.0, 0.01])[:, None, None]
    packed = packed_array.quantize_packed(x, how, 1)
    one = HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 16})

    def step(carry, layer):
        return carry, dequantize(packed_array.unpack(layer))

    _, scanned = jax.lax.scan(step, None, packed)
    mapped = jax.vmap(lambda a: dequantize(packed_array.unpack(a)))(packed)
    for i in range(3):
        alone = packed_array.quantize_packed(x[i], one)
        layer = jax.tree.map(lambda a, i=i: a[i], packed)
        np.testing.assert_array_equal(layer.packed, alone.packed)
        np.testing.assert_array_equal(layer.scale_codes, alone.scale_codes)
        want = dequantize(packed_array.unpack(alone))
        np.testing.assert_allclose(scanned[i], want, rtol=1e-6)
        np.testing.assert_allclose(mapped[i], want, rtol=1e-6)


@pytest.mark.slow
def test_tiles_of_zeros_do_not_coarsen_the_others():
    x = 0.02 * array(256, 32).at[:64].set(0)
    q = quantize_array(x, NF4)
    packed = packed_array.pack(q)
    assert float(q.scale.max()) == 1  # that of the zeros
    assert float(packed.scale_steps.max()) < 1e-3
    back = packed_array.unpack(packed)
    np.testing.assert_array_equal(dequantize(back)[:64], 0)
    np.testing.assert_allclose(back.scale[1:], q.scale[1:], atol=2e-4)


@pytest.mark.slow
def test_zero_points():
    x = 0.1 * (array(64, 8) + 1).at[32:].set(0)
    q = quantize(
        x, "int4", channelwise_axes=[1], tiled_axes={0: 32}, calibration_method="minmax"
    )
    packed = packed_array.pack(q)
    how = HowToQuantize(
        qtype="int4",
        channelwise_axes=(1,),
        tiled_axes={0: 32},
        calibration_method="minmax",
    )
    got = packed_array.quantize_packed(x, how)
    jax.tree.map(np.testing.assert_array_equal, got, packed)
    back = packed_array.unpack(packed)
    np.testing.assert_array_equal(as_bits(back.zero_point), as_bits(q.zero_point))
    assert back.zero_point.dtype == q.zero_point.dtype
    np.testing.assert_array_equal(as_bits(back.qvalue), as_bits(q.qvalue))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a", "b"), P(None, "b"), P(("a", "b"))], ids=str)
def test_sharded(spec, kind):
    x = array(512, 64)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, spec)
    want = packed_array.quantize_packed(x, NF4)
    with jax.set_mesh(mesh):
        got = packed_array.quantize_packed(jax.device_put(x, sharding), NF4)
        unpacked = jax.jit(packed_array.unpack)(got)
    for part in (got.packed, got.scale_codes, unpacked.qvalue, unpacked.scale):
        assert part.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(got.packed, want.packed)
    np.testing.assert_allclose(got.scale_steps, want.scale_steps, rtol=1e-5)
    with jax.set_mesh(mesh):
        values = jax.device_get(dequantize(unpacked))
    np.testing.assert_allclose(values, dequantize(packed_array.unpack(want)), rtol=1e-4)


def test_refuses_what_it_cannot_pack():
    with pytest.raises(ValueError, match="int8 are not packed in pairs"):
        packed_array.pack(quantize(array(4, 4), "int8"))
    with pytest.raises(ValueError, match="shape \\(4,\\) with 1 axes of layers"):
        packed_array.pack(quantize(array(4), "nf4"), 1)
    q = quantize(array(4, 4), "nf4")
    with pytest.raises(ValueError, match="scale of shape"):
        packed_array.pack(QArray(q.qvalue, jnp.ones((3, 1)), None, "nf4"))

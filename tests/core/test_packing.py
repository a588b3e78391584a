import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwix_train.core import numerics, packing
from tests.pairwise import pairwise

PACKED = ["int1", "int2", "int3", "int4", "int5", "int6", "int7", "nf4"]


def random_codes(qtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    if qtype == "int1":
        codes = rng.choice([-1, 1], size=shape)
    elif qtype == "nf4":
        codes = rng.integers(0, 16, size=shape)
    else:
        low, high = numerics.code_range(qtype)
        codes = rng.integers(low, high + 1, size=shape)
    return jnp.asarray(codes, numerics.storage_dtype(qtype))


def reference(codes, qtype, axis):
    """The stream of bits, lowest first, of whole groups of codes."""
    bits = numerics.qtype_bits(qtype)
    values = np.moveaxis(np.asarray(codes).astype(np.int64), axis, -1)
    values = (values > 0).astype(np.int64) if bits == 1 else values % 2**bits
    stream = (values[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(*values.shape[:-1], -1)
    group = np.lcm(bits, 8)
    pad = [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % group)]
    packed = np.packbits(
        np.pad(stream, pad).astype(np.uint8), axis=-1, bitorder="little"
    )
    return np.moveaxis(packed, -1, axis)


@pytest.mark.slow
@settings(max_examples=25)  # each compiles two programs
@given(
    qtype=st.sampled_from(PACKED),
    shape=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    data=st.data(),
)
def test_packs_as_the_reference_does_and_back(qtype, shape, data):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    codes = random_codes(qtype, shape, data.draw(st.integers(0, 99)))
    packed = packing.pack(codes, qtype, axis)
    assert packed.dtype == jnp.uint8
    assert packed.shape == packing.packed_shape(shape, qtype, axis)
    np.testing.assert_array_equal(packed, reference(codes, qtype, axis))
    back = packing.unpack(packed, qtype, shape[axis], axis)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("qtype", PACKED)
def test_every_bit_of_a_type_is_used(qtype):
    codes = random_codes(qtype, (64, 128))
    assert packing.pack(codes, qtype).nbytes == codes.size * (
        numerics.qtype_bits(qtype) / 8
    )


@pytest.mark.thinned(7)
@pytest.mark.parametrize(
    ("spec", "qtype", "kind"),
    pairwise(
        [("a", "b"), (None, "b"), (("a", "b"), None)],
        PACKED,
        [AxisType.Auto, AxisType.Explicit],
    ),
    ids=str,
)
def test_shards_are_packed_where_they_are(qtype, spec, kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    whole = random_codes(qtype, (16, 64))
    codes = jax.device_put(whole, sharding)
    axis = packing.packing_axis(codes.shape, qtype, sharding)
    assert axis is not None
    packed = packing.pack(codes, qtype, axis)
    assert packed.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(packed, reference(whole, qtype, axis))
    back = packing.unpack(packed, qtype, codes.shape[axis], axis)
    assert back.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(back, whole)


def test_the_axis_is_the_last_one_that_wastes_nothing():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def axis(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return packing.packing_axis(shape, "int4", sharding)

    assert axis((4, 6)) == 1
    assert axis((4, 7)) == 0
    assert axis((5, 7)) == 1
    assert axis((5, 8), None, "d") == 0  # one code in a shard of axis 1
    assert axis((5, 16), None, "d") == 1
    assert axis((8,), "d") is None


def test_shards_that_split_a_group_are_refused():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    codes = jax.device_put(random_codes("int4", (8,)), sharding)
    with pytest.raises(ValueError, match="does not hold a multiple of 2 codes"):
        packing.pack(codes, "int4")
    packed = jax.device_put(jnp.zeros(8, jnp.uint8), sharding)
    with pytest.raises(ValueError, match="does not hold whole groups"):
        packing.unpack(packed, "int4", 15)


def test_wrong_lengths_and_types_are_refused():
    with pytest.raises(ValueError, match="5 codes of int4 along axis 0 are not packed"):
        packing.unpack(jnp.zeros(2, jnp.uint8), "int4", 5)
    with pytest.raises(ValueError, match="int8 fill a byte"):
        packing.pack(jnp.zeros(4, jnp.int8), "int8")

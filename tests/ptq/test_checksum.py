import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwix_train.ptq.stored_arrays import checksum

DTYPES = ["bool", "int8", "uint8", "int32", "float8_e4m3fn", "bfloat16", "float32"]


def reference(array):
    """MurmurHash3's 32-bit finalizer of each word and its position, summed up."""
    array = np.asarray(array)
    total, mask = 0, 2**32 - 1
    for i, word in enumerate(array.view(f"u{array.dtype.itemsize}").ravel().tolist()):
        h = word ^ (i * 0x9E3779B1 & mask)
        h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
        total += h ^ (h >> 16)
    return total & mask


def random_array(dtype, shape):
    x = np.random.default_rng(0).normal(size=shape) * 100
    return jax.device_put(x > 0 if dtype == "bool" else x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2)])
def test_it_is_what_the_reference_gives(dtype, shape):
    x = random_array(dtype, shape)
    assert int(checksum(x)) == reference(x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("a", "b"), (None, "b"), (("b", "a"), None), ()])
def test_it_does_not_depend_on_the_sharding(spec, kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    x = random_array("float32", (16, 24))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert int(checksum(sharded)) == reference(x)


@given(st.integers(0, 34), st.integers(0, 31))
def test_any_flipped_bit_changes_it(index, bit):
    x = np.asarray(random_array("float32", (5, 7)))
    y = x.copy()
    y.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
    assert int(checksum(x)) != int(checksum(y))


def test_swapped_rows_change_it():
    x = random_array("float32", (5, 7))
    assert int(checksum(x)) != int(checksum(x[::-1]))

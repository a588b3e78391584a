"""Params quantized as they are: the same bits as the compiled function gives."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.core.compiled import quantize_compiled
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, quantize_array
from tests.pairwise import pairwise
from tests.spellings import data

pytestmark = pytest.mark.optimized


def same(a: QArray, b: QArray) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        np.testing.assert_array_equal(x, y)


@pytest.mark.thinned(15)
@pytest.mark.parametrize(
    ("options", "dtype", "shape"),
    pairwise(
        [
            {"qtype": "int8"},
            {"qtype": "int4"},
            {"qtype": "int4", "calibration_method": "minmax"},
            {"qtype": "int3", "tiled_axes": {0: 4}},
            {"qtype": "int1"},
            {"qtype": "nf4"},
            {"qtype": "float8_e4m3fn"},
        ],
        ["float32", "bfloat16"],
        [(8, 5), (8,)],
    ),
    ids=str,
)
def test_the_same_bits(options, dtype, shape):
    how = HowToQuantize(channelwise_axes=tuple(range(1, len(shape))), **options)
    x = jnp.asarray(data(*shape, seed=1), dtype)
    expected = quantize_array(x, how)
    same(quantize_compiled(x, how), expected)
    same(quantize_compiled(np.asarray(x), how), expected)
    same(jax.jit(lambda x: quantize_compiled(x, how))(x), expected)


def test_codes_stay_on_the_device_of_the_array():
    how = HowToQuantize(qtype="int4", channelwise_axes=(1,))
    x = jax.device_put(data(8, 6, seed=1))
    assert not quantize_compiled(x, how).qvalue.committed
    device = jax.devices()[3]
    moved = quantize_compiled(jax.device_put(x, device), how)
    assert moved.qvalue.devices() == moved.scale.devices() == {device}
    assert moved.qvalue.committed
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P(None, "a"))
    spread = quantize_compiled(jax.device_put(x, sharding), how)
    assert spread.qvalue.sharding == sharding
    same(spread, quantize_array(x, how))

"""The same bits, whatever executes: eager, compiled, vectorized, sharded."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwix_train.core import numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import dequantize, quantize_array
from qwix_train.core.scaling import scaled_values
from tests.compare import assert_same

pytestmark = pytest.mark.optimized

SHAPE = (48, 40)
METHODS = [
    "absmax",
    "absmax,0.7",
    "minmax",
    "minmax,0.7",
    "fixed,-1.3,1.7",
    "fixed,1.3",
]
LAYOUTS = [
    {},
    dict(channelwise_axes=(0,)),
    dict(channelwise_axes=(0, 1)),
    dict(channelwise_axes=(1,), tiled_axes={0: 6}),
    dict(tiled_axes={1: 12}, pad_tiles=True),
]


def sample(dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), dtype)


def run(x, how):
    q = quantize_array(x, how)
    return q.qvalue, q.scale, q.zero_point, dequantize(q)


def variants(x, how):
    """Yields results of every execution, in the shape of one eager run."""
    fn = lambda x: run(x, how)  # noqa: E731
    yield jax.jit(fn)(x)
    yield jax.jit(lambda: fn(x))()  # The array is a constant.
    yield jax.tree.map(lambda y: y[1], jax.jit(jax.vmap(fn))(jnp.stack([-x, x])))
    mesh = Mesh(np.array(jax.devices()), ("d",))
    for spec in (P("d"), P(None, "d")):
        yield jax.jit(fn)(jax.device_put(x, NamedSharding(mesh, spec)))


CASES = [
    (method, layout, qtype, dtype)
    for method, layout in itertools.product(METHODS, LAYOUTS)
    for qtype, dtype in [("int8", jnp.float32), ("int4", jnp.bfloat16)]
]
ALL = [
    (method, layout, qtype, dtype)
    for method, layout, qtype, dtype in itertools.product(
        METHODS, LAYOUTS, numerics.QTYPE_NAMES, [jnp.float32, jnp.bfloat16, jnp.float16]
    )
    if numerics.is_integer_qtype(qtype)
    or method in ("absmax", "absmax,0.7", "fixed,1.3")
]


def check(method, layout, qtype, dtype):
    how = HowToQuantize(qtype=qtype, calibration_method=method, **layout)
    x = sample(dtype)
    want = run(x, how)
    for got in variants(x, how):
        assert_same(got, want)


@pytest.mark.thinned(11)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_same_codes_everywhere(case):
    check(*case)


# Each case compiles five programs. Every thirteenth still has each type, and any two of
# method, layout and dtype.
@pytest.mark.slow
@pytest.mark.parametrize("case", ALL[::13], ids=str)
def test_same_codes_everywhere_for_every_type(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_root_mean_square_unless_sharded(dtype):
    how = HowToQuantize(
        qtype="int8", channelwise_axes=(1,), calibration_method="rms,2.5"
    )
    x = sample(dtype)
    want = run(x, how)
    results = list(variants(x, how))
    for got in results[:3]:
        assert_same(got, want)
    for got in results[3:]:
        # Another order of addition: the last bit of a scale.
        np.testing.assert_allclose(
            got[1].astype(jnp.float32), want[1].astype(jnp.float32), rtol=1e-6
        )


def test_a_scale_that_is_a_constant():
    x = sample(jnp.float32)
    for shape in [(1, 1), (1, 40), SHAPE]:
        scale = np.random.default_rng(2).uniform(0.01, 0.02, shape).astype(np.float32)
        zero = jnp.full(shape, -3, jnp.int8)
        eager = scaled_values(x, jnp.asarray(scale), zero)
        folded = jax.jit(lambda x: scaled_values(x, jnp.asarray(scale), zero))(x)
        assert_same(folded, eager)


def test_the_product_and_the_sum_are_rounded_apart():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    scale, zero = np.float32([[0.013]]), np.int8([[-3]])
    want = x * (1 / scale) + zero.astype(np.float32)
    got = jax.jit(scaled_values)(x, scale, zero)
    np.testing.assert_array_equal(got, want)

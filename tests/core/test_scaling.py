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
from tests.core.reference import QTYPE_NAMES
from tests.pairwise import pairwise

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
    return jax.device_put(np.random.default_rng(seed).normal(size=SHAPE).astype(dtype))


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


def cases():
    """Any two of method, layout and dtype, and types that take turns."""
    turns = {True: itertools.cycle(INTEGERS), False: itertools.cycle(OTHERS)}
    symmetric = ("absmax", "absmax,0.7", "fixed,1.3")
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16]
    for i, (method, layout, dtype) in enumerate(pairwise(METHODS, LAYOUTS, dtypes)):
        # Types that are no integers have no zero point.
        qtype = next(turns[method not in symmetric or i % 2 == 0])
        yield method, layout, qtype, dtype


INTEGERS = [t for t in QTYPE_NAMES if numerics.is_integer_qtype(t)]
OTHERS = [t for t in QTYPE_NAMES if t not in INTEGERS]
CASES = list(cases())


def check(method, layout, qtype, dtype):
    how = HowToQuantize(qtype=qtype, calibration_method=method, **layout)
    x = sample(dtype)
    want = run(x, how)
    for got in variants(x, how):
        assert_same(got, want)


# Each case compiles five programs.
@pytest.mark.thinned(40)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_codes_everywhere(case):
    check(*case)


def test_the_cases_have_all_types():
    assert {qtype for _, _, qtype, _ in CASES} == set(QTYPE_NAMES)


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
        eager = scaled_values(x, jax.device_put(scale), zero)
        folded = jax.jit(lambda x: scaled_values(x, jax.device_put(scale), zero))(x)
        assert_same(folded, eager)


def test_the_product_and_the_sum_are_rounded_apart():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    scale, zero = np.float32([[0.013]]), np.int8([[-3]])
    want = x * (1 / scale) + zero.astype(np.float32)
    got = jax.jit(scaled_values)(x, scale, zero)
    np.testing.assert_array_equal(got, want)

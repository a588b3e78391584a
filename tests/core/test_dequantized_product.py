"""Products with packed weights: values, derivatives, and what they keep in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qwix_train.core.dequantized_product import dequantized_product
from qwix_train.core.how import HowToQuantize
from qwix_train.core.packed_array import quantize_packed, unpack
from qwix_train.core.qarray import dequantize
from tests import compare

HOW = HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 64})
STACKED = HowToQuantize(qtype="nf4", channelwise_axes=(0, 2), tiled_axes={1: 64})

assert_close = functools.partial(compare.assert_close, tolerance=1e-5, of_largest=True)


def array(*shape, seed=0, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def weight_of(packed):
    return dequantize(unpack(packed))


def product(x, packed):
    return dequantized_product(jnp.matmul, weight_of, x, packed)


def loss(x, packed):
    return jnp.sum(jnp.square(product(x, packed)))


def exact(x, packed):
    """The loss and its derivative, in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(weight_of(packed), np.float64)
    return np.square(x @ w).sum(), 2 * (x @ w) @ w.T


X, PACKED = array(16, 128), quantize_packed(array(128, 96, seed=1), HOW)

TRANSFORMS = {
    "eager": lambda x: jax.grad(loss)(x, PACKED),
    "jit": lambda x: jax.jit(jax.grad(loss))(x, PACKED),
    "remat": lambda x: jax.jit(jax.grad(jax.checkpoint(loss)))(x, PACKED),
    "a batch of rows": lambda x: jax.jit(
        jax.vmap(jax.grad(loss), (0, None), axis_size=16)
    )(x, PACKED),
    "within a batch": lambda x: jax.grad(
        lambda x: jax.vmap(loss, (0, None))(x, PACKED).sum()
    )(x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivative(name):
    assert_close(TRANSFORMS[name](X), exact(X, PACKED)[1])


@pytest.mark.slow
def test_bfloat16():
    x = X.astype(jnp.bfloat16)
    packed = quantize_packed(array(128, 96, seed=1, dtype=jnp.bfloat16), HOW)
    out, pullback = jax.vjp(lambda x: product(x, packed), x)
    (dx,) = pullback(jnp.ones_like(out))
    assert out.dtype == dx.dtype == jnp.bfloat16
    w = np.asarray(weight_of(packed), np.float64)
    assert_close(out, np.asarray(x, np.float64) @ w, tolerance=1e-2)
    assert_close(dx, np.ones(out.shape) @ w.T, tolerance=1e-2)


@pytest.mark.slow
def test_scan_over_layers():
    w = array(3, 128, 128, seed=2) / 12
    packed = quantize_packed(w, STACKED, 1)

    def run(x):
        return jax.lax.scan(lambda x, p: (product(x, p), None), x, packed)[0].sum()

    want = np.ones((16, 128))
    for layer in np.asarray(weight_of(packed), np.float64)[::-1]:
        want = want @ layer.T
    assert_close(jax.jit(jax.grad(run))(X), want)


@pytest.mark.slow
def test_a_batch_of_weights():
    packed = quantize_packed(array(3, 128, 32, seed=2), STACKED, 1)
    got = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(X, packed)
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], packed)
        assert_close(got[i], exact(X, layer)[1])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("rows", [None, "b"])
def test_sharded(kind, rows):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))

    def put(x, *names):
        return jax.device_put(x, NamedSharding(mesh, P(*names)))

    with jax.set_mesh(mesh):
        packed = jax.tree.map(put, PACKED)
        packed = packed.replace(packed=put(packed.packed, None, rows))
        got = jax.jit(jax.grad(loss))(put(X, "a"), packed)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P("a")), 2)
    assert_close(got, exact(X, PACKED)[1])


def test_shard_map():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a")
    )
    assert_close(jax.jit(mapped)(X, PACKED), exact(X, PACKED)[1])


def test_no_rows():
    assert jax.grad(loss)(X[:0], PACKED).shape == (0, 128)


@pytest.mark.slow
def test_one_float_weight_at_a_time():
    layers, size, rows = 8, 256, 16
    packed = [quantize_packed(array(size, size, seed=i), HOW) for i in range(layers)]
    one = size * size * 4

    def run(x, weights, product):
        for weight in weights:
            x = jnp.tanh(product(x, weight))
        return x.sum()

    def temporary(weights, product):
        step = jax.jit(jax.value_and_grad(lambda x, w: run(x, w, product)))
        compiled = step.lower(array(rows, size), weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    in_float = temporary([weight_of(p) for p in packed], jnp.matmul)
    assert temporary(packed, product) <= in_float + 2 * one
    # It is the tie to the activations that does it.
    kept = temporary(packed, lambda x, p: x @ weight_of(p))
    assert kept >= in_float + (layers - 1) * one


def test_refuses_forward_mode():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: product(x, PACKED), (X,), (X,))


@pytest.mark.slow
@pytest.mark.optimized
def test_levels_are_not_broadcast_ahead_of_a_loop_over_layers():
    layers, size, rows = 4, 256, 16
    packed = [quantize_packed(array(size, size, seed=i), HOW) for i in range(layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *packed)

    def temporary(weights, product):
        def loss(x, weights):
            step = jax.checkpoint(lambda x, w: (jnp.tanh(product(x, w)), None))
            return jax.lax.scan(step, x, weights)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(array(rows, size), weights).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    in_float = temporary(jnp.stack([weight_of(p) for p in packed]), jnp.matmul)
    assert temporary(stacked, product) <= in_float + 2 * size * size * 4

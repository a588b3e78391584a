"""Products of float arrays and quantized weights, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwix_train.core.dot_general import dot_general
from qwix_train.core.qarray import QArray, dequantize, quantize
from tests import compare

NUMBERS = (((1,), (0,)), ((), ()))
# Large enough for a loop of blocks.
SIZE = (2048, 1024)

assert_close = functools.partial(compare.assert_close, tolerance=3e-6, of_largest=True)


def array(*shape, seed=0, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def weight(qtype, shape=SIZE, tile=None, method="absmax", dtype=jnp.float32):
    return quantize(
        array(*shape, dtype=dtype),
        qtype,
        channelwise_axes=(1,),
        tiled_axes={0: tile} if tile else None,
        calibration_method=method,
    )


def exact(x):
    return np.asarray(dequantize(x) if isinstance(x, QArray) else x, np.float64)


def product(x, q):
    return dot_general(x, q, NUMBERS)


def loss(x, q):
    return jnp.sum(jnp.square(product(x, q)))


WEIGHTS = {
    "int8": {},
    "int4": {},
    "int3": {"tile": 16},
    "nf4": {"tile": 128},
    "float8_e5m2": {},
}


@pytest.mark.thinned(16)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("qtype", WEIGHTS)
def test_value_and_gradient(qtype, rows):
    q, x = weight(qtype, **WEIGHTS[qtype]), array(rows, SIZE[0], seed=1)
    value, grad = jax.jit(jax.value_and_grad(loss))(x, q)
    want = exact(x) @ exact(q)
    np.testing.assert_allclose(value, np.square(want).sum(), rtol=1e-5)
    assert_close(grad, 2 * want @ exact(q).T)


@pytest.mark.slow
def test_gradient_of_the_scale():
    x = array(4, SIZE[0], seed=1)
    for q in (weight("int8"), weight("int4", tile=256, method="minmax")):
        grad = jax.grad(lambda s, q=q: loss(x, q.replace(scale=s)))(q.scale)
        codes = exact(q.replace(scale=jnp.ones_like(q.scale)))
        outer = 2 * exact(x).T @ (exact(x) @ exact(q)) * codes
        want = outer.reshape(len(q.scale), -1, SIZE[1]).sum(1)
        assert_close(grad, want, tolerance=1e-5)


@pytest.mark.slow
def test_forward_mode_and_second_order():
    q, x, t = weight("nf4"), array(2, SIZE[0], seed=1), array(2, SIZE[0], seed=2)
    out, tangent = jax.jvp(lambda x: product(x, q), (x,), (t,))
    assert_close(out, exact(x) @ exact(q))
    assert_close(tangent, exact(t) @ exact(q))
    # The loss is quadratic, so the Hessian at t is the gradient at t.
    hessian_product = jax.jvp(jax.grad(lambda x: loss(x, q)), (x,), (t,))[1]
    assert_close(hessian_product, 2 * exact(t) @ exact(q) @ exact(q).T)


@pytest.mark.slow
def test_the_way_back_keeps_codes_only():
    q, x = weight("int4", tile=128), array(4, SIZE[0], seed=1)
    _, back = jax.vjp(lambda x: product(x, q), x)
    kept = jax.tree.leaves(back)
    assert sum(a.size for a in kept if a.dtype == jnp.float32) < q.size / 50
    memory = jax.jit(jax.grad(loss)).lower(x, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * q.size


@pytest.mark.optimized
@pytest.mark.parametrize("act_qtype", [None, "int8"])
@pytest.mark.parametrize(("qtype", "tile"), [("int8", None), ("int4", 32)])
def test_a_loop_over_tokens_holds_no_float_weights(qtype, tile, act_qtype):
    """XLA would take the conversion out of the loop, for all weights at once."""
    weights = [
        quantize(
            array(512, 512, seed=i), qtype, channelwise_axes=(1,), tiled_axes=tiles
        )
        for i, tiles in enumerate([{0: tile} if tile else {}] * 4)
    ]

    def decode(weights, x):
        def step(x, _):
            for q in weights:
                x = x / jnp.linalg.norm(x)
                a = x if act_qtype is None else quantize(x, act_qtype)
                x = product(a, q)
            return x, x

        return jax.lax.scan(step, x, length=3)[0]

    compiled = jax.jit(decode).lower(weights, array(1, 512)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 512**2
    want = exact(array(1, 512))
    for q in weights * 3:
        want = want / np.linalg.norm(want) @ exact(q)
    got = compiled(weights, array(1, 512))
    # Codes of activations are off by half a step of 127 at most, in each product.
    error = 1e-5 if act_qtype is None else 0.3
    assert np.linalg.norm(got - want) < error * np.linalg.norm(want)


@pytest.mark.parametrize("transform", [lambda f: f, jax.grad], ids=["value", "grad"])
def test_a_batch_of_rows_is_a_matrix(transform):
    q, x = weight("int8"), array(3, SIZE[0], seed=1)

    def one(row):
        out = dot_general(row, q, (((0,), (0,)), ((), ())))
        return out if transform is not jax.grad else jnp.sum(jnp.square(out))

    got = jax.jit(jax.vmap(transform(one)))(x)
    want = exact(x) @ exact(q)
    assert_close(got, want if transform is not jax.grad else 2 * want @ exact(q).T)


@pytest.mark.slow
def test_a_batch_of_weights():
    stack = [weight("int4", (256, 64)), weight("int4", (256, 64), method="rms,3")]
    both = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    x = array(2, 3, 256, seed=1)
    got = jax.vmap(product)(x, both)
    assert_close(
        got, np.stack([exact(a) @ exact(q) for a, q in zip(x, stack, strict=True)])
    )
    got = jax.vmap(product, (None, 0))(x[0], both)
    assert_close(got, np.stack([exact(x[0]) @ exact(q) for q in stack]))


@pytest.mark.thinned(8)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    "qtype, tile", [("int8", None), ("int8", 128), ("int4", None), ("nf4", 128)]
)
def test_a_sharded_weight_is_not_gathered(qtype, tile, rows):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    q, x = weight(qtype, tile=tile), array(rows, SIZE[0], seed=1)
    fn = jax.jit(product)
    for spec in (P("d", None), P(None, "d")):

        def put(part, spec=spec):
            axes = (a if n > 1 else None for a, n in zip(spec, part.shape, strict=True))
            return jax.device_put(part, NamedSharding(mesh, P(*axes)))

        sharded = jax.tree.map(put, q)
        text = fn.lower(x, sharded).compile().as_text()
        for gathering in ("all-gather", "all-to-all", "collective-permute"):
            assert gathering not in text, (spec, gathering)
        assert_close(fn(x, sharded), exact(x) @ exact(q))


@pytest.mark.parametrize("rows", [1, 16])
def test_shard_map(rows):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    q, x = weight("int4"), array(rows, SIZE[0], seed=1)

    def shard(x, codes, scale):
        return jax.lax.psum(product(x, QArray(codes, scale)), "d")

    specs = (P(None, "d"), P("d", None), P())
    fn = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P())
    assert_close(jax.jit(fn)(x, q.qvalue, q.scale), exact(x) @ exact(q))


def test_explicit_sharding():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    q, x = weight("int8"), array(3, SIZE[0], seed=1)
    with jax.set_mesh(mesh):
        codes = jax.device_put(q.qvalue, NamedSharding(mesh, P(None, "d")))
        scale = jax.device_put(q.scale, NamedSharding(mesh, P(None, "d")))
        got = jax.jit(product)(x, QArray(codes, scale))
        assert got.sharding.spec == P(None, "d")
    assert_close(got, exact(x) @ exact(q))


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "tpu", "cuda"]], ids=str)
def test_export(platforms):
    q, x = weight("int4"), array(1, SIZE[0], seed=1)
    act = quantize(x, "int8")

    def both(x, act, q):
        return product(x, q), product(act, q)

    exported = jax.export.export(jax.jit(both), platforms=platforms)(x, act, q)
    for got, operand in zip(exported.call(x, act, q), (x, act), strict=True):
        assert_close(got, exact(operand) @ exact(q))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    x = array(3, SIZE[0], seed=1, dtype=dtype)
    for qtype in ("int8", "nf4"):
        q = weight(qtype, dtype=dtype)
        got = product(x, q)
        assert got.dtype == dtype
        assert_close(got, exact(x) @ exact(q), tolerance=0.02)


def test_other_platforms_scale_the_product():
    q, x = weight("int8"), array(3, SIZE[0], seed=1, dtype=jnp.bfloat16)
    text = jax.export.export(jax.jit(product), platforms=["cuda"])(x, q).mlir_module()
    assert "while" not in text
    assert "(tensor<3x2048xbf16>, tensor<2048x1024xbf16>) -> tensor<3x1024xf32>" in text


def test_a_batch_of_both_waits_for_activations():
    """The branch stays one: its condition has no batch."""
    x, q = array(2, 5, 64), weight("int8", (64, 32))
    weights = jax.tree.map(lambda part: jnp.stack([part, part]), q)

    def branches(function, *args):
        return jax.jit(function).trace(*args).lower().as_text().count("stablehlo.case")

    assert branches(jax.vmap(product), x, weights) == branches(product, x[0], q) > 0

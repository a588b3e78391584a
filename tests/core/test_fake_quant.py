import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qwix_train.core import fake_quant as module
from qwix_train.core import numerics
from qwix_train.core.fake_quant import (
    fake_quant,
    fake_quant_with_calibration,
    fake_quant_with_scale,
)
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import calibrate, dequantize, quantize_array
from tests.core.reference import QTYPE_NAMES
from tests.pairwise import pairwise


def sample(shape, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(0).normal(0.2, 1, shape).astype(dtype))


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.optimized
@pytest.mark.thinned(34)
@pytest.mark.parametrize(
    ("qtype", "method", "dtype"),
    pairwise(
        QTYPE_NAMES,
        ["absmax", "minmax", "rms,1.5", "fixed,-1,2"],
        [jnp.float32, jnp.bfloat16, jnp.float16],
        # Only integers have a zero point.
        allowed=lambda qtype, method, _: (
            numerics.is_integer_qtype(qtype) or method in ("absmax", "rms,1.5")
        ),
    ),
)
def test_forward_is_quantize_and_dequantize_bit_for_bit(qtype, method, dtype):
    x = sample((64, 6), dtype).at[0, 0].set(-0.0)
    how = HowToQuantize(
        qtype=qtype,
        calibration_method=method,
        channelwise_axes=(1,),
        tiled_axes={0: 24},
        pad_tiles=True,
    )
    want = bits(dequantize(quantize_array(x, how)))
    assert bits(fake_quant(x, how)) == want
    assert bits(jax.jit(lambda x: fake_quant(x, how))(x)) == want


INT4 = HowToQuantize(qtype="int4", channelwise_axes=(0,))
CLIPPED = HowToQuantize(
    qtype="int4", channelwise_axes=(0,), calibration_method="absmax,0.5"
)


def inside(x, how):
    absmax = calibrate(x, how)["absmax"]
    return np.abs(x) <= absmax


@pytest.mark.parametrize("how", [INT4, CLIPPED], ids=["covers", "clips"])
def test_gradient_is_straight_through(how):
    x = sample((3, 8))
    weights = jnp.arange(24.0).reshape(3, 8)

    def loss(x):
        return jnp.sum(weights * fake_quant(x, how))

    want = weights * (inside(x, how) if how is CLIPPED else 1)
    np.testing.assert_array_equal(jax.grad(loss)(x), want)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), want)


@pytest.mark.slow
@pytest.mark.parametrize("how", [INT4, CLIPPED], ids=["covers", "clips"])
def test_every_kind_of_differentiation(how):
    x = sample((2, 3))

    def loss(x):
        return jnp.sum(jnp.sin(fake_quant(x, how)))

    fq = fake_quant(x, how)
    mask = np.ones(x.shape) if how is INT4 else inside(x, how)
    gradient = jnp.cos(fq) * mask
    for grad in (jax.grad, jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(grad(loss)(x), gradient, rtol=1e-6)
    for hessian in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f))):
        got = hessian(loss)(x).reshape(6, 6)
        np.testing.assert_allclose(got, np.diag((-jnp.sin(fq) * mask).ravel()), 1e-6)
    _, tangent = jax.jvp(loss, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(tangent, gradient.sum(), rtol=1e-5)
    remat = jax.grad(jax.checkpoint(loss))(x)
    np.testing.assert_allclose(remat, gradient, rtol=1e-6)
    np.testing.assert_allclose(
        jax.linearize(loss, x)[1](x), jnp.sum(gradient * x), 1e-5
    )


def test_vmap_gives_each_example_its_range():
    x = sample((5, 3, 8))
    how = HowToQuantize(qtype="int4", calibration_method="rms,1.5")
    got = jax.vmap(jax.grad(lambda x: jnp.sum(fake_quant(x, how) ** 2)))(x)
    for i in range(5):
        want = jax.grad(lambda x: jnp.sum(fake_quant(x, how) ** 2))(x[i])
        np.testing.assert_array_equal(got[i], want)


@pytest.mark.slow
def test_scan_and_shard_map():
    x = sample((8, 16))

    def loss(x):
        _, out = jax.lax.scan(lambda c, x: (c, fake_quant(x, INT4)), 0, x[:, None])
        return jnp.sum(out**2)

    np.testing.assert_allclose(jax.grad(loss)(x), 2 * fake_quant(x, INT4), rtol=1e-6)
    # Two rows on each device: the scale of a single row is rounded otherwise.
    x = sample((16, 16))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    sharded = jax.shard_map(
        lambda x: fake_quant(x, CLIPPED), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    got = jax.jit(jax.grad(lambda x: jnp.sum(sharded(x) ** 2)))(x)
    want = jax.grad(lambda x: jnp.sum(fake_quant(x, CLIPPED) ** 2))(x)
    np.testing.assert_array_equal(got, want)


def test_nothing_is_kept_for_the_backward_pass():
    x = sample((64, 32))
    for how, kept in ((INT4, 0), (CLIPPED, 64 * 32)):
        _, vjp = jax.vjp(lambda x: fake_quant(x, how), x)
        # The zeros of the `where` are a constant, once compiled.
        leaves = [leaf for leaf in jax.tree.leaves(vjp) if np.any(leaf)]
        sizes = [leaf.nbytes for leaf in leaves]
        assert sum(sizes) <= kept


@pytest.mark.slow
def test_a_given_range():
    x = jnp.array([0.4, -3.2, 9.0, -9.0])
    calibration = {"min": jnp.array([-4.0]), "max": jnp.array([3.5])}

    def fq(x, calibration, **kwargs):
        return fake_quant_with_calibration(x, "int4", calibration, **kwargs)

    assert fq(x, calibration).tolist() == [0.5, -3.0, 3.5, -4.0]
    grads = jax.grad(lambda x, c: fq(x, c).sum(), (0, 1))(x, calibration)
    assert grads[0].tolist() == [1, 1, 0, 0]
    assert all((g == 0).all() for g in jax.tree.leaves(grads[1]))
    unclipped = jax.grad(lambda x: fq(x, calibration, clip_gradient=False).sum())(x)
    assert unclipped.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("zero_point", [None, jnp.array([-3], jnp.int4)])
def test_a_given_scale(zero_point):
    x = jnp.array([0.4, -3.2, 90.0])
    scale = jnp.array([0.5])
    got = fake_quant_with_scale(x, "int4", scale, zero_point)
    assert got[:2].tolist() == ([0.5, -3.0] if zero_point is None else [0.5, -2.5])
    grad = jax.grad(lambda x: fake_quant_with_scale(x, "int4", scale, zero_point).sum())
    assert grad(x).tolist() == [1, 1 if zero_point is None else 0, 0]


@pytest.mark.slow
def test_noise_is_drawn_anew_each_time():
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def noise(shape):
        return jax.random.uniform(next(keys), shape, minval=-0.5, maxval=0.5)

    how = HowToQuantize(qtype="int4", noise_fn=noise)
    x = sample((200,))
    assert (fake_quant(x, how) != fake_quant(x, how)).any()


def test_only_floats():
    with pytest.raises(ValueError, match="dtype int8"):
        fake_quant(jnp.ones(3, jnp.int8), INT4)


@pytest.mark.parametrize("given", [False, True])
def test_the_derivative_finds_the_trace_of_the_value(given, monkeypatch):
    """So a first trace costs half as much."""
    traced, round_trip = [], module.round_trip

    def counted(array, *args):
        traced.append(array.shape)
        return round_trip(array, *args)

    def loss(x):
        if given:
            x = fake_quant_with_scale(x, "int8", jnp.ones((1, 1)))
        else:
            x = fake_quant(x, HowToQuantize(qtype="int8"))
        return jnp.sum(x)

    monkeypatch.setattr(module, "round_trip", counted)
    jax.jit(jax.grad(loss)).trace(np.ones((5, 37), np.float32))
    assert traced == [(5, 37)]


@pytest.mark.parametrize(
    ("qtype", "method"),
    [
        ("int1", "absmax"),
        ("int4", "minmax"),
        ("int8", "rms,3"),
        ("nf4", "absmax"),
        ("float8_e4m3fn", "absmax"),
        ("mxfp4", "absmax"),
        ("nvfp4", "absmax"),
    ],
)
def test_no_function_of_jax_numpy_is_traced_on_its_own(qtype, method):
    """Each would be traced for each shape, which takes longer than all else."""
    tile = 16 if qtype == "nvfp4" else 32
    how = HowToQuantize(
        qtype=qtype,
        calibration_method=method,
        channelwise_axes=(0,),
        tiled_axes={1: tile},
    )
    x = np.ones((4, 64), np.float32)
    assert "jit[" not in str(jax.make_jaxpr(lambda x: fake_quant(x, how))(x))

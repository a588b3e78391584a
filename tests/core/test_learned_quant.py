"""Forward values against `fake_quant`, gradients against the papers' equations."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwix_train.core import learned_quant, numerics
from qwix_train.core.fake_quant import fake_quant_with_scale
from qwix_train.core.qarray import dequantize, quantize_with_scale_zero_point

TYPES = st.sampled_from(["int2", "int3", "int4", "int8"])
SCALES = st.floats(0.03, 4)


@st.composite
def steps(draw, shape=(5, 3)):
    """Numbers of steps that are no tie and no end of a range."""
    whole = draw(hnp.arrays(np.int64, shape, elements=st.integers(-300, 300)))
    part = draw(hnp.arrays(np.float64, shape, elements=st.floats(0.02, 0.45)))
    return whole + np.where(draw(st.booleans()), part, -part)


def lsq_reference(v, low, high, cotangent):
    """LSQ, equations 1 to 3, with ``v / s`` given: the codes and the gradients."""
    codes = np.round(np.clip(v, low, high))
    by_scale = np.where(v <= low, low, np.where(v >= high, high, codes - v))
    inside = (v > low) & (v < high)
    return codes, inside * cotangent, (by_scale * cotangent).sum()


@functools.partial(jax.jit, static_argnums=(0, 1))
def result_and_gradients(function, qtype, cotangent, *args):
    out, vjp = jax.vjp(lambda *args: function(qtype, *args), *args)
    return out, vjp(cotangent)


def lsq(qtype, x, s):
    return learned_quant.lsq(x, qtype, s, gradient_scale=0.3)


def lsq_plus(qtype, x, s, offset):
    return learned_quant.lsq_plus(x, qtype, s, offset, gradient_scale=0.3)


def pact(qtype, x, alpha):
    return learned_quant.pact(x, qtype, alpha)


@given(TYPES, steps(), SCALES)
def test_lsq(qtype, v, scale):
    low, high = numerics.code_range(qtype)
    cotangent = np.random.default_rng(0).normal(size=v.shape)
    codes, by_x, by_scale = lsq_reference(v, low, high, cotangent)

    args = np.float32(cotangent), np.float32(v * scale), np.full((1, 1), scale, "f")
    out, (got_x, got_s) = result_and_gradients(lsq, qtype, *args)
    np.testing.assert_allclose(out, codes * scale, 1e-5)
    np.testing.assert_allclose(got_x, by_x, 1e-5)
    size = np.abs(cotangent).sum() * max(high, 1)
    np.testing.assert_allclose(got_s.item(), 0.3 * by_scale, 1e-3, 1e-4 * size)


@given(TYPES, steps(), SCALES, st.integers(0, 12))
def test_lsq_plus(qtype, v, scale, first):
    low, high = numerics.code_range(qtype)
    high -= low  # the unsigned asymmetric configuration of the paper
    first = min(first, high)
    offset = -first * scale  # a multiple of the step, which the forward does not round
    cotangent = np.random.default_rng(0).normal(size=v.shape)
    codes, by_x, by_scale = lsq_reference(v, 0, high, cotangent)
    by_offset = np.where((v > 0) & (v < high), 0, cotangent).sum()

    leaves = (np.full((1, 1), y, "f") for y in (scale, offset))
    args = np.float32(cotangent), np.float32(v * scale + offset), *leaves
    out, gradients = result_and_gradients(lsq_plus, qtype, *args)
    got_x, got_s, got_offset = gradients
    np.testing.assert_allclose(out, codes * scale + offset, 1e-4, 1e-4)
    np.testing.assert_allclose(got_x, by_x, 1e-5)
    size = np.abs(cotangent).sum() * max(high, 1)
    np.testing.assert_allclose(got_s.item(), 0.3 * by_scale, 1e-3, 1e-4 * size)
    np.testing.assert_allclose(got_offset.item(), 0.3 * by_offset, 1e-4, 1e-4)


@given(TYPES, steps(), SCALES)
def test_pact(qtype, v, scale):
    low, high = numerics.code_range(qtype)
    levels = high - low
    alpha = levels * scale
    x = v * scale
    cotangent = np.random.default_rng(0).normal(size=v.shape)
    clipped = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)  # equation 1
    want = np.round(clipped * (levels / alpha)) * (alpha / levels)  # equation 2
    by_alpha = np.where(x >= alpha, cotangent, 0).sum()  # equation 3

    args = np.float32(cotangent), np.float32(x), np.full((1, 1), alpha, "f")
    out, (got_x, got_alpha) = result_and_gradients(pact, qtype, *args)
    np.testing.assert_allclose(out, want, 1e-4, 1e-4)
    np.testing.assert_allclose(got_x, ((x > 0) & (x < alpha)) * cotangent, 1e-5)
    np.testing.assert_allclose(got_alpha.item(), by_alpha, 1e-4, 1e-4)


def sample(shape, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(0).normal(0.2, 1, shape).astype(dtype))


METHODS = {
    "lsq": lambda x, s, offset: learned_quant.lsq(x, "int4", s),
    "lsq+": lambda x, s, offset: learned_quant.lsq_plus(x, "int4", s, offset),
    "pact": lambda x, s, offset: learned_quant.pact(x, "int4", 15 * s),
}


@pytest.mark.optimized
@pytest.mark.thinned(12)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", METHODS)
def test_the_forward_is_that_of_stored_codes_bit_for_bit(method, dtype):
    x, s = sample((24, 5), dtype), jnp.float32([[0.1, 0.2, 0.05, 0.4, 0.3]])
    offset = -3.3 * s
    step = learned_quant.positive_scale(s, dtype).astype(dtype)
    zero = {
        "lsq": None,
        "lsq+": learned_quant.offset_zero_point(step, offset, "int4"),
        "pact": jnp.full(step.shape, -8, jnp.int4),
    }[method]
    if method == "pact":
        step = learned_quant.pact_scale(15 * s, "int4").astype(dtype)
    codes = quantize_with_scale_zero_point(x, "int4", step, zero)
    want = np.asarray(dequantize(codes)).tobytes()
    function = METHODS[method]
    assert np.asarray(function(x, s, offset)).tobytes() == want
    assert np.asarray(jax.jit(function)(x, s, offset)).tobytes() == want
    again = fake_quant_with_scale(x, "int4", step, zero)
    assert np.asarray(again).tobytes() == want


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_differentiation(method):
    function = METHODS[method]
    args = sample((3, 4, 5)), jnp.full((1, 5), 0.2), jnp.full((1, 5), -0.7)

    def loss(x, s, offset):
        return (function(x, s, offset) ** 2).sum()

    def of_batch(*args):
        return jax.vmap(loss, in_axes=(0, None, None))(*args).sum()

    grads = jax.jit(jax.grad(of_batch, (0, 1, 2)))(*args)
    remat = jax.checkpoint(of_batch)
    for got in (
        jax.jit(jax.grad(remat, (0, 1, 2)))(*args),
        jax.jit(jax.jacfwd(of_batch, (0, 1, 2)))(*args),
    ):
        for a, b in zip(got, grads, strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-4)
    gradient = jax.jit(jax.grad(loss, 1))
    each = [gradient(x, *args[1:]) for x in args[0]]
    np.testing.assert_allclose(sum(each), grads[1], 1e-4, 1e-4)


def test_tiles_have_gradients_of_their_own():
    x, s = sample((10, 2)), jnp.full((3, 2), 0.2)  # tiles of 4, 4 and 2 rows

    @jax.jit
    def gradient(x, s):
        return jax.grad(lambda s: learned_quant.lsq(x, "int4", s).sum())(s)

    parts = [gradient(part, s[:1]) for part in (x[:4], x[4:8], x[8:])]
    np.testing.assert_allclose(gradient(x, s), jnp.concatenate(parts), 1e-5, 1e-5)


@pytest.mark.slow
def test_gradients_of_a_narrow_array_are_summed_in_float32():
    x, s = jnp.full((4096, 1), 0.3, jnp.bfloat16), jnp.ones((1, 1))
    gradient = jax.grad(
        lambda s: learned_quant.lsq(x, "int8", s).astype(jnp.float32).sum()
    )(s)
    want = -4096 * float(jnp.bfloat16(0.3))
    np.testing.assert_allclose(gradient.item(), want, 1e-3)


@pytest.mark.slow
def test_a_scale_comes_back_from_zero_and_below():
    x = jnp.array([[0.3], [2.0]])

    def gradient(s):
        return jax.grad(lambda s: learned_quant.lsq(x, "int4", s).sum())(s).item()

    # The value is even in the scale; so the gradient is odd.
    half = jnp.full((1, 1), 0.5)
    assert gradient(-half) == -gradient(half) != 0
    np.testing.assert_array_equal(
        learned_quant.lsq(x, "int4", -half), learned_quant.lsq(x, "int4", half)
    )
    tiny = jnp.full((1, 1), 1e-30)
    assert gradient(tiny) == 14  # both elements are beyond the top code
    assert np.isfinite(learned_quant.lsq(x, "int4", tiny)).all()
    assert np.isnan(learned_quant.lsq(x, "int4", jnp.full((1, 1), np.nan))).all()


def test_types_without_steps_are_refused():
    for qtype in ("nf4", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=f"integer type, not {qtype}"):
            learned_quant.lsq(jnp.ones(3), qtype, jnp.ones(1))

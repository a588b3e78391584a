import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core.einsum import einsum
from qwix_train.core.qarray import QArray, dequantize, quantize

SIZES = dict(i=3, j=4, k=5, l=6, m=2, b=2, q=3, h=2, d=7, n=3)


def operands(subscripts, kinds):
    rng = np.random.default_rng(0)
    for subs, kind in zip(subscripts.split("->")[0].split(","), kinds, strict=True):
        shape = [SIZES[c] for c in subs.replace("...", "bn")]
        x = jax.device_put(rng.normal(size=shape).astype(np.float32))
        yield quantize(x, kind, calibration_method="absmax") if kind else x


def exact(x):
    return np.asarray(dequantize(x) if isinstance(x, QArray) else x, np.float64)


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    "subscripts, kinds",
    [
        ("ij,jk->ik", ["int8", "int4"]),
        ("ij,jk->ki", ["int8", None]),
        ("ij,jk", ["int4", "int4"]),
        ("...ij,...jk->...ik", ["int8", "int8"]),
        ("...i,ij->...j", ["int8", "nf4"]),
        ("bqhd,bkhd->bhqk", ["int8", "int8"]),
        ("bhqk,bkhd->bqhd", [None, "int8"]),
        ("ij,kl->lkji", ["int8", "int8"]),
        ("i,i->", ["int8", "int8"]),
        ("ij,ij->ij", ["int8", "int8"]),
        ("ijk,jl->il", ["int8", "int8"]),
        ("ii,ij->j", ["int8", "int8"]),
        ("ij->ji", ["int8"]),
        ("ij->", ["int8"]),
        ("ii->i", ["int8"]),
        ("ij,jk,kl->il", ["int8", "int4", None]),
        ("ij,jk,kl,lm->im", ["int8", None, "int4", "nf4"]),
        ("bij,bik,bjl->bkl", ["int8", "int8", "int8"]),
    ],
)
def test_against_numpy(subscripts, kinds):
    arrays = list(operands(subscripts, kinds))
    want = np.einsum(subscripts, *map(exact, arrays))
    got = jax.jit(lambda *arrays: einsum(subscripts, *arrays))(*arrays)
    assert got.dtype == jnp.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())


@pytest.mark.slow
def test_zero_points_and_channelwise_scales():
    x, w = (
        jax.device_put(np.random.default_rng(i).normal(size=s))
        for i, s in enumerate([(3, 4, 8), (8, 2, 5)])
    )
    q = quantize(x, "int8", channelwise_axes=(0, 1), calibration_method="minmax")
    r = quantize(w, "int4", channelwise_axes=(1, 2), calibration_method="minmax")
    got = einsum("btd,dhk->bthk", q, r)
    np.testing.assert_allclose(
        got, np.einsum("btd,dhk->bthk", exact(q), exact(r)), atol=1e-5
    )


def test_axes_of_one_broadcast():
    q = quantize(jnp.arange(4.0)[None], "int8", channelwise_axes=(1,))
    ones = quantize(jnp.ones((3, 4)), "int8")
    for subscripts in ("ij,ij->ij", "ij,ij->i", "ij,ij->j"):
        want = np.einsum(subscripts, np.broadcast_to(exact(q), (3, 4)), exact(ones))
        np.testing.assert_allclose(einsum(subscripts, q, ones), want, rtol=1e-5)


def test_forms_and_options():
    q, r = (quantize(jnp.ones(s), "int8") for s in [(2, 3), (3, 4)])
    want = exact(q) @ exact(r)
    np.testing.assert_allclose(einsum(q, [0, 1], r, [1, 2], [0, 2]), want, rtol=1e-6)
    for optimize in ("optimal", True, False):
        got = einsum("ij,jk,kl->il", q, r, np.ones((4, 1)), optimize=optimize)
        np.testing.assert_allclose(got, want.sum(1, keepdims=True), rtol=1e-6)
    half = einsum("ij,jk->ik", q, r, preferred_element_type=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert einsum("ij,jk->ik", jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)


def test_the_dot_can_be_replaced():
    calls = []

    def dot(lhs, rhs, numbers, **kwargs):
        calls.append(numbers)
        return jax.lax.dot_general(dequantize(lhs), dequantize(rhs), numbers)

    q = quantize(jnp.ones((2, 2)), "int8")
    einsum("ij,jk->ik", q, q, _dot_general=dot)
    assert calls == [(([1], [0]), ([], []))]


def test_wrong_subscripts():
    q = quantize(jnp.ones((2, 3)), "int8")
    with pytest.raises(ValueError, match="'j' have different sizes, 3 and 2"):
        einsum("ij,jk->ik", q, q)
    with pytest.raises(ValueError):
        einsum("ijk,kl->il", q, q)

"""The Pallas kernel, interpreted, against NumPy in float64; and that it lowers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwix_train
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import dequantize, quantize
from tests.compare import assert_close
from tests.core.formats_reference import microscaling, nvfp4, ternary
from tests.core.reference import expand, reference_dequantized


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def weight(qtype, tile=None, shape=(64, 256), **kwargs):
    tiles = {0: tile} if tile else {}
    return quantize(
        array(*shape), qtype, channelwise_axes=(1,), tiled_axes=tiles, **kwargs
    )


def values(q, tile):
    """What `weight` stands for, in NumPy."""
    qtype, shape = str(q.qtype), q.shape
    if qtype.startswith("int"):  # The largest magnitude may be a tie of two codes.
        return np.asarray(q.qvalue, np.float64) * expand(q.scale, shape)
    w = np.asarray(array(*shape), np.float64)
    if qtype == "nf4":
        how = HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: tile})
        return reference_dequantized(w, how)
    blocks = w.T.reshape(-1, tile or shape[0])
    if qtype == "nvfp4":
        found = nvfp4(blocks)
    elif qtype == "ternary":
        found = [ternary(block) for block in blocks]
    else:
        found = [microscaling(block, qtype)[0] for block in blocks]
    return np.reshape(found, w.T.shape).T


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("qtype", "tile"),
    [
        ("int4", None),
        ("int4", 32),
        ("nf4", 16),
        ("mxfp4", 32),
        ("nvfp4", 16),
        ("int8", None),
        ("mxfp8", 32),
        ("mxfp6", 32),
        ("ternary", None),
    ],
)
@pytest.mark.parametrize("rows", [1, 17])
def test_products(qtype, tile, rows):
    x, q = array(rows, 64, seed=1), weight(qtype, tile)
    want = np.asarray(x, np.float64) @ values(q, tile)
    with qwix_train.pallas_products(interpret=True):
        got = jax.jit(qwix_train.dot)(x, q)
    assert_close(got, want, tolerance=3e-6, of_largest=True)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["bk,nk->bn", "bhk,khn->bn", "k,kn->n"])
def test_axes_in_any_order(spec):
    shapes = {"n": 6, "k": 32, "b": 3, "h": 2}
    left, right = spec.split("->")[0].split(",")
    x = array(*(shapes[name] for name in left), seed=1)
    q = quantize(array(*(shapes[name] for name in right)), "int4")
    want = np.einsum(spec, np.float64(x), np.float64(dequantize(q)))
    with qwix_train.pallas_products(interpret=True):
        assert_close(qwix_train.einsum(spec, x, q), want, tolerance=1e-5)


def test_no_rows():
    with qwix_train.pallas_products(interpret=True):
        out = qwix_train.dot(array(0, 64), weight("int4"))
    assert out.shape == (0, 256)


def test_what_it_does_not_take():
    q = weight("int4", calibration_method="minmax")
    with (
        qwix_train.pallas_products(interpret=True),
        pytest.raises(ValueError, match="matrices without zero points"),
    ):
        qwix_train.dot(array(1, 64), q)


CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(
        jax.__version_info__ >= (0, 12),
        reason="JAX 0.12 lowers Triton, deprecated, only where a GPU is.",
    ),
)


@pytest.mark.parametrize("platform", ["tpu", CUDA])
@pytest.mark.parametrize(
    ("qtype", "tile"), [("int4", 32), ("nf4", None), ("mxfp4", 32)]
)
def test_it_lowers(qtype, tile, platform):
    q = weight(qtype, tile, shape=(512, 256))
    with qwix_train.pallas_products():
        traced = jax.jit(qwix_train.dot).trace(array(4, 512), q)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert {"tpu": "tpu_custom_call", "cuda": "triton"}[platform] in text

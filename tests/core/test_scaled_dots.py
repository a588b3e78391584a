"""`jax.lax.scaled_dot`, as XLA decomposes it on a CPU, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import qwix_train
from qwix_train.core.product_forms import listening
from tests.compare import assert_close
from tests.core.formats_reference import microscaling, nvfp4


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(x, qtype, axis):
    channels = [i for i in range(x.ndim) if i != axis]
    tile = {axis: 16 if qtype == "nvfp4" else 32}
    x = jnp.asarray(x)
    return qwix_train.quantize(x, qtype, channelwise_axes=channels, tiled_axes=tile)


def values(x, qtype, axis):
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    if qtype == "nvfp4":
        found = nvfp4(x.reshape(-1, 16))
    else:
        found = [microscaling(block, qtype)[0] for block in x.reshape(-1, 32)]
    return np.moveaxis(np.reshape(found, x.shape), -1, axis)


def told(product, *operands):
    """What a product gives, or the shape of it, and its forms."""
    found = []
    with qwix_train.scaled_dots(), listening(found.append):
        return product(*operands), found


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("mxfp8", "mxfp8_e5m2"),
        ("mxfp4", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("mxfp8", "mxfp4"),
    ],
)
def test_two_operands_in_blocks(left, right):
    x, w = array(3, 2, 64), array(2, 64, 5, seed=1)
    numbers = (((1, 2), (0, 1)), ((), ()))
    product = jax.jit(lambda *factors: qwix_train.dot_general(*factors, numbers))
    out, found = told(product, quantized(x, left, 2), quantized(w, right, 1))
    assert found == ["scaled_dot"]
    expected = np.tensordot(values(x, left, 2), values(w, right, 1), 2)
    assert_close(out, expected, 1e-5)


def test_other_products_are_as_without_it():
    def form(lhs, rhs, numbers=(((1,), (0,)), ((), ()))):
        def product(lhs, rhs):
            return qwix_train.dot_general(lhs, rhs, numbers)

        return told(functools.partial(jax.eval_shape, product), lhs, rhs)[1]

    # JAX has no arrays of 6 bits, blocks of integers, or two kinds of scales.
    for left, right in (("mxfp6", "mxfp6"), ("mxint8", "mxint8"), ("mxfp8", "nvfp4")):
        lhs, rhs = quantized(array(2, 64), left, 1), quantized(array(64, 3), right, 0)
        assert form(lhs, rhs)[-1] == "dequantized"
    assert form(jnp.ones((2, 64)), rhs)[-1] == "dequantized"
    lhs = quantized(array(2, 3, 64), "mxfp8", 2)
    assert form(lhs, lhs, (((2,), (2,)), ((0,), (0,)))) == ["dequantized"]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
def test_it_is_one_operation_on_every_platform(platform):
    lhs, rhs = quantized(array(2, 64), "nvfp4", 1), quantized(array(64, 3), "nvfp4", 0)
    with qwix_train.scaled_dots():
        exported = export.export(jax.jit(qwix_train.dot), platforms=[platform])(
            lhs, rhs
        )
    assert 'composite "xla.scaled_dot"' in exported.mlir_module()

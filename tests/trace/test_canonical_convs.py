"""Convolutions in the layout that XLA compiles well are the same convolutions."""

import jax
import numpy as np
import pytest
from jax import lax

from qwix_train.trace.canonical_convs import run_as_at_top
from qwix_train.trace.jax_versions import Body

RNG = np.random.default_rng(0)
# (shape of the images, of the kernel, their layouts, and the options).
CASES = {
    "space last": ((2, 4, 5, 6), (8, 4, 3, 2), ("NCHW", "OIHW", "NCHW"), {}),
    "mixed": ((4, 5, 2, 6), (3, 2, 4, 8), ("CHNW", "HWIO", "NHWC"), {}),
    "one axis": ((3, 7, 4), (3, 4, 2), ("NWC", "WIO", "NWC"), {"window_strides": (2,)}),
    "strides and dilations": (
        (2, 9, 8, 4),
        (3, 3, 4, 2),
        ("NHWC", "HWIO", "NHWC"),
        {"window_strides": (2, 1), "rhs_dilation": (1, 2), "lhs_dilation": (2, 1)},
    ),
    "groups": (
        (2, 6, 5, 4),
        (3, 2, 2, 6),
        ("NHWC", "HWIO", "NHWC"),
        {"feature_group_count": 2},
    ),
}


def integers(shape):
    """Small integers, whose sums are exact in any order."""
    return jax.device_put(RNG.integers(-3, 4, shape).astype(np.float32))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_the_same(name):
    images, kernel, numbers, options = CASES[name]
    x, w = integers(images), integers(kernel)
    space = len(images) - 2
    options = {"window_strides": (1,) * space, "padding": [(1, 1)] * space, **options}

    def convolution(x, w):
        return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    weights = integers(jax.eval_shape(convolution, x, w).shape)

    def all_of_it(x, w):
        out, pullback = jax.vjp(convolution, x, w)
        return (out, *pullback(weights))

    closed = jax.make_jaxpr(all_of_it)(x, w)
    body = Body(closed.jaxpr, tuple(closed.consts))
    found = jax.jit(lambda x, w: run_as_at_top(body, [x, w]))(x, w)
    lowered = jax.jit(lambda x, w: run_as_at_top(body, [x, w])).lower(x, w).as_text()
    # All three are in one layout, of images and of kernels.
    layouts = {
        line.split("dim_numbers = ")[1].split(", window")[0]
        for line in lowered.splitlines()
        if "stablehlo.convolution" in line
    }
    assert len(layouts) == 1
    for ours, theirs in zip(found, all_of_it(x, w), strict=True):
        np.testing.assert_array_equal(ours, theirs)

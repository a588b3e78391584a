"""Backward products against NumPy, and against float products of exact codes."""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

import qwix_train
from qwix_train import QtProvider, QtRule, QuantizationRule, quantize_fn
from tests import models
from tests.spellings import data

MARGIN = {
    "weight_calibration_method": "absmax,1.1",
    "act_calibration_method": "absmax,1.1",
    "bwd_calibration_method": "absmax,1.1",
}
INT8 = QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8", **MARGIN)


def rule(**kwargs):
    fields = dict(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8", **MARGIN)
    return QtRule(**{**fields, **kwargs})


def codes(x, shared, tile=None):
    """The codes and the scale of int8 in float64; `tile` cuts axis 0."""
    x = np.asarray(x, np.float64)
    if tile is not None:
        cut = x.reshape(-1, tile, *x.shape[1:])
        q, s = codes(cut, 1)
        return q.reshape(x.shape), np.repeat(s[:, 0], tile, axis=0)
    scale = 1.1 * np.abs(x).max(shared, keepdims=True) / 127.5
    return np.clip(np.round(x / scale), -128, 127), scale


def vjp_of(rule, function, *operands):
    quantized = quantize_fn(function, QtProvider([rule]))
    out, pull = jax.vjp(quantized, *operands)
    return out, jax.jit(pull)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("tile", [None, 3])
def test_a_matrix_product_by_hand(tile):
    x, w, g = data(6, 8), data(8, 5, seed=1), data(6, 5, seed=2)
    out, pull = vjp_of(rule(bwd_weight_grad_tile_size=tile), lambda w, x: x @ w, w, x)
    dw, dx = pull(jax.device_put(g))
    (qx, sx), (qw, sw) = codes(x, 1), codes(w, 0)
    np.testing.assert_allclose(out, (qx @ qw) * sx * sw, 1e-5, 1e-6)
    q, s = codes(g * sw, 1)
    np.testing.assert_allclose(dx, s * (q @ qw.T), 1e-5, 1e-6)
    # Tiles are along the rows, which the gradient of the weight sums over.
    q, s = codes(g * sx, 0, tile)
    np.testing.assert_allclose(dw, qx.T @ (q * s), 1e-5, 1e-6)


@pytest.mark.slow
def test_one_scale_for_the_whole_array_by_hand():
    x, w, g = data(6, 8), data(8, 5, seed=1), data(6, 5, seed=2)
    out, pull = vjp_of(rule(disable_channelwise_axes=True), lambda w, x: x @ w, w, x)
    dw, dx = pull(jax.device_put(g))
    (qx, sx), (qw, sw) = codes(x, (0, 1)), codes(w, (0, 1))
    np.testing.assert_allclose(out, (qx @ qw) * sx * sw, 1e-5, 1e-6)
    (q, s), (r, t) = codes(g * sw, (0, 1)), codes(g * sx, (0, 1))
    np.testing.assert_allclose(dx, s * (q @ qw.T), 1e-5, 1e-6)
    np.testing.assert_allclose(dw, t * (qx.T @ r), 1e-5, 1e-6)


def test_float8_by_hand():
    types = dict(weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn")
    x, w, g = data(6, 8), data(8, 5, seed=1), data(6, 5, seed=2)
    fp8 = rule(bwd_qtype="float8_e5m2", **types)
    out, pull = vjp_of(fp8, lambda w, x: x @ w, w, x)
    dw, dx = pull(jax.device_put(g))

    def of_type(x, shared, name):
        scale = 1.1 * np.abs(x).max(shared, keepdims=True) / float(jnp.finfo(name).max)
        return np.asarray(jnp.asarray(x / scale, name), np.float64), scale

    (qx, sx), (qw, sw) = (of_type(*a, "float8_e4m3fn") for a in ((x, 1), (w, 0)))
    np.testing.assert_allclose(out, (qx @ qw) * sx * sw, 1e-5, 1e-6)
    q, s = of_type(g * sw, 1, "float8_e5m2")
    np.testing.assert_allclose(dx, s * (q @ qw.T), 1e-5, 1e-6)
    q, s = of_type(g * sx, 0, "float8_e5m2")
    np.testing.assert_allclose(dw, qx.T @ q * s, 1e-5, 1e-6)


def conv(w, x, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    kwargs = {"window_strides": (1, 1), "padding": "VALID", **kwargs}
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **kwargs)


# A function of a weight and an input, and the shapes of these.
PRODUCTS = {
    "batch axes": (lambda w, x: jnp.einsum("bti,bio->bto", x, w), (2, 4, 3), (2, 5, 4)),
    "einsum": (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (4, 2, 3), (2, 5, 4)),
    "weight on the left": (lambda w, x: w @ x, (3, 4), (4, 5)),
    "two contracted": (lambda w, x: jnp.tensordot(x, w, 2), (4, 2, 3), (5, 4, 2)),
    "transposed weight": (lambda w, x: x @ w.T, (3, 4), (5, 4)),
    "vector": (lambda w, x: x @ w, (4, 3), (4,)),
    "convolution": (conv, (3, 3, 4, 6), (2, 6, 6, 4)),
    "strides": (
        functools.partial(conv, window_strides=(2, 1), padding="SAME"),
        (3, 2, 4, 6),
        (2, 6, 6, 4),
    ),
    "groups": (
        functools.partial(conv, feature_group_count=2),
        (3, 3, 2, 6),
        (2, 6, 6, 4),
    ),
    "dilations": (
        functools.partial(
            conv,
            lhs_dilation=(2, 1),
            rhs_dilation=(1, 2),
            padding=((1, 0), (0, 2)),
        ),
        (2, 2, 4, 6),
        (2, 5, 6, 4),
    ),
    "batch groups": (
        functools.partial(conv, batch_group_count=2),
        (3, 3, 4, 6),
        (2, 6, 6, 4),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_exact_codes_give_the_float_gradients(name):
    """Integers are their own codes, of scales that are powers of two."""
    function, w_shape, x_shape = PRODUCTS[name]
    rng = np.random.default_rng(0)

    def integers(shape, scale):
        return np.float32(rng.integers(-9, 10, shape) * scale)

    w, x = integers(w_shape, 0.5), integers(x_shape, 0.25)
    g = integers(jax.eval_shape(function, w, x).shape, 1.0)
    exact = QtRule(
        weight_qtype="int8",
        act_qtype="int8",
        bwd_qtype="int8",
        weight_calibration_method=f"fixed,{127.5 * 0.5}",
        act_calibration_method=f"fixed,{127.5 * 0.25}",
        # The scale of the other operand is in the gradient by then.
        bwd_calibration_method=f"fixed,{127.5 * 0.25}",
    )

    @jax.jit
    def both(w, x, g):
        out, pull = vjp_of(exact, function, w, x)
        want, want_pull = jax.vjp(function, w, x)
        return (out, *pull(g)), (want, *want_pull(g))

    models.assert_close(*both(w, x, g), 1e-6)


# What has no codes to multiply: the gradient is quantized all the same, and close.
IN_FLOAT = {
    "tiles": dict(tile_size=4),
    "zero points": dict(act_calibration_method="minmax"),
    "weights only": dict(act_qtype=None),
    "nf4": dict(weight_qtype="nf4"),
    "zero points of gradients": dict(bwd_calibration_method="minmax"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT)
def test_operands_without_codes_to_multiply(name):
    x, w, g = data(6, 8), data(8, 5, seed=1), data(6, 5, seed=2)
    got = rule(**IN_FLOAT[name])
    out, pull = vjp_of(got, lambda w, x: x @ w, w, x)
    forward = {
        field: getattr(got, field)
        for field in (*MARGIN, "weight_qtype", "act_qtype", "tile_size")
        if not field.startswith("bwd")
    }
    want, want_pull = vjp_of(QuantizationRule(**forward), lambda w, x: x @ w, w, x)
    models.assert_close(out, want)
    for a, b in zip(pull(jax.device_put(g)), want_pull(jax.device_put(g)), strict=True):
        assert 1e-6 < np.abs(a - b).max() < 0.03 * np.abs(b).max()


def test_a_tile_that_does_not_fit_names_the_op():
    x, w = data(6, 8), data(8, 5, seed=1)
    quantized = quantize_fn(
        lambda w, x: x @ w, QtProvider([rule(bwd_weight_grad_tile_size=4)])
    )
    message = (
        "dot_general0: an operand of the gradient of operand 1, of .*bwd_tile_size"
    )
    with pytest.raises(ValueError, match=message):
        jax.grad(lambda w: quantized(w, x).sum())(w)
    quantized = quantize_fn(conv, QtProvider([rule(bwd_weight_grad_tile_size=4)]))
    with pytest.raises(ValueError, match="convolutions have no such tiles"):
        quantized(data(3, 3, 4, 6), data(2, 6, 6, 4))


@pytest.mark.slow
def test_codes_are_all_that_is_kept_and_multiplied():
    x, w = jax.device_put(data(64, 128)), jax.device_put(data(128, 256, seed=1))
    quantized = quantize_fn(lambda w, x: x @ w, QtProvider([INT8]))
    _, pull = jax.vjp(quantized, w, x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert kept < 1.2 * (x.size + w.size)
    step = jax.jit(jax.grad(lambda w, x: quantized(w, x).sum(), (0, 1)))
    text = str(step.trace(w, x).jaxpr)
    assert text.count("preferred_element_type=int32") >= 2
    assert qwix_train.QtRule is QtRule


MESH = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("names", "out", "fields"),
    [
        (("model", None), jax.P("data", None), {}),
        (("model", None), jax.P("data", None), {"act_qtype": None}),
        (("model", None), jax.P("data", None), {"bwd_weight_grad_tile_size": 2}),
        ((None, "model"), None, {}),
    ],
    ids=["rows", "rows, weights alone", "rows, tiles", "columns"],
)
def test_explicit_meshes(names, out, fields):
    """Gradients have the sharding of what they are for, and the numbers of one device.

    The rows of a row-parallel weight are sharded, and so is what it is multiplied by.
    """

    def function(p, x):
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=sharding)

    def gradients(p, x):
        quantized = quantize_fn(function, QtProvider([rule(**fields)]))
        return jax.vjp(quantized, p, x)[1](g)

    sharding = None
    p, x, g = {"w": data(8, 4, seed=1)}, data(4, 8), data(4, 4, seed=2)
    want = jax.jit(gradients)(p, x)
    with jax.set_mesh(MESH):
        sharding = out
        p = {"w": jax.device_put(p["w"], jax.P(*names))}
        x = jax.device_put(x, jax.P("data", names[0]))
        g = jax.device_put(g, jax.P("data", names[1]))
        found = jax.jit(gradients)(p, x)
        assert found[0]["w"].sharding == p["w"].sharding
        assert found[1].sharding == x.sharding
        models.assert_close(found, want)

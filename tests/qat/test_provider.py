"""QAT's gradients, by every kind of differentiation, against those by hand."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec

from qwix_train import QtProvider, quantize_fn, quantize_model
from tests import models

X = models.normal(6, 4, seed=0)
W = models.normal(4, 3, seed=1)
PROVIDER = QtProvider(models.INT4)
fq_x = functools.partial(models.fake_quant, bits=8, shared=-1)
fq_w = functools.partial(models.fake_quant, bits=4, shared=0)


def product(params, x):
    return jnp.sin(x @ params["w"])


QUANTIZED = quantize_fn(product, PROVIDER)


def by_hand(params, x):
    return jnp.sin(fq_x(x) @ fq_w(params["w"]))


@pytest.mark.slow
def test_the_straight_through_gradients_are_those_of_the_fake_quantized_product():
    g = jax.random.normal(jax.random.key(2), (6, 3))
    linear = quantize_fn(lambda p, x: x @ p, PROVIDER)
    out, vjp = jax.vjp(linear, W, X)
    dw, dx = vjp(g)
    models.assert_close(out, fq_x(X) @ fq_w(W))
    models.assert_close(dx, g @ fq_w(W).T)
    models.assert_close(dw, fq_x(X).T @ g)


def test_elements_outside_of_the_range_get_no_gradient():
    rule = models.QuantizationRule(
        weight_qtype="int8", weight_calibration_method="fixed,-0.5,0.5"
    )
    g = jnp.ones((6, 3))
    _, vjp = jax.vjp(quantize_fn(lambda p, x: x @ p, QtProvider([rule])), W, X)
    dw, _ = vjp(g)
    inside = jnp.abs(W) <= 0.5
    assert 0 < inside.sum() < W.size
    models.assert_close(dw, jnp.where(inside, X.T @ g, 0))


def total(f):
    return lambda p, x: f(p, x).sum()


DERIVATIVES = {
    "value_and_grad": lambda f: jax.value_and_grad(total(f), (0, 1)),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (p, jnp.ones_like(x))),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1)),
    "jacrev": lambda f: jax.jacrev(f, (0, 1)),
    "hessian": lambda f: jax.hessian(total(f), (0, 1)),
    "per example": lambda f: jax.vmap(
        jax.grad(lambda p, x: f(p, x[None]).sum()), (None, 0)
    ),
    "remat": lambda f: jax.grad(total(jax.checkpoint(f)), (0, 1)),
    "vmap of jit": lambda f: jax.vmap(jax.jit(jax.grad(total(f))), (None, 0)),
    "scan": lambda f: jax.grad(
        lambda p, x: jax.lax.scan(lambda c, x: (c, f(p, x)), 0, x[:, None])[1].sum()
    ),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_kind_of_derivative(name):
    derivative = DERIVATIVES[name]
    x = jnp.stack([X, 2 * X]) if name == "vmap of jit" else X
    params = {"w": W}
    want = jax.jit(derivative(by_hand))(params, x)
    got = jax.jit(derivative(QUANTIZED))(params, x)
    models.assert_close(got, want, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True])
def test_shard_map_under_grad(inside):
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))

    def sharded(f):
        return jax.shard_map(
            f,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
        )

    # Each row has a scale of its own, so shards quantize as the whole does.
    quantized = sharded(QUANTIZED)
    if inside:
        quantized = quantize_fn(sharded(product), PROVIDER)
    got = jax.jit(jax.value_and_grad(total(quantized), (0, 1)))({"w": W}, X)
    want = jax.value_and_grad(total(by_hand), (0, 1))({"w": W}, X)
    models.assert_close(got, want)


CONVOLUTIONS = {
    "plain": dict(features=6, kernel_size=(3, 3), strides=2),
    "depthwise": dict(features=4, kernel_size=(3, 3), feature_group_count=4),
    "grouped": dict(features=6, kernel_size=(3, 3), feature_group_count=2),
    "dilated": dict(features=3, kernel_size=(2, 2), kernel_dilation=2),
    "one axis": dict(features=3, kernel_size=(3,), padding="CAUSAL"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_have_gradients(name):
    layer = nn.Conv(**CONVOLUTIONS[name])
    axes = len(CONVOLUTIONS[name]["kernel_size"])
    x = jax.random.normal(jax.random.key(3), (2, *(6,) * axes, 4))
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    quantized = quantize_model(layer, PROVIDER)

    def hand(params, x):
        shared = tuple(range(params["kernel"].ndim - 1))
        kernel = models.fake_quant(params["kernel"], 4, shared)
        x = models.fake_quant(x, 8, tuple(range(1, x.ndim)))
        return (layer.apply({"params": {**params, "kernel": kernel}}, x) ** 2).sum()

    def loss(params, x):
        return (quantized.apply({"params": params}, x) ** 2).sum()

    got = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
    models.assert_close(got, jax.jit(jax.value_and_grad(hand, (0, 1)))(params, x), 1e-4)


@pytest.mark.slow
def test_bfloat16_and_integers():
    params, x = {"w": W.astype(jnp.bfloat16)}, X.astype(jnp.bfloat16)
    out = quantize_fn(lambda p, x: x @ p["w"], PROVIDER)(params, x)
    assert out.dtype == jnp.bfloat16
    exact = fq_x(X) @ fq_w(W)
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.1)

    def mixed(p, x):
        counts = jnp.arange(4) @ p["table"]
        return (x @ p["w"]) * counts.sum()

    params = {"w": W, "table": jnp.arange(12).reshape(4, 3)}
    out = quantize_fn(mixed, PROVIDER)(params, X)
    models.assert_close(out, exact * (jnp.arange(4) @ params["table"]).sum())

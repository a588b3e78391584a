"""Products with adapters have the values and gradients of those with merged weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax import numpy as jnp

from qwix_train import lora
from tests import models

SCALING = 2.0


def data(*shape: int) -> jax.Array:
    rng = np.random.default_rng([3, *shape])
    return jax.device_put(rng.normal(scale=0.4, size=shape).astype(np.float32))


@dataclasses.dataclass
class Case:
    """A function of a weight and an input.

    Attributes:
      function: the function.
      shape: the shape of the weight.
      factors: the einsum of A and B that gives what is added to it.
      contracted: its axes that have no magnitude of their own.
      x: the input.
    """

    function: Callable[..., Any]
    shape: tuple[int, ...]
    factors: str = "ir,ro->io"
    contracted: tuple[int, ...] = (0,)
    x: Any = dataclasses.field(default_factory=lambda: data(3, 4))
    op_names: tuple[str, ...] = ()


def conv(w, x, numbers=("NHWC", "HWIO", "NHWC"), strides=(1, 1), **kwargs):
    return lax.conv_general_dilated(
        x, w, strides, "SAME", dimension_numbers=numbers, **kwargs
    )


def convolution(shape, factors="hwir,ro->hwio", contracted=(0, 1, 2), x=None, **kwargs):
    x = data(2, 5, 5, 4) if x is None else x
    return Case(functools.partial(conv, **kwargs), shape, factors, contracted, x)


def _scanned(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def _scanned_with_remat(w, x):
    body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return lax.scan(body, x, w)[0]


def _transposed_conv(w, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=numbers)


def _in_a_branch(w, x):
    return lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: -2 * (x @ w), x)


TOKENS = jnp.array([[1, 0, 3], [2, 2, 5]])
CASES = {
    "grouped": convolution((3, 3, 2, 6), feature_group_count=2),
    "depthwise": convolution((3, 3, 1, 8), feature_group_count=4),
    "batch groups": convolution((3, 3, 4, 6), batch_group_count=2),
    "dilated": convolution((3, 3, 4, 5), rhs_dilation=(2, 2)),
    "channels first": convolution(
        (5, 4, 3, 3),
        "ihwr,ro->oihw",
        (1, 2, 3),
        data(2, 4, 5, 5),
        numbers=("NCHW", "OIHW", "NCHW"),
        strides=(2, 1),
    ),
    "transposed": Case(
        _transposed_conv, (3, 3, 4, 5), "hwir,ro->hwio", (0, 1, 2), data(2, 5, 5, 4)
    ),
    "experts": Case(
        lambda w, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, x + 1]), w),
        (2, 4, 5),
        "eir,ro->eio",
        (1,),
    ),
    "experts of one input": Case(
        lambda w, x: jnp.einsum("bi,eio->beo", x, w), (2, 4, 5), "ir,reo->eio", (1,)
    ),
    "heads": Case(
        lambda w, x: jnp.einsum("btd,ndh->btnh", x, w),
        (2, 4, 3),
        "dr,rnh->ndh",
        (1,),
        data(2, 3, 4),
    ),
    "of three": Case(
        lambda w, x: jnp.einsum("bi,io,op->bp", x, w, jnp.ones((5, 3))),
        (4, 5),
        "or,ri->io",
        (1,),
    ),
    "twice": Case(lambda w, x: (x @ w) @ w.T, (4, 5)),
    "transpose": Case(lambda w, x: x @ w.T, (5, 4), "ir,ro->oi", (1,)),
    "layers": Case(_scanned, (3, 4, 4), "lir,lro->lio", (1,)),
    "layers with remat": Case(_scanned_with_remat, (3, 4, 4), "lir,lro->lio", (1,)),
    "branch": Case(_in_a_branch, (4, 5)),
    "lookup": Case(lambda w, x: w[x], (6, 4), x=TOKENS, op_names=("gather",)),
    "tied": Case(
        lambda w, x: w[x] @ w.T, (6, 4), x=TOKENS, op_names=("gather", "dot_general")
    ),
}


# Magnitudes go along with every second case.
@pytest.mark.parametrize(
    ("name", "dora"), [(name, i % 2 == 1) for i, name in enumerate(CASES)]
)
@pytest.mark.thinned(27)
def test_values_and_gradients(name, dora):
    case = CASES[name]
    weight = data(*case.shape)
    rule = lora.LoraRule(rank=1, alpha=SCALING, dora=dora, op_names=case.op_names)
    state = models.lora_state(
        lambda params, x: case.function(params["w"], x),
        {"w": weight},
        optax.sgd(0.1),
        [rule],
        jax.random.key(0),
        case.x,
    )
    adapters = jax.tree.map(lambda x: data(*x.shape) + 0.3, state.params)

    def merged(adapters):
        a, b = adapters["w_lora_a"], adapters["w_lora_b"]
        w = weight + SCALING * jnp.einsum(case.factors, a, b)
        if not dora:
            return w
        norm = lax.stop_gradient(jnp.sqrt((w**2).sum(case.contracted)))
        gain = adapters["w_lora_magnitude"] / norm
        return w * jnp.expand_dims(gain, case.contracted)

    def of(call):
        def loss(adapters):
            out = call(adapters)
            return jnp.mean(out**2), out

        return jax.jit(jax.grad(loss, has_aux=True))(adapters)

    grads, out = of(lambda adapters: state.apply_fn(adapters, case.x))
    want_grads, want = of(lambda adapters: case.function(merged(adapters), case.x))
    np.testing.assert_allclose(out, want, 1e-4, 1e-5 * np.abs(want).max())
    assert grads.keys() == want_grads.keys()
    for key, grad in grads.items():
        scale = np.abs(want_grads[key]).max()
        assert scale > 0
        np.testing.assert_allclose(grad, want_grads[key], 1e-4, 2e-5 * scale)

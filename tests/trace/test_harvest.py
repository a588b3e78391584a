"""Values read out of traced steps, through whatever stands around them."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.trace import harvest, jax_versions

WEIGHTS = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)
BATCHES = np.random.default_rng(1).normal(size=(4, 2, 4)).astype(np.float32)


def layer(x, w):
    x = harvest.tag(x, "layer", (True,))
    return jnp.tanh(x @ w), None


def loss(ws, x, remat=False):
    y, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, ws)
    return jnp.sum(harvest.tag(y, "out") ** 2)


def gradients(ws, xs):
    return jax.value_and_grad(loss)(ws, xs[0])


def with_remat(ws, xs):
    return jax.value_and_grad(loss)(ws, xs[0], remat=True)


def micro_batches(ws, xs):
    def body(total, x):
        value, grads = jax.value_and_grad(loss)(ws, x, remat=True)
        return total + value, grads

    return jax.lax.scan(body, 0.0, xs)


def nested_remat(ws, xs):
    """Layers with a checkpoint each, in one around the loss, in micro-batches."""

    def body(total, x):
        whole = jax.checkpoint(lambda ws: loss(ws, x, remat=True))
        value, grads = jax.value_and_grad(whole)(ws)
        return total + value, grads

    return jax.lax.scan(body, 0.0, xs)


def every_other(ws, xs):
    """A loop of unknown length with a branch in it."""

    def body(carry):
        i, total = carry
        value = jax.lax.cond(i % 2 == 0, lambda: loss(ws, xs[i]), lambda: 0.0)
        return i + 1, total + value

    return jax.lax.while_loop(lambda carry: carry[0] < 4, body, (0, 0.0))


def batched(ws, xs):
    return jax.vmap(lambda x: loss(ws, x))(xs)


def custom(ws, xs):
    @jax.custom_vjp
    def f(ws):
        return loss(ws, xs[0])

    f.defvjp(lambda ws: (f(ws), ws), lambda ws, g: (g * ws,))
    return f(ws)


def largest(xs):
    """The largest magnitude of what enters each layer, and of what comes out."""
    found = []
    for w in WEIGHTS:
        found.append(np.abs(xs).max())
        xs = np.tanh(xs @ w)
    return found, np.abs(xs).max()


@pytest.mark.thinned(15)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("step", "batches", "times"),
    [
        (gradients, [0], 1),
        (with_remat, [0], 1),  # the backward pass computes it again
        (micro_batches, [0, 1, 2, 3], 4),
        (nested_remat, [0, 1, 2, 3], 4),
        (every_other, [0, 2], 2),
        (batched, [0, 1, 2, 3], 1),
        (custom, [0], 1),
    ],
)
def test_values_and_counts(step, batches, times, jitted):
    step = jax.jit(step) if jitted else step
    inputs = [jax.device_put(WEIGHTS), jax.device_put(BATCHES)]
    body = jax_versions.body_of(jax.make_jaxpr(step)(*inputs))
    names = harvest.names_in(body)
    assert names == {"layer": (3,), "out": ()}
    states = {
        name: {"count": jnp.zeros(layers, int), "max": jnp.zeros(layers)}
        for name, layers in names.items()
    }

    def update(name, value, state):
        largest = jnp.maximum(state["max"], jnp.abs(value).max())
        return {"count": state["count"] + 1, "max": largest}

    outs, after = harvest.harvest(body, inputs, states, update)
    for out, expected in zip(outs, jax.tree.leaves(step(*inputs)), strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-5)
    np.testing.assert_array_equal(after["layer"]["count"], [times] * 3)
    assert after["out"]["count"] == times
    layers, out = largest(BATCHES[batches])
    np.testing.assert_allclose(after["layer"]["max"], layers, rtol=1e-6)
    np.testing.assert_allclose(after["out"]["max"], out, rtol=1e-6)


def test_a_backward_pass_alone_holds_no_values():
    ws, x = jax.device_put(WEIGHTS), jax.device_put(BATCHES[0])
    _, backward = jax.vjp(jax.checkpoint(lambda ws: loss(ws, x)), ws)
    body = jax_versions.body_of(jax.make_jaxpr(backward)(1.0))
    with pytest.raises(ValueError, match="layer: its values cannot be collected"):
        harvest.names_in(body)


def test_a_shard_is_no_whole():
    mesh = jax.make_mesh((2,), ("data",))
    step = jax.shard_map(
        lambda x: harvest.tag(x, "x"),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
    )
    x = jax.device_put(
        jnp.ones((2, 2)), jax.sharding.NamedSharding(mesh, jax.P("data"))
    )
    body = jax_versions.body_of(jax.make_jaxpr(step)(x))
    with pytest.raises(ValueError, match="inside of shard_map"):
        harvest.harvest(body, [x], {"x": 0.0}, lambda name, value, state: state)


def test_scopes_around_values_stay():
    @jax.jit
    def inner(x):
        with jax.named_scope("inside"):
            return harvest.tag(x * 2, "x")

    def step(x):
        with jax.named_scope("outside"):
            return inner(x)

    def again(x):
        body = jax_versions.body_of(jax.make_jaxpr(step)(x))
        return harvest.harvest(body, [x], {"x": 0.0}, lambda name, x, s: s + jnp.exp(x))

    stacks = {
        eqn.primitive.name: str(eqn.source_info.name_stack)
        for eqn in jax.make_jaxpr(again)(1.0).jaxpr.eqns
    }
    assert stacks["mul"] == "outside/jit(inner)/inside"
    assert stacks["exp"] == "outside/jit(inner)/inside"


def test_the_condition_of_a_loop_is_refused():
    def step(x):
        return jax.lax.while_loop(
            lambda x: harvest.tag(x, "x") < 3, lambda x: x + harvest.tag(x, "y"), x
        )

    body = jax_versions.body_of(jax.make_jaxpr(step)(1.0))
    with pytest.raises(ValueError, match="x: .* in the condition of a loop"):
        harvest.harvest(body, [1.0], {"x": 0.0, "y": 0.0}, lambda name, x, s: s + x)

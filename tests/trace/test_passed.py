"""Which results of a traced function are its inputs, found without running it."""

import jax
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from qwix_train.trace import jax_versions, passed

W, X = jnp.ones((4, 4, 2)), jnp.ones(2)


def loop(body):
    def function(w, x):
        return lax.scan(body, x, w)

    return function


def shards(in_spec, out_spec):
    mesh = jax.make_mesh((2,), ("a",), (jax.sharding.AxisType.Auto,))

    def function(w, x):
        return jax.shard_map(
            lambda w: w,
            mesh=mesh,
            in_specs=in_spec,
            out_specs=out_spec,
            check_vma=False,
        )(w)

    return function


# Each with the input that each of its results is, or None.
CASES = {
    "itself": (lambda w, x: (x, w, w + 1), [1, 0, None]),
    "moved back": (lambda w, x: jnp.moveaxis(jnp.moveaxis(w, 2, 0), 0, 2), [0]),
    "moved": (lambda w, x: w.T, [None]),
    "jit": (jax.jit(lambda w, x: (jnp.copy(w), x * 2)), [0, None]),
    "moved within jit": (lambda w, x: jax.jit(lambda w: w.T)(w).T, [0]),
    "remat": (jax.checkpoint(lambda w, x: (w, jnp.sin(x))), [0, None]),
    "remat in scan": (
        loop(jax.checkpoint(lambda x, w: (x + w[0], w))),
        [None, 0],
    ),
    "invariant carry": (loop(lambda x, w: (x, w * 2)), [1, None]),
    "scanned along axis 1": (
        lambda w, x: jnp.moveaxis(
            lax.scan(lambda c, w: (c, w), x, jnp.moveaxis(w, 1, 0))[1], 0, 1
        ),
        [0],
    ),
    "reversed within scan": (loop(lambda x, w: (x, w[::-1])), [1, None]),
    "slices of slices": (
        lambda w, x: lax.scan(
            lambda c, a: (c, lax.scan(lambda c, b: (c, b), 0, a)[1]), 0, w
        )[1],
        [0],
    ),
    "slices that another loop stacks": (
        lambda w, x: lax.scan(
            lambda c, a: (c, lax.scan(lambda c, _: (c, a), 0, length=4)[1]), 0, w[0]
        )[1],
        [None],
    ),
    "the last slice": (lambda w, x: lax.scan(lambda c, a: (a, c), w[0], w)[0], [None]),
    "swapped carry": (
        lambda w, x: lax.scan(lambda c, _: (c[::-1], None), (x, x + 1), length=2)[0],
        [None, None],
    ),
    "stacked constant": (
        lambda w, x: lax.scan(lambda c, _: (c, x), 0, length=2)[1],
        [None],
    ),
    "while": (
        lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1]), (0, w)
        ),
        [None, 0],
    ),
    "cond": (
        lambda w, x: lax.cond(
            x[0] > 0, lambda a, b: (a, b), lambda a, b: (a, b * 2), w, x
        ),
        [0, None],
    ),
    "cond that swaps": (
        lambda w, x: lax.cond(
            x[0] > 0, lambda a, b: (a, b), lambda a, b: (b, a), x, x + 1
        ),
        [None, None],
    ),
    "shard_map": (shards(P("a"), P("a")), [0]),
    "shard_map that moves": (shards(P("a"), P(None, "a")), [None]),
    "literal": (lambda w, x: (1.0, w), [None, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_sources(name):
    function, expected = CASES[name]
    body = jax_versions.body_of(jax.make_jaxpr(function)(W, X))
    assert passed.sources(body) == expected


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda w, x: (w.T.T, x + 1), {1}),
        (jax.jit(lambda w, x: (w, jnp.sin(x))), {1}),
        (lambda w, x: lax.scan(lambda c, y: (c + y[0], y), x, w), {0, 1}),
        (
            lambda w, x: lax.scan(lambda c, y: (c, (y[0], 2 * y[1])), 0, (w, w * 2)),
            {0},
        ),
        (lambda w, x: lax.scan(lambda c, y: (c, y), 2 * x, w), {1}),
        (
            lambda w, x: lax.while_loop(lambda c: c[0] < 3, lambda c: c, (0, w, x)),
            set(),
        ),
        (
            lambda w, x: lax.cond(
                x[0] > 0, lambda a, b: (a, b), lambda a, b: (-a, b), w, x
            ),
            {0, 1},
        ),
    ],
)
def test_what_is_read(function, expected):
    body = jax_versions.body_of(jax.make_jaxpr(function)(W, X))
    assert passed.read(body) == expected

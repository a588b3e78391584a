import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from qwix_train.trace import carried, evaluate, jax_versions


class Halved(carried.Carried):
    """Stands for half of an array; negated without being made."""

    follows = True

    def __init__(self, array, sign=1, heard=None):
        self.array, self.sign = array, sign
        self.heard = [] if heard is None else heard

    @property
    def value(self):
        return self.sign * self.array / 2

    @property
    def arrays(self):
        return (self.array,)

    @property
    def returned(self):
        return self.value

    def inside(self, arrays):
        return Halved(arrays[0], self.sign, self.heard)

    def sliced(self):
        return (self.array,), lambda part: Halved(part, self.sign, self.heard)

    def apply(self, primitive, params, operands, run):
        if primitive == "neg":
            return [Halved(self.array, -self.sign, self.heard)]
        return None

    def read_by(self, primitive):
        self.heard.append(primitive)


X = jnp.arange(6.0).reshape(3, 2)


def run(function, value, *others):
    """Evaluates a function with a `Carried` in the place of its first input."""
    body = jax_versions.body_of(jax.make_jaxpr(function)(value.array, *others))
    (out,) = evaluate.evaluate(body, [value, *others], {}, lambda *_: None)
    return out


@pytest.mark.parametrize(
    "function, primitives",
    [
        (lambda x: jnp.negative(-x), []),
        (lambda x: jnp.exp(-x), ["exp"]),
        (lambda x: jax.jit(lambda x: -x)(x).max(), ["reduce_max"]),
        (lambda x: jax.checkpoint(lambda x: -x)(x), ["checkpoint"]),
        (lambda x: lax.cond(True, lambda x: -x, lambda x: x, x), ["cond", "cond"]),
        (lambda x: lax.scan(lambda c, row: (c, -row), 0, x)[1], ["scan"]),
        (lambda x: lax.scan(lambda c, _: (-c, None), x, jnp.ones(3))[0], ["scan"] * 2),
        (lambda x: lax.fori_loop(0, 3, lambda _, c: -c, x), ["scan"] * 2),
        (
            lambda x: lax.while_loop(lambda c: c[0, 0] > 9, lambda c: -c, x),
            ["while"] * 2,
        ),
    ],
)
def test_every_reader_of_the_array_is_named(function, primitives):
    value = Halved(X)
    np.testing.assert_array_equal(run(function, value), function(X / 2))
    assert sorted(set(value.heard)) == sorted(set(primitives))


def test_what_is_read_by_an_unneeded_equation_is_not_made():
    def function(x):
        jnp.exp(x)
        return -x

    value = Halved(X)
    np.testing.assert_array_equal(run(function, value), -X / 2)
    assert value.heard == []


def test_values_of_one_trace_stay_in_it():
    class Once(Halved):
        made = None

        @property
        def value(self):
            if self.made is None:
                self.made = self.array / 2
            return self.made

        def inside(self, arrays):
            return Once(arrays[0])

    def function(x):
        total, _ = lax.scan(lambda c, _: (c + x.max(), None), 0.0, jnp.ones(3))
        other = lax.while_loop(lambda c: c < x.max(), lambda c: c + x.max(), 0.0)
        return total + other + x.max()

    np.testing.assert_array_equal(run(function, Once(X)), function(X / 2))


def test_unpacked():
    value = Halved(X)
    arrays, restore = carried.unpacked([X, value, X + 1])
    assert [array is x for array, x in zip(arrays, (X, X), strict=False)] == [True] * 2
    first, second, third = restore([1.0, 2.0, 3.0])
    assert (first, second.value, third) == (1.0, 1.0, 3.0)


def test_deferred_inputs_are_made_once_where_they_are_used():
    calls = []

    def transform(array):
        calls.append(array.shape)
        return 2 * array

    deferred = carried.Deferred(X, transform, transform)
    assert deferred.returned is X and not calls
    np.testing.assert_array_equal(deferred.value, 2 * X)
    np.testing.assert_array_equal(deferred.value, 2 * X)
    sliced = deferred.sliced()
    assert sliced is not None
    (array,), one = sliced
    np.testing.assert_array_equal(one(array[0]).value, 2 * X[0])
    np.testing.assert_array_equal(deferred.inside([X + 1]).value, 2 * (X + 1))
    assert calls == [(3, 2), (2,), (3, 2)]
    assert carried.Deferred(X, transform).sliced() is None

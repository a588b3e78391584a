import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.trace import jax_versions


def body(fn, *args):
    return jax_versions.body_of(jax.make_jaxpr(fn)(*args))


def test_body_of_keeps_constants():
    table = np.arange(3.0)
    found = body(lambda x: x + table, jnp.ones(3))
    assert len(found.jaxpr.constvars) == len(found.consts)


def test_scan_parts():
    def fn(a, b, xs):
        return lax.scan(lambda c, x: ((c[0] + a * x, c[1]), c[0]), (b, b), xs)

    found = body(fn, jnp.ones(2), jnp.ones(2), jnp.ones((3, 2)))
    (scan,) = [e for e in found.jaxpr.eqns if e.primitive.name == "scan"]
    parts = jax_versions.scan_parts(scan.params)
    assert parts.num_consts + parts.num_carry + 1 == len(scan.invars)


def test_bodies_have_a_value_for_each_constant():
    def fn(x):
        return lax.reduce(x, 0.0, lambda a, b: a + b, (0,)) + lax.cond(
            x[0] > 0, lambda: x.sum(), lambda: 0.0
        )

    for eqn in body(fn, jnp.ones(3)).jaxpr.eqns:
        for found in jax_versions.bodies(eqn.params):
            assert len(found.jaxpr.constvars) == len(found.consts)


def test_evaluate_equations_and_scopes():
    def fn(x):
        with jax.named_scope("own"):
            return jnp.sin(x) * 2

    eqns = body(fn, jnp.ones(3)).jaxpr.eqns
    sin = jax_versions.without_scope(eqns[0])

    def again(x):
        with jax.named_scope("outer"):
            return jax_versions.evaluate_equations([sin], sin.invars, sin.outvars, [x])

    (eqn,) = jax.make_jaxpr(again)(jnp.ones(3)).jaxpr.eqns
    assert str(eqn.source_info.name_stack) == "outer"
    assert str(eqns[0].source_info.name_stack) == "own"
    assert eqn.source_info.traceback is not None

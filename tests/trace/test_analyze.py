"""Where ops are, what they are called, and which module runs them."""

import jax
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train.frontends.model import trace_function
from qwix_train.frontends.plan_of import plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import analyze, provenance

RULES = [QuantizationRule(weight_qtype="int8")]
X = jnp.ones((2, 4))


def modules(model, *args):
    return [(r["module_path"], r["op"]) for r in plan(model, RULES, *args).records()]


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.relu(nn.Dense(4, name="a")(x)))


def test_ids_count_within_a_module():
    def fn(p, x):
        for _ in range(2):
            x = jnp.einsum("bi,io->bo", x @ p["w"], p["w"])
        return x

    assert [op for _, op in modules(fn, {"w": jnp.ones((4, 4))}, X)] == [
        "dot_general0",
        "einsum0",
        "dot_general1",
        "einsum1",
    ]


def test_a_compiled_module_keeps_its_own_path():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            compiled = nn.jit(Mlp)
            return compiled(name="last")(compiled(name="first")(x))

    expected = [
        (f"{outer}/{inner}", "dot_general0")
        for outer in ("first", "last")
        for inner in "ab"
    ]
    assert modules(Model(), X) == expected
    # Once more, when JAX has the trace already.
    assert modules(Model(), X) == expected


def test_a_compiled_function_stays_in_the_module_that_calls_it():
    product = jax.jit(lambda w, x: x @ w)

    class Caller(nn.Module):
        @nn.compact
        def __call__(self, x):
            own = self.param("own", nn.initializers.ones, (4, 4))
            child = nn.Dense(4, name="child")
            x = product(own, child(x))
            return product(child.variables["params"]["kernel"], x)

    assert modules(Caller(), X) == [
        ("child", "dot_general0"),
        ("", "dot_general0"),
        ("", "dot_general1"),
    ]


def test_branches_and_loops_list_each_op_once():
    def fn(p, x):
        def body(carry, _):
            y, total = carry
            y = jax.lax.cond(total > 0, lambda y: y @ p["a"], lambda y: y @ p["b"], y)
            return (y, total + y.sum()), None

        # The carry starts as a constant, so that the body is looked at twice.
        return jax.lax.scan(body, (jnp.zeros((2, 4)), 0.0), x)[0]

    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    records = plan(fn, RULES, params, jnp.ones(3)).records()
    assert [(r["op"], r["weights"]) for r in records] == [
        ("dot_general0", ("b",)),
        ("dot_general1", ("a",)),
    ]


def test_what_a_function_closes_over():
    weight = jnp.ones((4, 4))

    def origins(closed):
        def fn(p, x):
            return x @ (p["w"] * closed)

        traced = trace_function(fn, ({"w": weight}, X), {})
        return [operand.provenance for operand in traced.ops[0].operands]

    _, scaled = origins(weight)
    assert isinstance(scaled, provenance.Weight)
    found = []
    # A tracer may depend on anything.
    jax.make_jaxpr(lambda closed: found.append(origins(closed)))(weight)
    assert found[0][1] == provenance.ACTIVATION


@pytest.mark.parametrize("layers", [4, 8])
def test_work_grows_linearly_with_depth(layers, monkeypatch):
    counts = {}
    original = provenance.propagate

    def counted(*args):
        counts[layers] = counts.get(layers, 0) + 1
        return original(*args)

    class Model(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.depth):
                x = x + Mlp()(nn.LayerNorm()(x))
            return x

    monkeypatch.setattr(provenance, "propagate", counted)
    model = Model(layers)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    traced = trace_function(model.apply, (variables, X), {})
    assert len(traced.ops) == 2 * layers

    def total(jaxpr):
        inner = jax.extend.core.jaxprs_in_params
        return len(jaxpr.eqns) + sum(
            total(body) for eqn in jaxpr.eqns for body in inner(eqn.params)
        )

    # Each equation is looked at once, however deep the model.
    assert counts[layers] <= total(traced.body.jaxpr)
    before = counts[layers]
    analyze.find_ops(
        traced.body,
        [
            provenance.param(p.path, p.value.shape) if p else provenance.ACTIVATION
            for p in traced.params
        ],
    )
    assert counts[layers] == 2 * before


@pytest.mark.parametrize(
    "wrapped",
    [
        jax.jit,
        jax.checkpoint,
        lambda f: lambda w, one: lax.cond(w[0, 0] > 0, f, f, w, one),
        lambda f: lambda w, one: lax.while_loop(jnp.any, lambda w: f(w, one), w),
        lambda f: (
            lambda w, one: lax.scan(lambda w, _: (f(w, one), None), w, None, 2)[0]
        ),
    ],
    ids=["jit", "remat", "cond", "while", "scan"],
)
def test_a_constant_that_moves_elements_is_known_inside_of_any_body(wrapped):
    def fn(p, x):
        return wrapped(lambda x, one: one @ x)(x * p["w"], jnp.eye(4)[::-1])

    traced = trace_function(fn, ({"w": jnp.ones((4, 4))}, jnp.ones((4, 4))), {})
    assert {op.moves for op in traced.ops} == {True}


def test_each_result_of_a_scan_has_a_source_of_its_own():
    def model(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), (jnp.exp(w), x.sum())

        x, (derived, _) = lax.scan(layer, x, params["w"])
        return x @ derived[0]

    params = {"w": jnp.ones((3, 4, 4))}
    op = plan(model, [QuantizationRule(weight_qtype="int8")], params, X[:, :4]).ops[1]
    assert not op.quantized and "computed from w by" in op.reason

"""The graph of a call computes what the call does, and knows what is what in it."""

import collections

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train.frontends.model import trace_function
from qwix_train.odml.graph import MAX_UNROLLED, build_graph, graph_of
from tests import models
from tests.compare import assert_close

X = models.normal(3, 4, seed=0)
W = {"w": models.normal(4, 4, seed=1), "b": np.arange(4, dtype=np.float32)}


def graph(fn, params=W, *inputs, **kwargs):
    """The graph of a function of params, and the values of its inputs."""
    traced = trace_function(fn, (params, *(inputs or (X,))), kwargs)
    return build_graph(traced), traced.inputs


def names(found):
    return [node.name for node in found.nodes]


def check(actual, expected):
    dtypes = [[x.dtype for x in jax.tree.leaves(t)] for t in (actual, expected)]
    assert dtypes[0] == dtypes[1]
    assert_close(actual, expected, 1e-6)


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda xs, ts: (jnp.round(*xs), ts[0]))


@jax.custom_vjp
def reversed_gradient(x):
    return x * 1.0


reversed_gradient.defvjp(lambda x: (x * 1.0, None), lambda _, g: (-g,))


def loop(reverse):
    def body(carry, x):
        carry = jnp.tanh(carry * x + 1)
        return carry, (carry, carry.sum())

    return lambda p, x: lax.scan(body, x[0], x, reverse=reverse)


def nested_loops(p, x):
    def outer(carry, row):
        inner = jax.jit(lambda c, y: (c * p["b"][0] + y, c))
        carry, ys = lax.scan(inner, carry, row)
        return carry, ys

    return lax.scan(outer, 0.5, x)


FUNCTIONS = {
    "jit": lambda p, x: jax.jit(jax.jit(lambda x: x @ p["w"]))(x) + p["b"],
    "remat": lambda p, x: jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(x),
    "custom_jvp": lambda p, x: nn.relu(x @ p["w"]),
    "scan": loop(reverse=False),
    "scan in reverse": loop(reverse=True),
    "nested": lambda p, x: jax.jit(jax.checkpoint(nested_loops))(p, x),
    "scan without iterations": lambda p, x: lax.scan(
        lambda c, y: (c + y, 2 * c), x[0], x[:0]
    ),
    "scan over nothing": lambda p, x: lax.scan(
        lambda c, _: (c * 2, None), x, None, length=3
    ),
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ p["w"]),
    "an input as output": lambda p, x: (x, x, p["w"]),
    "a duplicate as output": lambda p, x: [x + 1] * 2,
    "a constant as output": lambda p, x: (x * 2, jnp.arange(3), jnp.float32(1)),
    "Booleans as outputs": lambda p, x: (x > 0, jnp.ones((), bool)),
    "nothing": lambda p, x: [],
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_computes_what_the_function_does(name):
    fn = FUNCTIONS[name]
    found, values = graph(fn)
    expected = jax.tree.map(jnp.asarray, fn(W, X))
    check(found.run(values), expected)
    # Node by node, too.
    outs = found.run(values, lambda node, read: node.run(*map(read, node.inputs)))
    check(outs, expected)
    check(jax.jit(found.run)(values), expected)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ["jit", "remat", "custom_jvp", "scan", "nested"])
def test_its_gradients_are_those_of_the_function(name):
    fn = FUNCTIONS[name]

    def total(run):
        return lambda p, x: sum(jnp.sum(out**2) for out in jax.tree.leaves(run(p, x)))

    found, values = graph(fn)
    places = [next(i for i, v in enumerate(values) if v is w) for w in W.values()]

    def run(p, x):
        given = list(values)
        given[places[0]], given[places[1]] = p["w"], p["b"]
        given[next(i for i, v in enumerate(values) if v is X)] = x
        return found.run(given)

    actual = jax.jit(jax.grad(total(run), (0, 1)))(W, X)
    check(actual, jax.grad(total(fn), (0, 1))(W, X))


def test_it_runs_under_vmap():
    found, values = graph(lambda p, x: nn.softmax(x @ p["w"]))
    place = next(i for i, v in enumerate(values) if v is X)
    many = jnp.stack([X, 2 * X])

    def run(x):
        given = list(values)
        given[place] = x
        return found.run(given)[0]

    check(jax.vmap(run)(many), nn.softmax(many @ W["w"]))


def test_results_that_are_inputs_or_the_same_have_nodes_of_their_own():
    key = jax.random.key(7)

    def fn(p, x, flag, key):
        y = x * 2
        return p["w"], x, x, flag, key, y, y

    found, values = graph(fn, W, X, X > 0, key)
    assert len(set(map(id, found.outputs))) == 7
    assert not set(map(id, found.outputs)) & set(map(id, found.inputs))
    assert all(value.producer is not None for value in found.outputs)
    check(found.run(values), fn(W, X, X > 0, key))


def test_what_no_result_depends_on_is_left_out():
    def fn(p, x):
        jnp.exp(x @ p["w"])
        return x + p["b"]

    found, _ = graph(fn)
    assert "exp" not in names(found)
    assert "dot_general" not in names(found)
    assert all(found.nodes.index(v.producer) >= 0 for v in found.outputs)


def test_an_unread_result_of_an_operation_is_no_output():
    found, _ = graph(lambda p, x: jnp.split(x, 2, axis=1)[0] * 2)
    (split,) = [node for node in found.nodes if node.name == "split"]
    assert [len(value.consumers) for value in split.outputs] == [1, 0]


def test_loops_are_unrolled_step_by_step():
    found, _ = graph(loop(reverse=True))
    count = collections.Counter(names(found))
    assert count["tanh"] == X.shape[0]
    assert count["concatenate"] == 2
    assert "scan" not in count


def test_a_long_loop_is_an_error_that_says_where_it_is():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.SimpleCell(2), name="rnn")(x)

    x = jnp.ones((1, MAX_UNROLLED + 1, 2))
    variables = jax.eval_shape(Cell().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables)
    with pytest.raises(ValueError, match=r"rnn: a scan of 257 iterations.*at most 256"):
        graph(Cell().apply, variables, x)
    found, _ = graph(Cell().apply, variables, x[:, :3])
    assert names(found).count("tanh") == 3


def test_params_and_what_is_made_of_them_are_static():
    def fn(p, x):
        scaled = jnp.exp(p["w"] * 2)
        return x @ scaled, scaled + 1

    found, _ = graph(fn)
    (product,) = [node for node in found.nodes if node.name == "dot_general"]
    assert [value.static for value in product.inputs] == [False, True]
    assert [value.is_activation for value in found.outputs] == [True, False]
    assert [v.static for v in found.inputs] == [True, True, False]


def test_random_numbers_are_neither_static_nor_activations():
    def fn(p, x):
        noise = jax.random.normal(jax.random.key(0), x.shape) * p["b"]
        return noise, x + noise

    found, values = graph(fn)
    noise, total = found.outputs
    assert (noise.static, noise.random, noise.is_activation) == (False, True, False)
    assert (total.static, total.random, total.is_activation) == (False, False, True)
    check(found.run(values), fn(W, X))


def test_statistics_of_a_batch_are_static():
    model = nn.BatchNorm(use_running_average=False)
    variables = jax.jit(model.init)(jax.random.key(0), X)

    def fn(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    found, values = graph(fn, variables)
    outputs = {value.shape: value for value in found.outputs}
    assert outputs[X.shape].is_activation
    assert outputs[4,].static  # the running averages
    assert all(n.place.in_batch_norm for n in found.nodes if n.name == "reduce_sum")
    check(found.run(values), fn(variables, X))


def test_numbers_are_found_through_what_keeps_them():
    found = graph_of(lambda x: x * jnp.broadcast_to(jnp.float32(2.5), (3, 4)), X)
    (product,) = [node for node in found.nodes if node.name == "mul"]
    assert product.inputs[1].number == 2.5
    assert product.inputs[0].number is None
    found = graph_of(lambda x: x * np.arange(4.0, dtype=np.float32), X)
    (product,) = [node for node in found.nodes if node.name == "mul"]
    assert all(value.number is None for value in product.inputs)


@pytest.mark.parametrize(
    "fn, source",
    [
        (straight_through, "straight_through"),
        (reversed_gradient, "a custom_vjp"),
        (nn.relu, None),
        (nn.gelu, None),
        (nn.silu, None),
        (nn.log_softmax, None),
    ],
)
def test_functions_with_a_derivative_rule_of_their_own(fn, source):
    found, _ = graph(lambda p, x: jax.jit(fn)(x) + 1)
    found_sources = {node.place.derivative for node in found.nodes[:-1]}
    assert found.nodes[-1].place.derivative is None
    if source is None:
        assert found_sources == {None}
    else:
        assert any(source in (name or "") for name in found_sources)


def test_einsums_and_modules_have_their_names():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="first")(x)
            return jnp.einsum("bi,bj->bij", x, x)

    variables = jax.jit(Model().init)(jax.random.key(0), X)
    found, _ = graph(Model().apply, variables)
    paths = {node.name: node.place.module_path for node in found.nodes}
    assert paths["dot_general"] == "first"
    assert paths["einsum"] == ""


def test_nodes_that_are_replaced_are_put_in_order():
    found = graph_of(lambda x: jnp.exp(x) + jnp.sin(x), X)
    exp, sin, add = found.nodes
    found.nodes = [add, sin, exp]
    found.link()
    assert found.nodes[-1] is add
    check(found.run([X]), jnp.exp(X) + jnp.sin(X))

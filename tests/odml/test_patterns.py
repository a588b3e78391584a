"""Functions are found, look-alikes are not, and values stay the same."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train import QuantizationRule, odml, quantize_fn
from qwix_train.frontends.model import trace_function
from qwix_train.odml.graph import build_graph, graph_of
from qwix_train.odml.patterns import find_patterns
from tests import models

X = 2 * models.normal(3, 4, seed=0)
SQUARE = 2 * models.normal(4, 4, seed=1)
CUBE = 2 * models.normal(4, 4, 4, seed=2)
IMAGE = models.normal(2, 6, 6, 3, seed=3)
# What only moves elements.
MOVES = ("broadcast_in_dim", "reshape", "convert_element_type", "copy", "squeeze")


def searched(fn, *inputs):
    """The graph of a function after the search; it computes what it did before."""
    graph = graph_of(fn, *inputs)
    expected = jax.tree.leaves(jax.jit(fn)(*inputs))
    find_patterns(graph)
    for actual, out in zip(graph.run(inputs), expected, strict=True):
        assert actual.dtype == out.dtype
        np.testing.assert_allclose(actual, out, 2e-6, 2e-6)
    return graph


def names(graph):
    return [node.name for node in graph.nodes if node.name not in MOVES]


def unshifted(x):
    e = jnp.exp(x)
    return e / e.sum(-1, keepdims=True)


def shifted_by_all(x):
    e = jnp.exp(x - jnp.max(x))
    return e / jnp.sum(e, axis=1, keepdims=True)


FOUND = {
    "softmax": (nn.softmax, "softmax"),
    "softmax of axis 0": (lambda x: nn.softmax(x, axis=0), "softmax"),
    "softmax without a shift": (unshifted, "softmax"),
    "softmax with one shift": (shifted_by_all, "softmax"),
    "softmax without gradients": (lambda x: jax.jit(nn.softmax)(x), "softmax"),
    "softmax of rows": (jax.vmap(nn.softmax), "softmax"),
    "log_softmax": (nn.log_softmax, "log_softmax"),
    "log_softmax of axis 0": (lambda x: nn.log_softmax(x, axis=0), "log_softmax"),
    "log_softmax of rows": (jax.vmap(nn.log_softmax), "log_softmax"),
    "gelu": (nn.gelu, "gelu"),
    "gelu of rows": (jax.vmap(nn.gelu), "gelu"),
    "silu": (nn.silu, "silu"),
    "silu by hand": (lambda x: x * nn.sigmoid(x), "silu"),
    "hard_swish": (nn.hard_swish, "hard_swish"),
    "leaky_relu": (nn.leaky_relu, "leaky_relu"),
    "leaky_relu of 0.3": (lambda x: nn.leaky_relu(x, 0.3), "leaky_relu"),
    "leaky_relu of 2": (lambda x: nn.leaky_relu(x, 2), "leaky_relu"),
    "relu": (nn.relu, "relu"),
    "relu by hand": (lambda x: jnp.maximum(0, x), "relu"),
    "relu6": (nn.relu6, "relu6"),
    "relu6 by jnp.clip": (lambda x: jnp.clip(x, 0, 6), "relu6"),
    "relu6 by lax.clamp": (lambda x: lax.clamp(0.0, x, 6.0), "relu6"),
    "relu6 inside out": (lambda x: jnp.maximum(0, jnp.minimum(x, 6.0)), "relu6"),
    "relu_n1_to_1": (lambda x: jnp.clip(x, -1, 1), "relu_n1_to_1"),
    "clip": (lambda x: jnp.clip(x, -0.5, 0.7), "clip"),
    "clip of one side": (lambda x: jnp.minimum(x, 0.7), "clip"),
    "clip three times": (
        lambda x: jnp.maximum(jnp.minimum(jnp.maximum(x, -1), 0.5), 0),
        "clip",
    ),
    "mean": (jnp.mean, "mean"),
    "mean of an axis": (lambda x: x.mean(0), "mean"),
    "mean with the axis": (lambda x: x.mean(1, keepdims=True), "mean"),
    "mean by hand": (lambda x: x.sum(1) / 4, "mean"),
    "sigmoid": (lambda x: nn.sigmoid(x), "logistic"),
}


@pytest.mark.thinned(15)
@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    fn, expected = FOUND[name]
    graph = searched(fn, X)
    assert names(graph) == [expected]
    # In a larger function, and compiled.
    graph = searched(lambda x: jax.jit(fn)(x * 2) + 1, X)
    assert names(graph) == ["mul", expected, "add"]


def test_what_was_found_knows_its_parameters():
    def node(fn, x=X):
        return next(n for n in searched(fn, x).nodes if n.name not in MOVES)

    assert node(functools.partial(nn.softmax, axis=0)).params["axis"] == 0
    np.testing.assert_allclose(
        node(lambda x: nn.leaky_relu(x, 0.3)).run(X, 0.3)[0], nn.leaky_relu(X, 0.3)
    )
    bounds = node(lambda x: jnp.clip(x, -0.5, 0.75)).params["bounds"]
    assert bounds == (-0.5, 0.75)
    three = node(lambda x: jnp.maximum(jnp.minimum(jnp.maximum(x, -1), 0.5), 0))
    assert three.params["bounds"] == (0, 0.5)
    assert node(lambda x: x.mean((0, 2)), CUBE).params["axes"] == (0, 2)


def test_softmax_of_vmapped_columns():
    graph = searched(jax.vmap(nn.softmax, in_axes=1, out_axes=1), X)
    assert "softmax" in names(graph)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_softmax_in_fewer_bits_sums_up_in_float32(dtype):
    for fn in (nn.softmax, nn.log_softmax):
        graph = graph_of(fn, X.astype(dtype))
        find_patterns(graph)
        assert names(graph) == [fn.__name__]
        (out,) = graph.run([X.astype(dtype)])
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype(float), fn(X), 0.02, 0.02)


def test_a_softmax_in_float32_of_a_model_in_bfloat16():
    def fn(x):
        e = jnp.exp(x.astype(np.float32)).astype(jnp.bfloat16)
        return e / e.sum(1, keepdims=True)

    graph = graph_of(fn, X.astype(jnp.bfloat16))
    find_patterns(graph)
    (out,) = graph.run([X.astype(jnp.bfloat16)])
    assert out.dtype == jnp.bfloat16 == graph.outputs[0].dtype


def test_elu_is_made_of_what_litert_has():
    graph = searched(nn.elu, X)
    assert names(graph) == ["relu", "clip", "exp", "sub", "add"]


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_average_pooling(padding, count_include_pad):
    def fn(x):
        return nn.avg_pool(
            x, (3, 2), (2, 1), padding, count_include_pad=count_include_pad
        )

    graph = searched(fn, IMAGE)
    assert graph.outputs[0].producer.name == "avg_pool"


# What looks like a function that would be found.
OTHERS = {
    "exp over sums of columns": (
        lambda x: jnp.exp(x) / jnp.broadcast_to(jnp.exp(x).sum(1), x.shape),
        ["exp", "exp", "reduce_sum", "div"],
    ),
    "shared exp over sums of columns": (
        lambda x: (lambda e: e / jnp.broadcast_to(e.sum(1), x.shape))(jnp.exp(x)),
        ["exp", "reduce_sum", "div"],
    ),
    "exp over a sum of two axes": (
        lambda x: (lambda e: e / e.sum())(jnp.exp(x)),
        ["exp", "reduce_sum", "div"],
    ),
    "exp over the sum of another": (
        lambda x: jnp.exp(x) / jnp.exp(2 * x).sum(1, keepdims=True),
        ["exp", "mul", "exp", "reduce_sum", "div"],
    ),
    "logarithm of sums of columns": (
        lambda x: x - jnp.broadcast_to(jnp.log(jnp.exp(x).sum(1)), x.shape),
        ["exp", "reduce_sum", "log", "sub"],
    ),
    "softmax shifted by other rows": (
        lambda x: unshifted(x - jnp.broadcast_to(x.max(1), x.shape)),
        ["reduce_max", "sub", "softmax"],
    ),
    "mean by another number": (
        lambda x: x.sum(1) / 3,
        ["reduce_sum", "div", "mul"],
    ),
    "sum by an activation": (lambda x: x.sum(1) / x[0], None),
    "maximum of two": (lambda x: jnp.maximum(x, x.T), ["transpose", "max"]),
    "maximum with a row": (
        lambda x: jnp.maximum(x, jnp.arange(4.0)),
        ["iota", "max"],
    ),
    "gelu of other numbers": (
        lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.044715 * x**3))),
        None,
    ),
    "hard_swish of other numbers": (lambda x: x * nn.relu6(x + 2) / 6, None),
    "sigmoid of another": (
        lambda x: x.T * nn.sigmoid(x),
        ["transpose", "logistic", "mul"],
    ),
    "clip of bounds that exclude each other": (
        lambda x: jnp.maximum(jnp.minimum(x, -1.0), 1.0),
        ["clip", "clip"],
    ),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", OTHERS)
def test_look_alikes(name):
    fn, expected = OTHERS[name]
    graph = searched(fn, SQUARE)
    assert not {"gelu", "hard_swish", "silu", "mean"} & set(names(graph))
    if expected is not None:
        assert names(graph) == expected


def test_bounds_that_exclude_each_other_say_what_each_does():
    graph = searched(lambda x: jnp.maximum(jnp.minimum(x, -1.0), 1.0), X)
    bounds = [node.params["bounds"] for node in graph.nodes if node.name == "clip"]
    assert bounds == [(-np.inf, -1), (1, np.inf)]


def test_parts_that_others_read_stay():
    def softmax(x):
        e = jnp.exp(x)
        return e / e.sum(-1, keepdims=True), e

    assert names(searched(softmax, X)) == ["exp", "softmax"]

    def mean(x):
        total = x.sum(1)
        return total / 4, total

    assert "mean" not in names(searched(mean, X))

    def clip(x):
        y = jnp.maximum(x, -1)
        return jnp.minimum(y, 1), y

    found = searched(clip, X)
    assert names(found) == ["clip", "clip"]

    def gelu(x):
        y = jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * (x * x * x)))
        return 0.5 * x * (1 + y), y

    assert "gelu" not in names(searched(gelu, X))


def test_integers_are_left_alone():
    x = jnp.arange(12).reshape(3, 4)
    assert names(searched(lambda x: jnp.maximum(x, 0) * -x, x)) == ["max", "neg", "mul"]


def test_a_mask_that_is_an_input_is_no_dropout():
    graph = searched(lambda x, mask: jnp.where(mask, x, 0.0), X, X > 0)
    assert names(graph) == ["select_n"]


# Variances.


@pytest.mark.thinned(10)
@pytest.mark.parametrize("axes", [(0,), (1,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_a_variance_does_not_subtract_large_numbers(axes, keepdims):
    def fn(x):
        mean = x.mean(axes, keepdims=keepdims)
        return jnp.maximum((x * x).mean(axes, keepdims=keepdims) - mean * mean, 0)

    x = 0.1 * CUBE + 100
    graph = graph_of(fn, x)
    find_patterns(graph)
    assert names(graph) == ["mean", "sub", "mul", "mean"]
    (out,) = graph.run([x])
    expected = np.asarray(x, np.float64).var(axes, keepdims=keepdims)
    np.testing.assert_allclose(out, expected, 1e-3)
    assert np.abs(fn(x) - expected).max() > 3e-3 * expected.max()
    # Of numbers around zero both are right, and so are the gradients.
    (out,) = graph.run([CUBE])
    np.testing.assert_allclose(out, fn(CUBE), 1e-5, 1e-6)
    total = jax.grad(lambda x: jnp.sum(graph.run([x])[0] ** 2))(CUBE)
    np.testing.assert_allclose(
        total, jax.grad(lambda x: jnp.sum(fn(x) ** 2))(CUBE), 1e-4, 1e-5
    )


def test_a_variance_next_to_a_difference_along_other_axes():
    def fn(x):
        mean = x.mean(1)
        variance = (x * x).mean(1) - mean * mean
        return x - jnp.broadcast_to(mean, x.shape), x - mean[:, None], variance

    searched(fn, SQUARE)

    def without_its_own(x):
        mean = x.mean(1)
        return x - mean, (x * x).mean(1) - mean * mean

    searched(without_its_own, SQUARE)


def test_other_differences_of_means_are_no_variances():
    def fn(x):
        return (x * x).mean(1) - x.mean(0) ** 2, (x * x).mean(1) - x.mean(1)

    assert names(searched(fn, SQUARE)).count("sub") == 2


NORMS = {
    "LayerNorm": (nn.LayerNorm(), (-1,)),
    "LayerNorm of two axes": (nn.LayerNorm(reduction_axes=(-2, -1)), (-2, -1)),
    "slow LayerNorm": (nn.LayerNorm(use_fast_variance=False), (-1,)),
    "InstanceNorm": (nn.InstanceNorm(), (1,)),
    "GroupNorm": (nn.GroupNorm(2), None),
    "RMSNorm": (nn.RMSNorm(), "rms"),
}


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("mean", [0, 5])
def test_normalization_layers(name, mean):
    model, axes = NORMS[name]
    x = jax.random.normal(jax.random.key(0), (2, 5, 4)) + mean
    variables = jax.jit(model.init)(jax.random.key(1), x)
    traced = trace_function(model.apply, (variables, x), {})
    graph = build_graph(traced)
    find_patterns(graph)
    (out,) = graph.run(traced.inputs)
    # By hand.
    z = np.asarray(x, np.float64)
    if axes == "rms":
        expected = z / np.sqrt((z**2).mean(-1, keepdims=True) + model.epsilon)
    else:
        z = z.reshape(2, 5, 2, 2) if axes is None else z
        over = (1, 3) if axes is None else axes
        centered = z - z.mean(over, keepdims=True)
        expected = centered / np.sqrt(z.var(over, keepdims=True) + model.epsilon)
    np.testing.assert_allclose(out, expected.reshape(x.shape), 1e-4, 1e-5)
    found = names(graph)
    assert found.count("rsqrt") == 1
    assert not {"square", "integer_pow", "div", "neg"} & set(found)
    # No square of a mean: that of the differences is one.
    assert found.count("mean") == (1 if axes == "rms" else 2)


# Rewriting.


@pytest.mark.parametrize("power", [2, 3, 5])
def test_powers_are_products(power):
    assert names(searched(lambda x: x**power, X)) == ["mul"] * (power - 1)


def test_other_powers_stay():
    assert names(searched(lambda x: x**-2, X)) == ["integer_pow"]
    assert names(searched(lambda x: jnp.abs(x) ** 0.5, X)) == ["abs", "pow"]


def test_squares_negation_and_quotients_are_products():
    assert names(searched(jnp.square, X)) == ["mul"]
    assert names(searched(lambda x: -x, X)) == ["mul"]
    row = jnp.array([1.0, 2.0, 3.0, 4.0])

    def quotient(params, x):
        return x / params

    traced = trace_function(quotient, (row, X), {})
    graph = build_graph(traced)
    find_patterns(graph)
    assert [n.name for n in graph.nodes if n.is_activation] == ["mul"]
    np.testing.assert_allclose(graph.run(traced.inputs)[0], X / row, 1e-6)
    assert names(searched(lambda x: 1 / x, X)) == ["div"]
    assert names(searched(lambda x, y: x / y, X, X)) == ["div"]


def test_a_scale_is_multiplied_last():
    scale = jnp.array([1.0, -2.0, 3.0, 4.0])

    def norm(scale, x):
        row = x.sum(1, keepdims=True)
        return x * (row * scale), (row * scale) * x

    traced = trace_function(norm, (scale, X), {})
    graph = build_graph(traced)
    find_patterns(graph)
    for out in graph.outputs:
        assert out.producer.inputs[1].static or out.producer.inputs[0].static
    for actual, expected in zip(graph.run(traced.inputs), norm(scale, X), strict=True):
        np.testing.assert_allclose(actual, expected, 1e-5, 1e-5)


# Dropout.


class Attention(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.4, deterministic=not self.train
        )(x)
        return nn.Dropout(0.3, deterministic=not self.train)(x) * 2


@pytest.mark.slow
def test_dropout_is_found_in_a_layer_and_in_attention():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    variables = jax.jit(Attention().init)(jax.random.key(1), x)
    rngs = {"rngs": {"dropout": jax.random.key(2)}}
    model = Attention(train=True)
    traced = trace_function(model.apply, (variables, x), rngs)
    graph = build_graph(traced)
    find_patterns(graph)
    activations = [n.name for n in graph.nodes if n.is_activation]
    assert activations.count("dropout") == 2
    expected = jax.jit(model.apply)(variables, x, **rngs)
    np.testing.assert_allclose(graph.run(traced.inputs)[0], expected, 1e-5, 1e-6)
    # But for it the operations are those of the model that evaluates.
    traced = trace_function(Attention().apply, (variables, x), {})
    graph = build_graph(traced)
    find_patterns(graph)
    evaluated = [n.name for n in graph.nodes if n.is_activation]
    assert [name for name in activations if name != "dropout"] == evaluated


def test_random_noise_is_no_dropout():
    def fn(p, x):
        noise = jax.random.normal(jax.random.key(0), x.shape)
        return jnp.exp(x) * noise + jnp.where(noise > 0, x, 1.0)

    traced = trace_function(fn, ({}, X), {})
    graph = build_graph(traced)
    find_patterns(graph)
    assert "dropout" not in names(graph)
    np.testing.assert_allclose(graph.run(traced.inputs)[0], fn({}, X), 1e-5, 1e-6)


# Functions of a user with derivative rules.


def with_rule(fn):
    """A function whose gradient is not that of its operations."""
    wrapped = jax.custom_vjp(lambda x: fn(x))
    wrapped.defvjp(lambda x: (fn(x), x), lambda x, g: (jnp.zeros_like(x),))
    return wrapped


RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "fn",
    [
        nn.softmax,
        nn.log_softmax,
        nn.gelu,
        nn.elu,
        nn.relu,
        jnp.mean,
        jnp.square,
        lambda x: -x,
        lambda x: x / 3,
        lambda x: x**3,
        lambda x: x * 2,
        lambda x: jnp.maximum((x * x).mean(1) - x.mean(1) ** 2, 0),
    ],
)
def test_a_derivative_rule_of_a_user_is_not_lost(fn):
    provider = odml.OdmlQatProvider(RULES, quant_stats={})
    quantized = quantize_fn(lambda p, x: with_rule(fn)(x @ p), provider)
    with pytest.raises(ValueError, match="derivative rule.*would be lost"):
        quantized(SQUARE, X)


def test_a_custom_jvp_names_the_function():
    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    provider = odml.OdmlQatProvider(rules, quant_stats={}, strict=False)

    @jax.custom_jvp
    def twice(x):
        return 2 * x

    twice.defjvp(lambda xs, ts: (2 * xs[0], ts[0]))
    quantized = quantize_fn(lambda p, x: twice(x @ p), provider)
    with pytest.raises(ValueError, match="multiply0 is part of .*twice"):
        quantized(SQUARE, X)
    # In float it keeps its rule.
    rules = [QuantizationRule(op_names=("dot_general",), weight_qtype="int8")]
    quantized = quantize_fn(lambda p, x: twice(x @ p), odml.OdmlQatProvider(rules))
    np.testing.assert_allclose(quantized(SQUARE, X), 2 * X @ SQUARE, 0.05, 0.1)


def test_a_choice_that_is_known_is_none():
    x = jax.device_put(np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    graph = graph_of(lambda x: jnp.var(x, axis=-1), x)
    find_patterns(graph)
    assert "select_n" not in {node.name for node in graph.nodes}
    np.testing.assert_allclose(graph.run([x])[0], np.var(x, axis=-1), rtol=1e-5)


def test_a_relu_written_as_a_choice():
    x = jnp.asarray([[-1.0, 0.0, 2.0]])
    graph = graph_of(lambda x: jnp.where(x > 0, x, 0.0), x)
    find_patterns(graph)
    assert [n.name for n in graph.nodes if n.is_activation] == ["relu"]
    np.testing.assert_array_equal(graph.run([x])[0], [[0.0, 0.0, 2.0]])


def test_what_prints_goes_on_printing(capfd):
    def function(x):
        jax.debug.print("seen {}", x[0])
        return 2 * x

    graph = graph_of(function, jnp.ones(2))
    find_patterns(graph)
    graph.run([jnp.ones(2)])
    jax.effects_barrier()
    assert "seen 1.0" in capfd.readouterr().out

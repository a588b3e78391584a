"""Products in the form that the converter knows are the products of `lax`."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train.frontends.model import trace_function
from qwix_train.odml import lowering
from qwix_train.odml.evaluate import per_channel
from qwix_train.odml.graph import build_graph
from qwix_train.odml.patterns import find_patterns
from tests.pairwise import pairwise


def node_of(fn, w, x):
    """The product of a function, and the side of its weight."""
    graph = build_graph(trace_function(fn, (w, x), {}))
    (node,) = [n for n in graph.nodes if n.name in PRODUCTS]
    return node, [value.static for value in node.inputs[:2]].index(True)


PRODUCTS = ("dot_general", "einsum", "conv_general_dilated")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Seen:
    """What marks that change nothing saw."""

    def __init__(self):
        self.weights, self.shapes = [], []

    def marks(self, node, addend, least):
        """The marks of a product to which a number for each channel is added."""
        bias = 0 if addend is None else per_channel(node, addend).reshape(-1)
        return lowering.Marks(
            weight=self.weight,
            input=self.same,
            output=self.same,
            finish=lambda x: jnp.maximum(x + bias, least),
            dynamic=None,
        )

    def weight(self, w, axis):
        self.weights.append((w.shape, axis))
        return jax.device_put(w)

    def same(self, x):
        self.shapes.append(x.shape)
        return x


# Shapes of x and w; contracted axes of x and of w.
DOTS = {
    "matrix": ((2, 4), (4, 3), (1,), (0,)),
    "transposed weight": ((2, 4), (3, 4), (1,), (1,)),
    "first axis of x": ((4, 2), (4, 3), (0,), (0,)),
    "middle axis of x": ((2, 4, 5), (4, 3), (1,), (0,)),
    "two axes": ((2, 4, 5), (4, 5, 3), (1, 2), (0, 1)),
    "two axes in another order": ((2, 4, 5), (3, 5, 4), (1, 2), (2, 1)),
    "two axes apart": ((4, 2, 5), (5, 3, 4), (2, 0), (0, 2)),
    "weight in three axes": ((2, 5, 4), (3, 4, 6), (2,), (1,)),
    "vector": ((4,), (4, 3), (0,), (0,)),
    "all of x": ((4, 5), (5, 4, 3), (1, 0), (0, 1)),
    "a number for each row": ((2, 4), (4,), (1,), (0,)),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("bias", "name", "side"), pairwise([None, "channel", "axis"], DOTS, [0, 1])
)
def test_dot(name, side, bias):
    x_shape, w_shape, contracted_x, contracted_w = DOTS[name]
    x, w = normal(*x_shape), normal(*w_shape, seed=1)

    def fn(w, x):
        operands, axes = [w, x], [contracted_w, contracted_x]
        if side == 1:
            operands, axes = operands[::-1], axes[::-1]
        return lax.dot_general(*operands, (tuple(axes), ((), ())))

    node, found = node_of(fn, w, jax.device_put(x))
    assert found == side
    free_x, free_w = x.ndim - len(contracted_x), w.ndim - len(contracted_w)
    first = 0 if side == 0 else free_x
    sizes = node.out.shape[first : first + free_w]
    addend = None
    if bias == "channel":
        after = len(node.out.shape) - first - free_w
        addend = normal(*sizes, *[1] * after, seed=2)
    elif bias == "axis":
        addend = np.float32(0.5)
    seen = Seen()
    marks = seen.marks(node, addend, -0.5)
    out = lowering.lowered_dot(node, side, jax.device_put(x), w, marks)
    expected = fn(w.astype(np.float64), x.astype(np.float64))
    expected = np.asarray(expected) + (0 if addend is None else addend)
    np.testing.assert_allclose(out, np.maximum(expected, -0.5), 1e-5, 1e-5)
    # One matrix, with the scales along its columns.
    depth = int(np.prod([w.shape[a] for a in contracted_w]))
    assert seen.weights == [((depth, w.size // depth), 1)]


CONVS = {
    "channels last": (("NHWC", "HWIO", "NHWC"), {}),
    "channels first": (("NCHW", "OIHW", "NCHW"), {}),
    "other output": (("NHWC", "HWIO", "NCHW"), {}),
    "channels in the middle": (("HCWN", "OHWI", "WNHC"), {"padding": "SAME"}),
    "same": (("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
    "strides": (("NCHW", "HWIO", "NHWC"), {"window_strides": (2, 3)}),
    "padding": (("NHWC", "HWIO", "NHWC"), {"padding": ((1, 2), (0, 3))}),
    "negative padding": (("NHWC", "HWIO", "NHWC"), {"padding": ((-1, 2), (1, -2))}),
    "dilated kernel": (("NHWC", "OIHW", "NHWC"), {"rhs_dilation": (2, 1)}),
    "dilated input": (
        ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": (2, 3), "padding": ((1, 1), (2, 0))},
    ),
    "dilated input, one way": (
        ("NCHW", "HWIO", "NHWC"),
        {"lhs_dilation": (1, 2), "padding": ((0, 0), (1, 1))},
    ),
    "dilated input, cut": (
        ("NHWC", "HWIO", "NHWC"),
        {"lhs_dilation": (2, 2), "padding": ((-1, 0), (1, -1))},
    ),
    "groups": (("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}),
    "depthwise": (("NCHW", "OIHW", "NCHW"), {"feature_group_count": 4}),
    "1-D": (("NHC", "HIO", "NHC"), {}),
    "1-D, channels first": (("NCH", "OIH", "NCH"), {"padding": ((2, 0),)}),
    "1-D, dilated": (
        ("NHC", "HIO", "NHC"),
        {"rhs_dilation": (2,), "window_strides": (2,)},
    ),
    "1-D, dilated input": (
        ("NHC", "HIO", "NHC"),
        {"lhs_dilation": (2,), "padding": ((1, 2),)},
    ),
    "1-D, cut": (("NHC", "HIO", "NHC"), {"padding": ((-2, 1),)}),
}


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("bias", [True, False])
def test_conv(name, bias):
    (lhs, rhs, out), options = CONVS[name]
    options = {"padding": "VALID", **options}
    groups = options.get("feature_group_count", 1)
    sizes = {"N": 2, "H": 7, "W": 6, "C": 4}
    kernel = {"H": 3, "W": 2, "I": 4 // groups, "O": 8}
    strides = options.pop("window_strides", (1,) * (len(lhs) - 2))
    x = normal(*(sizes[a] for a in lhs))
    w = normal(*(kernel[a] for a in rhs), seed=1)

    def fn(w, x):
        return lax.conv_general_dilated(
            x, w, strides, dimension_numbers=(lhs, rhs, out), **options
        )

    node, side = node_of(fn, jax.device_put(w), jax.device_put(x))
    assert side == 1
    addend = None
    if bias:
        addend = normal(*(8 if a == "C" else 1 for a in out), seed=2)
    seen = Seen()
    marks = seen.marks(node, addend, -1)
    actual = lowering.lowered_conv(node, jax.device_put(x), w, marks)
    expected = fn(w, x) if addend is None else fn(w, x) + addend
    assert actual.shape == node.out.shape
    np.testing.assert_allclose(actual, jnp.maximum(expected, -1), 1e-5, 1e-5)
    height = 1 if len(lhs) == 3 else 3
    width = 3 if len(lhs) == 3 else 2
    assert seen.weights == [((height, width, 4 // groups, 8), 3)]
    # LiteRT pads no array of more than four axes.
    assert all(len(shape) <= 4 for shape in seen.shapes)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_softmax(axis):
    x = 3 * normal(3, 4, 5)

    def fn(w, x):
        return jax.nn.softmax(x, axis)

    graph = build_graph(trace_function(fn, ({}, jax.device_put(x)), {}))
    find_patterns(graph)
    (node,) = graph.nodes
    out = lowering.lowered_softmax(node, jax.device_put(x))
    z = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(out, z / z.sum(axis, keepdims=True), 1e-5, 1e-6)


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 0), (0, 2))])
def test_avg_pool(padding, count_include_pad):
    x = jax.device_put(normal(2, 6, 7, 3))

    def fn(w, x):
        return nn.avg_pool(
            x, (3, 2), (2, 2), padding, count_include_pad=count_include_pad
        )

    traced = trace_function(fn, ({}, x), {})
    graph = build_graph(traced)
    find_patterns(graph)
    node = graph.outputs[0].producer
    assert node.name == "avg_pool"
    divisor = node.inputs[1]
    if divisor.constant is None:
        divisor = graph_value(graph, divisor)
    else:
        divisor = divisor.constant
    out = lowering.lowered_pool(node, [x, np.asarray(divisor)], lambda x: x)
    np.testing.assert_allclose(out, fn({}, x), 1e-5, 1e-6)


def graph_value(graph, value):
    node = value.producer
    operands = [
        v.constant if v.constant is not None else graph_value(graph, v)
        for v in node.inputs
    ]
    return node.run(*operands)[node.outputs.index(value)]


def test_lookups_outside_of_the_table_find_its_ends():
    table = jax.device_put(normal(5, 3))
    indices = jnp.array([[4, 0], [7, -9]])
    graph = build_graph(trace_function(lambda p, i: p[i], (table, indices), {}))
    (node,) = [n for n in graph.nodes if n.name == "gather"]
    inner = indices[..., None]
    out = lowering.lowered_lookup(node, table, inner)
    np.testing.assert_array_equal(out, table[jnp.array([[4, 0], [4, 0]])])

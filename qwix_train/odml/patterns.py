"""Functions that a trace shows as several operations, and that LiteRT has as one.

`find_patterns` looks for what `jax.nn` and `jax.numpy` make of these functions: each is
traced as the installed version of JAX does it, and the graph is searched for equal
parts. What LiteRT has no integer form of is replaced by operations that it has one of.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.odml.graph import MOVES, Graph, Node, Value, known_value
from qwix_train.odml.ops import MASKED
from qwix_train.odml.rewrites import (
    ANY_NUMBER,
    fuse,
    is_inside,
    substitute,
    template,
)
from qwix_train.odml.softmax import find_log_softmax, find_softmax, stands_along


def find_patterns(graph: Graph) -> None:
    """Replaces the parts of a graph that are such functions, in place."""
    for searches in _PASSES:
        present = set(map(id, graph.nodes))
        # Outer functions before inner ones.
        for node in reversed(list(graph.nodes)):
            if id(node) not in present or not node.outputs or not node.out.is_float:
                continue
            for find in searches.get(node.name, ()):
                if find(graph, node):
                    graph.link()
                    present = set(map(id, graph.nodes))
                    break


def _mean(graph: Graph, root: Node) -> bool:
    """A sum over axes, divided by how many were added."""
    value, divisor = root.inputs
    total, nodes = value.producer, [root]
    while total is not None and total.name in ("reshape", "broadcast_in_dim"):
        # With `keepdims`, an axis of length 1 comes in between.
        if np.prod(total.out.shape) != np.prod(total.inputs[0].shape):
            return False
        nodes.append(total)
        total = total.inputs[0].producer
    if total is None or total.name != "reduce_sum" or divisor.number is None:
        return False
    count = np.prod([total.inputs[0].shape[axis] for axis in total.params["axes"]])
    if count != divisor.number:
        return False
    nodes.append(total)
    return fuse(
        graph, nodes, root, "mean", [total.inputs[0]], axes=total.params["axes"]
    )


def _avg_pool(graph: Graph, root: Node) -> bool:
    """A sum over windows, divided by how many were added."""
    value, divisor = root.inputs
    total = value.producer
    if total is None or total.name not in ("reduce_window_sum", "reduce_window"):
        return False
    inputs = [total.inputs[0], divisor]
    if not divisor.static:
        return False
    return fuse(graph, [total, root], root, "avg_pool", inputs, **total.params)


def _variance(graph: Graph, root: Node) -> bool:
    """`mean(x**2) - mean(x)**2`, as the mean of `(x - mean(x))**2`.

    In integers the difference of two large numbers would leave nothing of a small
    variance.
    """
    squares, square = (value.producer for value in root.inputs)
    if root.place.in_batch_norm or squares is None or square is None:
        return False
    squared, mean = squares.inputs[0].producer, _squared(square)
    average = None if mean is None else mean.producer
    if mean is None or squared is None or average is None:
        return False
    if {squares.name, average.name} != {"mean"}:
        return False
    x, axes = _squared(squared), tuple(average.params["axes"])
    if x is None or average.inputs[0] is not x or axes != tuple(squares.params["axes"]):
        return False
    nodes = [squared, squares, square, root]
    centered = _centered(x, mean)
    if not root.out.is_output and [c.name for c in root.out.consumers] == ["relu"]:
        # What keeps a difference from becoming negative; the new form is never.
        root = root.out.consumers[0]
        nodes.append(root)
    shape = root.out.shape

    def of_centered(d):
        return jnp.mean(d * d, axis=axes).reshape(shape)

    def of_both(x, mean):
        kept = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
        return of_centered(x - mean.reshape(kept))

    inputs, function = (
        ([x, mean], of_both) if centered is None else ([centered], of_centered)
    )
    if not substitute(graph, nodes, root, inputs, function):
        return False
    graph.link()
    for node in list(graph.nodes):
        if node.name == "div" and _mean(graph, node):
            graph.link()
    return True


def _centered(x: Value, mean: Value) -> Value | None:
    """`x - mean`, where the graph has that already."""
    assert mean.producer is not None
    total = next(n for n in mean.producer.parts if n.name == "reduce_sum")
    for node in x.consumers:
        if node.name != "sub" or node.inputs[0] is not x or node.out.shape != x.shape:
            continue
        shift = node.inputs[1]
        if shift.before(MOVES) is mean and stands_along(shift, total):
            return node.out
    return None


def _squared(node: Node) -> Value | None:
    """What a node squares, if that is what it does."""
    if node.name == "square" or (
        node.name == "integer_pow" and node.params.get("y") == 2
    ):
        return node.inputs[0]
    if node.name == "mul" and node.inputs[0] is node.inputs[1]:
        return node.inputs[0]
    return None


def _relu_bounds(graph: Graph, root: Node) -> bool:
    """`min(max(x, low), high)`, and `max(x, 0)`: a value held within bounds."""
    low, high = -np.inf, np.inf
    value, nodes = root.out, []
    while True:
        node = value.producer
        if node is None or node.name not in ("max", "min", "clamp"):
            break
        if nodes and not is_inside([*nodes, node], root):
            break
        if node.name == "clamp":
            at_least, at_most = node.inputs[0].number, node.inputs[2].number
            if at_least is None or at_most is None:
                break
            bounds, inner = (at_least, at_most), node.inputs[1]
        else:
            which = 0 if node.inputs[0].number is not None else 1
            number = node.inputs[which].number
            if number is None:
                break
            bounds = (number, np.inf) if node.name == "max" else (-np.inf, number)
            inner = node.inputs[1 - which]
        both = max(low, bounds[0]), min(high, bounds[1])
        if both[0] > both[1]:
            break  # of bounds that exclude each other, the outer ones win
        (low, high), value = both, inner
        nodes.append(node)
    if not nodes:
        return False
    if low == -np.inf and high == np.inf:  # `max(-inf, x)`, as of a softmax
        graph.replace(nodes[::-1], [_alias(nodes[0], value)])
        return True
    names = {(0.0, np.inf): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "relu_n1_to_1"}
    name = names.get((low, high), "clip")
    return fuse(graph, nodes, root, name, [value], bounds=(low, high))


def _alias(node: Node, value: Value) -> Node:
    return Node("copy", {}, [value], [node.out], node.place, lambda x: [x])


def _known_choice(graph: Graph, root: Node) -> bool:
    """A choice that a constant makes, the same for all elements."""
    which = known_value(root.inputs[0])
    if which is None or np.size(which) == 0 or np.any(which != which.reshape(-1)[0]):
        return False
    chosen = root.inputs[1 + int(which.reshape(-1)[0])]
    graph.replace([root], [_alias(root, chosen)])
    return True


def _relu(x):
    return jnp.where(x > 0, x, 0.0)


def _dropout(graph: Graph, root: Node) -> bool:
    """A random choice between an activation, scaled, and zero."""
    which, *cases = root.inputs
    if not which.random or len(cases) != 2:
        return False
    kept = [case for case in cases if case.is_activation]
    if len(kept) != 1 or next(c for c in cases if c not in kept).number != 0:
        return False
    nodes, value = [root], kept[0]
    scaled = value.producer
    if (
        scaled is not None
        and scaled.name in ("div", "mul")
        and scaled.inputs[1].number is not None
        and is_inside([root, scaled], root)
    ):
        nodes.insert(0, scaled)
        value = scaled.inputs[0]
    return fuse(graph, nodes, root, "dropout", [value])


def _dropout_factor(graph: Graph, root: Node) -> bool:
    """A product with random Booleans, scaled, as attention drops its weights."""
    for x, factor in (root.inputs, root.inputs[::-1]):
        if factor.random and _is_choice(factor):
            return fuse(graph, [root], root, "dropout", [x])
    return False


def _is_choice(value: Value) -> bool:
    """Whether a value is made of Booleans, by no more than a scale."""
    value = value.before(MOVES)
    node = value.producer
    if node is None or node.name not in ("div", "mul") or node.inputs[1].number is None:
        return value.dtype == bool
    return _is_choice(node.inputs[0])


def _power(graph: Graph, root: Node) -> bool:
    """A power of a whole number, as products."""
    power = root.params["y"]
    if power < 2:
        return False

    def product(x):
        return functools.reduce(operator.mul, [x] * power)

    return substitute(graph, [root], root, root.inputs, product)


def _rewritten(function, allowed=lambda node: True):
    """A search for an operation to put a function of its operands in its place."""

    def find(graph: Graph, root: Node) -> bool:
        return allowed(root) and substitute(graph, [root], root, root.inputs, function)

    return find


# Squares of a batch only make its statistics.
_square = _rewritten(lambda x: x * x, lambda node: not node.place.in_batch_norm)
_negative = _rewritten(lambda x: x * -1.0)
# A division by a constant, as the product with its reciprocal.
_quotient = _rewritten(lambda x, y: x * (1 / y), lambda node: node.inputs[1].static)


def _reassociated(graph: Graph, root: Node) -> bool:
    """`x * (r * scale)`, as `(x * r) * scale`.

    As normalization layers have it: `r` is one number for each row, `scale` a constant
    for each column, and the product of the two would be quantized once more.
    """
    for x, product in (root.inputs, root.inputs[::-1]):
        inner = product.producer
        if inner is None or inner.name != "mul" or not product.is_activation:
            continue
        for row, scale in (inner.inputs, inner.inputs[::-1]):
            if scale.static and np.prod(row.shape) < np.prod(root.out.shape):
                values, nodes = [x, row, scale], [inner, root]
                if substitute(graph, nodes, root, values, lambda x, y, z: (x * y) * z):
                    return True
    return False


def _additive_mask(graph: Graph, root: Node) -> bool:
    """A sum with a constant that is minus infinity, or nearly, in places.

    As attention masks are: a choice between the sum and minus infinity.
    """
    for x, mask in (root.inputs, root.inputs[::-1]):
        if x.shape != root.out.shape:
            continue
        value = known_value(mask)
        if value is None or not (value <= MASKED).any():
            continue
        masked = value <= MASKED
        rest = np.where(masked, 0, value)

        def chosen(x, masked=masked, rest=rest):
            y = x + rest if rest.any() else x
            return jnp.where(masked, jnp.asarray(-1e9, x.dtype), y)

        return substitute(graph, [root], root, [x], chosen)
    return False


def _elu(x):
    return jnp.maximum(x, 0.0) + (jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


def _leaky_relu(x):
    return jax.nn.leaky_relu(x, ANY_NUMBER)


_Searches = Mapping[str, Sequence[Callable[[Graph, Node], bool]]]

_PASSES: Sequence[_Searches] = (
    {
        "add": (_additive_mask,),
        "div": (find_softmax,),
        "sub": (find_log_softmax,),
        "mul": (
            _dropout_factor,
            template(functools.partial(jax.nn.gelu, approximate=True), "gelu"),
            template(jax.nn.hard_swish, "hard_swish"),
            template(jax.nn.silu, "silu"),
        ),
        "select_n": (
            _known_choice,
            _dropout,
            template(_relu, "relu"),
            template(_leaky_relu, "leaky_relu"),
            template(jax.nn.elu, None, _elu),
        ),
    },
    {
        "div": (_mean, _avg_pool),
        "max": (_relu_bounds,),
        "min": (_relu_bounds,),
        "clamp": (_relu_bounds,),
    },
    {"sub": (_variance,), "mul": (_reassociated,)},
    {
        "integer_pow": (_power,),
        "square": (_square,),
        "neg": (_negative,),
        "div": (_quotient,),
    },
)

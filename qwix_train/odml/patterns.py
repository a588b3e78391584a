"""Functions that a trace shows as several operations, and that LiteRT has as one.

`find_patterns` looks for what `jax.nn` and `jax.numpy` make of these functions: each is
traced as the installed version of JAX does it, and the graph is searched for equal
parts. What LiteRT has no integer form of is replaced by operations that it has one of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.odml.fusion import varying_axes
from qwix_train.odml.graph import Graph, Node, Value, graph_of, known_value

MASKED = -1e4
"""A constant below this stands for minus infinity, as in attention masks."""

# A number in a template that stands for any number.
_ANY_NUMBER = 0.12345678


def find_patterns(graph: Graph) -> None:
    """Replaces the parts of a graph that are such functions, in place."""
    for searches in _PASSES:
        present = set(map(id, graph.nodes))
        # Outer functions before inner ones.
        for node in reversed(list(graph.nodes)):
            if not node.out.is_float or id(node) not in present:
                continue
            for find in searches.get(node.name, ()):
                if find(graph, node):
                    graph.link()
                    present = set(map(id, graph.nodes))
                    break


def _template(function, name, rebuild=None):
    """A search for what a function of one array is traced as.

    Args:
      function: the function.
      name: what the node that is found is called; None to put the operations of
        `rebuild` in its place.
      rebuild: another function that computes the same.
    """

    def find(graph: Graph, root: Node) -> bool:
        shape = root.out.shape
        template = _trace(function, shape, str(root.out.dtype))
        if template is None:
            return False
        found = _match(template, root)
        if found is None or not found.source.is_activation:
            return False
        if not _is_inside(found.nodes, root):
            return False
        if rebuild is None:
            _fuse(graph, found.nodes, root, name, [found.source], found.numbers)
        else:
            _substitute(graph, found.nodes, root, [found.source], rebuild)
        return True

    return find


class _Found:
    def __init__(self):
        self.nodes: list[Node] = []
        self.bound: dict[int, Value] = {}
        self.source: Value = None  # type: ignore[assignment]
        self.numbers: list[float] = []


def _match(template: Graph, root: Node) -> _Found | None:
    """The part of a graph, up from a node, that equals a template."""
    found = _Found()

    def same(expected: Value, value: Value) -> bool:
        if id(expected) in found.bound:
            return found.bound[id(expected)] is value
        if expected.index is not None:
            if expected.shape != value.shape:
                return False
            found.bound[id(expected)] = value
            found.source = value
            return True
        number = expected.number
        if number is not None:
            if value.number is None:
                return False
            if np.isclose(number, _ANY_NUMBER):
                found.numbers.append(value.number)
                return True
            return bool(np.isclose(number, value.number)) or number == value.number
        if expected.producer is None or value.producer is None:
            return False
        if not same_node(expected.producer, value.producer):
            return False
        found.bound[id(expected)] = value
        return True

    def same_node(expected: Node, node: Node) -> bool:
        if expected.name != node.name or len(expected.inputs) != len(node.inputs):
            return False
        if expected.out.shape != node.out.shape:
            return False
        if _text(expected.params) != _text(node.params):
            return False
        if not all(map(same, expected.inputs, node.inputs)):
            return False
        if node not in found.nodes:
            found.nodes.append(node)
        return True

    if not same_node(template.outputs[0].producer, root):  # type: ignore[arg-type]
        return None
    return found if found.source is not None else None


def _text(params: Mapping[str, Any]) -> str:
    return str(sorted((k, str(v)) for k, v in params.items() if k != "name"))


@functools.lru_cache(maxsize=512)
def _trace(function: Callable[..., Any], shape: tuple[int, ...], dtype: str):
    try:
        return graph_of(function, jax.ShapeDtypeStruct(shape, dtype))
    except (TypeError, ValueError):  # such as a softmax of a scalar
        return None


def _is_inside(nodes: Sequence[Node], root: Node) -> bool:
    """Whether nothing but the root of a part is read from outside."""
    inner = set(map(id, nodes))
    return all(
        node is root
        or not any(value.is_output for value in node.outputs)
        and all(id(c) in inner for value in node.outputs for c in value.consumers)
        for node in nodes
    )


def _fuse(graph, nodes, root, name, inputs, numbers=(), **params) -> None:
    """Makes one node of several."""
    order = [node for node in graph.nodes if node in nodes]
    made = {id(value) for node in order for value in node.outputs}
    others = [
        value
        for node in order
        for value in node.inputs
        if id(value) not in made and value.constant is None
    ]
    known = list(dict.fromkeys([*inputs, *others]))

    def run(*values):
        env = dict(zip(map(id, known), values, strict=True))

        def read(value):
            return env[id(value)] if id(value) in env else value.constant

        for node in order:
            results = node.run(*map(read, node.inputs))
            env.update(zip(map(id, node.outputs), results, strict=True))
        return [env[id(root.out)]]

    node = Node(
        name=name,
        params={"numbers": tuple(numbers), **params},
        inputs=known,
        outputs=[root.out],
        module_path=root.module_path,
        run=run,
        in_batch_norm=root.in_batch_norm,
        derivative=next((n.derivative for n in order if n.derivative), None),
        parts=tuple(order),
    )
    graph.replace(order, [node])


def _substitute(graph, nodes, root, inputs, function) -> None:
    """Puts the operations of a function in the place of others."""
    avals = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs]
    new = graph_of(function, *avals)
    places = dict(zip(map(id, new.inputs), inputs, strict=True))
    places[id(new.outputs[0])] = root.out
    for node in new.nodes:
        node.inputs = [places.get(id(value), value) for value in node.inputs]
        node.outputs = [places.get(id(value), value) for value in node.outputs]
        node.module_path = root.module_path
        node.in_batch_norm = root.in_batch_norm
        node.derivative = next((n.derivative for n in nodes if n.derivative), None)
        for value in node.outputs:
            if value is not root.out:
                value.static = all(x.static for x in node.inputs)
                value.random = not value.static and not any(
                    x.is_activation for x in node.inputs
                )
    graph.replace([n for n in graph.nodes if n in nodes], new.nodes)


def _softmax(graph: Graph, root: Node) -> bool:
    """`exp(x - m) / sum(exp(x - m))`, whatever is subtracted from all elements."""
    exponential = _unconverted(root.inputs[0]).producer
    if exponential is None or exponential.name != "exp":
        return False
    axis = _summed_axis(root.inputs[1], exponential.out)
    if axis is None:
        return False
    return _put_softmax(graph, root, _unshifted(exponential.inputs[0], axis), axis)


def _log_softmax(graph: Graph, root: Node) -> bool:
    """`x - m - log(sum(exp(x - m)))`, whatever `m` is for all elements."""
    x, logarithm = root.inputs[0], _moved(root.inputs[1])
    if logarithm is None or logarithm.name != "log":
        return False
    summed = _moved(logarithm.inputs[0])
    exponential = None if summed is None else _unconverted(summed.inputs[0]).producer
    if exponential is None or exponential.name != "exp":
        return False
    if exponential.inputs[0] is not x:
        return False
    axis = _summed_axis(root.inputs[1], exponential.out)
    if axis is None:
        return False
    return _put_softmax(
        graph, root, _unshifted(x, axis), axis, "log_softmax", jax.nn.log_softmax
    )


def _put_softmax(graph, root, x, axis, name="softmax", function=jax.nn.softmax) -> bool:
    if not x.is_activation:
        return False

    def run(x):
        return [function(x, axis=axis).astype(root.out.dtype)]

    node = Node(
        name=name,
        params={"axis": axis},
        inputs=[x],
        outputs=[root.out],
        module_path=root.module_path,
        run=run,
        derivative=root.derivative,
    )
    graph.replace([root], [node])
    return True


_MOVES = ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy")


def _moved(value: Value) -> Node | None:
    """What computes a value, before it is given other axes of length 1."""
    node = value.producer
    while node is not None and node.name in _MOVES:
        node = node.inputs[0].producer
    return node


def _unconverted(value: Value) -> Value:
    """A value before it was converted to another type."""
    node = value.producer
    while node is not None and node.name in ("convert_element_type", "copy"):
        value = node.inputs[0]
        node = value.producer
    return value


def _summed_axis(value: Value, summands: Value) -> int | None:
    """The axis along which a value is the sum of others, to be read next to them."""
    total = _moved(value)
    if total is not None and total.name == "log":
        total = _moved(total.inputs[0])
    if total is None or total.name != "reduce_sum":
        return None
    axes = total.params["axes"]
    if _unconverted(total.inputs[0]) is not summands or len(axes) != 1:
        return None
    return int(axes[0]) if _stands_along(value, total) else None


def _stands_along(value: Value, reduction: Node) -> bool:
    """Whether a value has each axis where a reduction had it before.

    `x / x.sum(1)` of a square matrix divides columns by the sums of rows.

    Args:
      value: what a reduction computes, moved, or computed further element by element.
      reduction: the reduction.
    """
    chain = []
    node = value.producer
    while node is not None and node is not reduction:
        node = node.parts[-1] if node.parts else node
        chain.append(node)
        node = node.inputs[0].producer
    before = reduction.inputs[0].shape
    kept = [a for a in range(len(before)) if a not in reduction.params["axes"]]
    if node is None or len(value.shape) != len(before):
        return False
    places = {axis: i for i, axis in enumerate(kept) if before[axis] != 1}
    for node in reversed(chain):
        shapes = node.inputs[0].shape, node.out.shape
        if node.name == "broadcast_in_dim":
            move = dict(enumerate(node.params["broadcast_dimensions"]))
        else:
            long = [[a for a, n in enumerate(shape) if n != 1] for shape in shapes]
            sizes = [[s[a] for a in axes] for s, axes in zip(shapes, long, strict=True)]
            if sizes[0] != sizes[1]:
                return False
            move = dict(zip(*long, strict=True))
        places = {axis: move[place] for axis, place in places.items()}
    return all(axis == place for axis, place in places.items())


def _unshifted(x: Value, axis: int) -> Value:
    """A value before the same number was subtracted from all elements of an axis."""
    node = x.producer
    if node is None or node.name != "sub" or not node.inputs[0].is_activation:
        return x
    shift = node.inputs[1]
    along = varying_axes(shift, len(x.shape))
    return x if axis in along or node.inputs[0].shape != x.shape else node.inputs[0]


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
    if count != divisor.number or not total.inputs[0].is_activation:
        return False
    nodes.append(total)
    if not _is_inside(nodes, root):
        return False
    _fuse(graph, nodes, root, "mean", [total.inputs[0]], axes=total.params["axes"])
    return True


def _avg_pool(graph: Graph, root: Node) -> bool:
    """A sum over windows, divided by how many were added."""
    value, divisor = root.inputs
    total = value.producer
    if total is None or total.name not in ("reduce_window_sum", "reduce_window"):
        return False
    if not total.inputs[0].is_activation or not divisor.static:
        return False
    if not _is_inside([root, total], root):
        return False
    _fuse(
        graph,
        [total, root],
        root,
        "avg_pool",
        [total.inputs[0], divisor],
        **total.params,
    )
    return True


def _variance(graph: Graph, root: Node) -> bool:
    """`mean(x**2) - mean(x)**2`, as the mean of `(x - mean(x))**2`.

    In integers the difference of two large numbers would leave nothing of a small
    variance.
    """
    squares, square = (value.producer for value in root.inputs)
    if root.in_batch_norm or squares is None or square is None:
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
    if not _is_inside(nodes, root):
        return False
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

    if centered is not None:
        _substitute(graph, nodes, root, [centered], of_centered)
    else:
        _substitute(graph, nodes, root, [x, mean], of_both)
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
        value = node.inputs[1]
        while value is not mean and value.producer is not None:
            if value.producer.name not in ("broadcast_in_dim", "reshape"):
                break
            value = value.producer.inputs[0]
        if value is mean and _stands_along(node.inputs[1], total):
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
        if nodes and not _is_inside([*nodes, node], root):
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
    if not nodes or not value.is_activation:
        return False
    if low == -np.inf and high == np.inf:  # `max(-inf, x)`, as of a softmax
        graph.replace(nodes[::-1], [_alias(nodes[0], value)])
        return True
    names = {(0.0, np.inf): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "relu_n1_to_1"}
    name = names.get((low, high), "clip")
    _fuse(graph, nodes, root, name, [value], bounds=(low, high))
    return True


def _alias(node: Node, value: Value) -> Node:
    return Node("copy", {}, [value], [node.out], node.module_path, lambda x: [x])


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
        and _is_inside([root, scaled], root)
    ):
        nodes.insert(0, scaled)
        value = scaled.inputs[0]
    _fuse(graph, nodes, root, "dropout", [value])
    return True


def _dropout_factor(graph: Graph, root: Node) -> bool:
    """A product with random Booleans, scaled, as attention drops its weights."""
    for x, factor in (root.inputs, root.inputs[::-1]):
        if x.is_activation and factor.random and _is_choice(factor):
            _fuse(graph, [root], root, "dropout", [x])
            return True
    return False


def _is_choice(value: Value) -> bool:
    """Whether a value is made of Booleans, by no more than a scale."""
    node = value.producer
    while node is not None and value.dtype != bool:
        if node.name not in (*_MOVES, "div", "mul"):
            return False
        if len(node.inputs) > 1 and node.inputs[1].number is None:
            return False
        value = node.inputs[0]
        node = value.producer
    return value.dtype == bool


def _cube(graph: Graph, root: Node) -> bool:
    """A power of a whole number, as products."""
    power = root.params["y"]
    if power < 2 or not root.inputs[0].is_activation:
        return False

    def product(x):
        out = x
        for _ in range(power - 1):
            out = out * x
        return out

    _substitute(graph, [root], root, [root.inputs[0]], product)
    return True


def _square(graph: Graph, root: Node) -> bool:
    if root.in_batch_norm:
        return False
    _substitute(graph, [root], root, [root.inputs[0]], lambda x: x * x)
    return True


def _negative(graph: Graph, root: Node) -> bool:
    """A change of sign, as the product with -1."""
    if not root.inputs[0].is_activation:
        return False
    _substitute(graph, [root], root, [root.inputs[0]], lambda x: x * -1.0)
    return True


def _quotient(graph: Graph, root: Node) -> bool:
    """A division by a constant, as the product with its reciprocal."""
    value, divisor = root.inputs
    if not value.is_activation or not divisor.static:
        return False
    _substitute(graph, [root], root, [value, divisor], lambda x, y: x * (1 / y))
    return True


def _reassociated(graph: Graph, root: Node) -> bool:
    """`x * (r * scale)`, as `(x * r) * scale`.

    As normalization layers have it: `r` is one number for each row, `scale` a constant
    for each column, and the product of the two would be quantized once more.
    """
    for x, product in (root.inputs, root.inputs[::-1]):
        inner = product.producer
        if inner is None or inner.name != "mul" or len(product.consumers) != 1:
            continue
        if product.is_output or not product.is_activation or not x.is_activation:
            continue
        for row, scale in (inner.inputs, inner.inputs[::-1]):
            if scale.static and np.prod(row.shape) < np.prod(root.out.shape):
                _substitute(
                    graph,
                    [inner, root],
                    root,
                    [x, row, scale],
                    lambda x, row, scale: (x * row) * scale,
                )
                return True
    return False


def _additive_mask(graph: Graph, root: Node) -> bool:
    """A sum with a constant that is minus infinity, or nearly, in places.

    As attention masks are: a choice between the sum and minus infinity.
    """
    for x, mask in (root.inputs, root.inputs[::-1]):
        if not x.is_activation or x.shape != root.out.shape:
            continue
        value = known_value(mask)
        if value is None or not (value < MASKED).any():
            continue
        masked = value < MASKED
        rest = np.where(masked, 0, value)

        def chosen(x, masked=masked, rest=rest):
            y = x + rest if rest.any() else x
            return jnp.where(masked, jnp.asarray(-1e9, x.dtype), y)

        _substitute(graph, [root], root, [x], chosen)
        return True
    return False


def _elu(x):
    return jnp.maximum(x, 0.0) + (jnp.exp(jnp.minimum(x, 0.0)) - 1.0)


def _leaky_relu(x):
    return jax.nn.leaky_relu(x, _ANY_NUMBER)


_Searches = Mapping[str, Sequence[Callable[[Graph, Node], bool]]]

_PASSES: Sequence[_Searches] = (
    {
        "add": (_additive_mask,),
        "div": (_softmax,),
        "sub": (_log_softmax,),
        "mul": (
            _dropout_factor,
            _template(functools.partial(jax.nn.gelu, approximate=True), "gelu"),
            _template(jax.nn.hard_swish, "hard_swish"),
            _template(jax.nn.silu, "silu"),
        ),
        "select_n": (
            _dropout,
            _template(_leaky_relu, "leaky_relu"),
            _template(jax.nn.elu, None, _elu),
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
        "integer_pow": (_cube,),
        "square": (_square,),
        "neg": (_negative,),
        "div": (_quotient,),
    },
)

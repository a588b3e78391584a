"""Softmax and its logarithm, in whatever form a graph has them."""

from __future__ import annotations

import jax

from qwix_train.odml.fusion import varying_axes
from qwix_train.odml.graph import CONVERSIONS, MOVES, Graph, Node, Value


def find_softmax(graph: Graph, root: Node) -> bool:
    """`exp(x - m) / sum(exp(x - m))`, whatever is subtracted from all elements."""
    exponential = root.inputs[0].before(CONVERSIONS).producer
    if exponential is None or exponential.name != "exp":
        return False
    total = root.inputs[1].before(MOVES).producer
    return _put(graph, root, exponential, total, jax.nn.softmax)


def find_log_softmax(graph: Graph, root: Node) -> bool:
    """`x - m - log(sum(exp(x - m)))`, whatever `m` is for all elements."""
    logarithm = root.inputs[1].before(MOVES).producer
    if logarithm is None or logarithm.name != "log":
        return False
    total = logarithm.inputs[0].before(MOVES).producer
    if total is None or total.name != "reduce_sum":
        return False
    exponential = total.inputs[0].before(CONVERSIONS).producer
    if exponential is None or exponential.name != "exp":
        return False
    if exponential.inputs[0] is not root.inputs[0]:
        return False
    return _put(graph, root, exponential, total, jax.nn.log_softmax)


def _put(graph, root, exponential, total, function) -> bool:
    """Puts a softmax in the place of a node, if a total is that along one axis."""
    if total is None or total.name != "reduce_sum" or len(total.params["axes"]) != 1:
        return False
    (axis,) = total.params["axes"]
    x = _unshifted(exponential.inputs[0], axis)
    summands = total.inputs[0].before(CONVERSIONS)
    if summands is not exponential.out or not stands_along(root.inputs[1], total):
        return False
    if not x.is_activation:
        return False

    def run(x):
        return [function(x, axis=axis).astype(root.out.dtype)]

    node = Node(function.__name__, {"axis": axis}, [x], [root.out], root.place, run)
    graph.replace([root], [node])
    return True


def stands_along(value: Value, reduction: Node) -> bool:
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

"""Softmax and its logarithm, in whatever form a graph has them."""

from __future__ import annotations

import jax

from qwix_train.odml.fusion import varying_axes
from qwix_train.odml.graph import Graph, Node, Value


def find_softmax(graph: Graph, root: Node) -> bool:
    """`exp(x - m) / sum(exp(x - m))`, whatever is subtracted from all elements."""
    exponential = _unconverted(root.inputs[0]).producer
    if exponential is None or exponential.name != "exp":
        return False
    axis = _summed_axis(root.inputs[1], exponential.out)
    if axis is None:
        return False
    return _put_softmax(graph, root, _unshifted(exponential.inputs[0], axis), axis)


def find_log_softmax(graph: Graph, root: Node) -> bool:
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
        place=root.place,
        run=run,
    )
    graph.replace([root], [node])
    return True


MOVES = ("broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy")


def _moved(value: Value) -> Node | None:
    """What computes a value, before it is given other axes of length 1."""
    node = value.producer
    while node is not None and node.name in MOVES:
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
    return int(axes[0]) if stands_along(value, total) else None


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

"""Finds a function in a graph, and puts a node or other operations in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.odml.graph import Graph, Node, Place, Value, graph_of, run_nodes

# A number in a template that stands for any number.
ANY_NUMBER = 0.12345678


def template(
    function: Callable[..., Any],
    name: str | None,
    rebuild: Callable[..., Any] | None = None,
) -> Callable[[Graph, Node], bool]:
    """A search for what a function of one array is traced as.

    Args:
      function: the function.
      name: what the node that is found is called; None to put the operations of
        `rebuild` in its place.
      rebuild: another function that computes the same.
    """

    def find(graph: Graph, root: Node) -> bool:
        template = _trace(function, root.out.shape, str(root.out.dtype))
        found = None if template is None else _match(template, root)
        if found is None:
            return False
        nodes, source = found
        if rebuild is not None:
            return substitute(graph, nodes, root, [source], rebuild)
        assert name is not None
        return fuse(graph, nodes, root, name, [source])

    return find


def _match(template: Graph, root: Node) -> tuple[list[Node], Value] | None:
    """The nodes of a graph that equal a template, up to the last, and their input."""
    nodes: list[Node] = []
    bound: dict[int, Value] = {}

    def same(expected: Value, value: Value) -> bool:
        if id(expected) in bound:
            return bound[id(expected)] is value
        if expected.index is not None:
            is_same = expected.shape == value.shape
        elif (number := expected.number) is not None:
            if value.number is None:
                return False
            if np.isclose(number, ANY_NUMBER):
                return True
            return bool(np.isclose(number, value.number)) or number == value.number
        else:
            is_same = same_node(expected.producer, value.producer)
        if is_same:
            bound[id(expected)] = value
        return is_same

    def same_node(expected: Node | None, node: Node | None) -> bool:
        if expected is None or node is None:
            return False
        if expected.name != node.name or len(expected.inputs) != len(node.inputs):
            return False
        if expected.out.shape != node.out.shape:
            return False
        if _text(expected.params) != _text(node.params):
            return False
        if not all(map(same, expected.inputs, node.inputs)):
            return False
        if node not in nodes:
            nodes.append(node)
        return True

    (source,) = template.inputs
    if not same_node(template.outputs[0].producer, root) or id(source) not in bound:
        return None
    return nodes, bound[id(source)]


def _text(params: Mapping[str, Any]) -> str:
    return str(sorted((k, str(v)) for k, v in params.items() if k != "name"))


@functools.lru_cache(maxsize=512)
def _trace(function: Callable[..., Any], shape: tuple[int, ...], dtype: str):
    try:
        return graph_of(function, jax.ShapeDtypeStruct(shape, dtype))
    except (TypeError, ValueError):  # such as a softmax of a scalar
        return None


def is_inside(nodes: Sequence[Node], root: Node) -> bool:
    """Whether nothing but the root of a part is read from outside."""
    inner = set(map(id, nodes))
    return all(
        node is root
        or not any(value.is_output for value in node.outputs)
        and all(id(c) in inner for value in node.outputs for c in value.consumers)
        for node in nodes
    )


def fuse(
    graph: Graph,
    nodes: Sequence[Node],
    root: Node,
    name: str,
    inputs: Sequence[Value],
    **params: Any,
) -> bool:
    """Makes one node of several, unless they do more than compute the last.

    Args:
      graph: the graph.
      nodes: the nodes.
      root: the last of them.
      name: the name of the new node.
      inputs: what it reads, an activation first, before anything else that they read.
      **params: its parameters.

    Returns:
      Whether it did.
    """
    if not inputs[0].is_activation or not is_inside(nodes, root):
        return False
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
        return [run_nodes(order, env)(root.out)]

    node = Node(
        name=name,
        params=params,
        inputs=known,
        outputs=[root.out],
        place=_place(order, root),
        run=run,
        parts=tuple(order),
    )
    graph.replace(order, [node])
    return True


def substitute(
    graph: Graph,
    nodes: Sequence[Node],
    root: Node,
    inputs: Sequence[Value],
    function: Callable[..., Any],
) -> bool:
    """Puts the operations of a function in the place of others; see `fuse`."""
    if not inputs[0].is_activation or not is_inside(nodes, root):
        return False
    avals = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in inputs]
    new = graph_of(function, *avals)
    places = dict(zip(map(id, new.inputs), inputs, strict=True))
    places[id(new.outputs[0])] = root.out
    for node in new.nodes:
        node.inputs = [places.get(id(value), value) for value in node.inputs]
        node.outputs = [places.get(id(value), value) for value in node.outputs]
        node.place = _place(nodes, root)
        for value in node.outputs:
            if value is not root.out:
                value.static = all(x.static for x in node.inputs)
                value.random = not value.static and not any(
                    x.is_activation for x in node.inputs
                )
    graph.replace([n for n in graph.nodes if n in nodes], new.nodes)
    return True


def _place(nodes: Sequence[Node], root: Node) -> Place:
    """The place of what stands for several operations: that of the last one."""
    derivatives = (n.place.derivative for n in nodes if n.place.derivative)
    return root.place._replace(derivative=next(derivatives, None))

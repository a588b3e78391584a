"""Finds a function in a graph, and puts a node or other operations in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.odml.graph import Graph, Node, Place, Value, graph_of

# A number in a template that stands for any number.
ANY_NUMBER = 0.12345678


def template(function, name, rebuild=None):
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
        if not is_inside(found.nodes, root):
            return False
        if rebuild is None:
            fuse(graph, found.nodes, root, name, [found.source])
        else:
            substitute(graph, found.nodes, root, [found.source], rebuild)
        return True

    return find


class _Found:
    def __init__(self):
        self.nodes: list[Node] = []
        self.bound: dict[int, Value] = {}
        self.source: Value = None  # type: ignore[assignment]


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
            if np.isclose(number, ANY_NUMBER):
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


def is_inside(nodes: Sequence[Node], root: Node) -> bool:
    """Whether nothing but the root of a part is read from outside."""
    inner = set(map(id, nodes))
    return all(
        node is root
        or not any(value.is_output for value in node.outputs)
        and all(id(c) in inner for value in node.outputs for c in value.consumers)
        for node in nodes
    )


def fuse(graph, nodes, root, name, inputs, **params) -> None:
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
        params=params,
        inputs=known,
        outputs=[root.out],
        place=_place(order, root),
        run=run,
        parts=tuple(order),
    )
    graph.replace(order, [node])


def substitute(graph, nodes, root, inputs, function) -> None:
    """Puts the operations of a function in the place of others."""
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


def _place(nodes: Sequence[Node], root: Node) -> Place:
    """The place of what stands for several operations: that of the last one."""
    derivatives = (n.place.derivative for n in nodes if n.place.derivative)
    return root.place._replace(derivative=next(derivatives, None))

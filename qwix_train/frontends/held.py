"""What the arguments and the results of a step hold: states, and variables of NNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from qwix_train.frontends import attributes, nnx_objects

Node = TypeVar("Node")


def states_with(tree: Any, field: str) -> list[Any]:
    """The states in a tree that have something in a field, and a method `replace`."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: _is_leaf(x, field))
    return [leaf for leaf in leaves if _has_filled(leaf, field)]


def with_field(tree: Any, field: str, change: Callable[[Any], Any]) -> Any:
    """A tree whose states have another value in a field.

    Args:
      tree: the tree.
      field: the field; states that have nothing in it stay as they are.
      change: gives the new value from the old one, for one state after the other.
    """

    def put(leaf):
        if not _has_filled(leaf, field):
            return leaf
        return leaf.replace(**{field: change(getattr(leaf, field))})

    return jax.tree.map(put, tree, is_leaf=lambda x: _is_leaf(x, field))


def nodes_of(tree: Any, kind: type[Node]) -> list[Node]:
    """The nodes of a kind in the NNX objects of a tree, each once."""
    found = {}
    for leaf in jax.tree.leaves(tree, is_leaf=nnx_objects.is_node):
        if nnx_objects.is_node(leaf):
            nodes = (node for _, node in nnx.iter_graph(leaf))
            found |= {id(node): node for node in nodes if isinstance(node, kind)}
    return list(found.values())


def _is_leaf(value: Any, field: str) -> bool:
    return nnx_objects.is_node(value) or _has_filled(value, field)


def _has_filled(value: Any, field: str) -> bool:
    if isinstance(value, nnx.Module | type):
        return False
    if not attributes.has(value, field, "replace"):
        return False
    held = getattr(value, field)
    return held is not None and not (isinstance(held, Mapping) and not held)

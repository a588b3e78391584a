"""Trees of params with entries put in: nested dictionaries, and any other tree.

What stands beside the params of a function, such as the range of an activation, is an
entry of the dictionary that they are in. Params that are no dictionary, such as a
module of Equinox, are held in a `WithLeaves` together with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class WithLeaves:
    """Params that are not a dictionary, with the leaves that stand beside them.

    A quantized function takes it in the place of the params. The paths of its leaves
    are those within `params`, and within `leaves`.

    Attributes:
      params: the params.
      leaves: a nested dictionary of what stands beside them.
    """

    params: Any
    leaves: Mapping[str, Any]


class _Hidden:
    """A key of a tree that adds nothing to the path of a leaf."""

    def __init__(self, name: str):
        self._name = name

    def __str__(self):
        return f".{self._name}"

    def __eq__(self, other):
        return isinstance(other, _Hidden) and self._name == other._name

    def __hash__(self):
        return hash((_Hidden, self._name))


jax.tree_util.register_pytree_with_keys(
    WithLeaves,
    lambda tree: (
        ((_Hidden("params"), tree.params), (_Hidden("leaves"), tree.leaves)),
        None,
    ),
    lambda _, children: WithLeaves(*children),
)


def taking_params(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that finds params alone where it is given `WithLeaves`."""

    def alone(value):
        return value.params if isinstance(value, WithLeaves) else value

    @functools.wraps(fn)
    def call(*args, **kwargs):
        named = {name: alone(value) for name, value in kwargs.items()}
        return fn(*map(alone, args), **named)

    return call


def inserted(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """A tree of params with another entry.

    Args:
      tree: the tree, which stays as it is: a nested dictionary, or any other, to which
        the entry is added in a `WithLeaves`.
      path: the keys to the entry, as text.
      value: the entry.

    Raises:
      TypeError: if a part of the path leads into something that is not a dictionary.

    Example:
      >>> inserted({"a": {"b": 1}}, ("a", "c"), 2)
      {'a': {'b': 1, 'c': 2}}
      >>> inserted([1], ("c",), 2)
      WithLeaves(params=[1], leaves={'c': 2})
    """
    if isinstance(tree, WithLeaves):
        return WithLeaves(tree.params, _inserted(tree.leaves, path, value))
    if not isinstance(tree, Mapping):
        return WithLeaves(tree, _inserted({}, path, value))
    return _inserted(tree, path, value)


def _inserted(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    below, key = _copied(tree, path)
    held = below[key] if isinstance(below, list) else below.get(key, {})
    below[key] = _inserted(held, path[1:], value)
    return tuple(below) if isinstance(tree, tuple) else below


def removed(tree: Any, path: tuple[str, ...]) -> Any:
    """A tree of params without one of its entries; see `inserted`.

    Example:
      >>> removed({"a": {"b": 1, "c": 2}}, ("a", "c"))
      {'a': {'b': 1}}
    """
    if isinstance(tree, WithLeaves):
        leaves = removed(tree.leaves, path)
        return WithLeaves(tree.params, leaves) if leaves else tree.params
    below, key = _copied(tree, path)
    if len(path) == 1:
        del below[key]
    else:
        below[key] = removed(below[key], path[1:])
    return tuple(below) if isinstance(tree, tuple) else below


def _copied(tree: Any, path: Sequence[str]) -> tuple[Any, Any]:
    """A copy of a dictionary or list, and its key that a path begins with."""
    if isinstance(tree, list | tuple) and len(path) > 1:
        return list(tree), int(path[0])
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"There is no place for {path[-1]!r} next to the params: they are in a "
            f"{type(tree).__name__}, not in a dictionary."
        )
    # The keys of some dictionaries, as those of an `nnx.List`, are integers.
    return dict(tree), next((key for key in tree if str(key) == path[0]), path[0])

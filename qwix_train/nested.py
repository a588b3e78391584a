"""Nested dictionaries of params, with entries put in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def inserted(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """A nested dictionary with another entry.

    Args:
      tree: the dictionary, which stays as it is.
      path: the keys to the entry, as text.
      value: the entry.

    Raises:
      TypeError: if there is no dictionary to put it in.

    Example:
      >>> inserted({"a": {"b": 1}}, ("a", "c"), 2)
      {'a': {'b': 1, 'c': 2}}
    """
    if not path:
        return value
    if not isinstance(tree, Mapping):
        raise TypeError(
            f"There is no place for {path[-1]!r} next to the params: they are in a "
            f"{type(tree).__name__}, not in a dictionary."
        )
    below = dict(tree)
    # The keys of some dictionaries, as those of an `nnx.List`, are integers.
    key = next((key for key in below if str(key) == path[0]), path[0])
    below[key] = inserted(below.get(key, {}), path[1:], value)
    return below

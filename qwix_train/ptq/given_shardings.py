"""Shardings of params that a caller gives: one for all, or nested dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax.core import FrozenDict

from qwix_train.planning import table as plan_table
from qwix_train.ptq.manifest import TreePath, path_name
from qwix_train.values import stored


def at(tree: Any, path: TreePath) -> Any:
    """What a tree of shardings has for a param; it may end above it."""
    for key in path:
        if not isinstance(tree, dict | FrozenDict):
            break
        tree = tree.get(key)
    return tree


def check(
    tree: Any, params: Sequence[TreePath], where: str, here: TreePath = ()
) -> None:
    """Complains of shardings that would not be used.

    Args:
      tree: the shardings.
      params: the paths of the params.
      where: what has the params, for messages.
      here: where the tree stands in the whole one.

    Raises:
      TypeError: if a leaf is not a sharding.
      ValueError: if there is a sharding where there is no param.
    """
    if isinstance(tree, dict | FrozenDict):
        for key, below in tree.items():
            place = (*here, key)
            if all(path[: len(place)] != place for path in params):
                names = plan_table.some(list(map(path_name, params)), 3)
                raise ValueError(
                    f"There is a sharding for {path_name(place)!r}, where {where} has "
                    f"no param. It has {names}."
                )
            check(below, params, where, place)
        return
    for leaf in jax.tree.leaves(stored.unbox(tree)):
        if not isinstance(leaf, jax.sharding.Sharding) and not hasattr(
            leaf, "sharding"
        ):
            raise TypeError(
                f"The sharding of {path_name(here) or 'all params'} is {leaf!r}. "
                "Expected a jax.sharding.Sharding, such as NamedSharding(mesh, spec)."
            )

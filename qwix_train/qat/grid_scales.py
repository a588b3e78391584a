"""Puts the grids of `optim.proximal` beside the params that lie on them."""

from typing import Any

import jax
from flax import nnx
from flax.core import unfreeze

from qwix_train.frontends.nested import inserted
from qwix_train.optim import ProximalState
from qwix_train.planning.leaves import Leaf
from qwix_train.values import stored


def has_grids(opt_state: Any) -> bool:
    """Whether the state of an optimizer holds grids of `optim.proximal`."""
    return bool(_states_in(opt_state))


def with_grid_scales(params: Any, opt_state: Any) -> Any:
    """The params with the scales of their grids beside them; see `attach`.

    Args:
      params: the trained params: nested mappings, or an `nnx.State` of them.
      opt_state: the state of an optimizer that `optim.proximal` is a part of, in a
        chain, a partition, a mask and so on.

    Raises:
      ValueError: if a param that has a grid is not among the params, or is not in a
        mapping; or if there already is a param with the name of its scale.
    """
    is_state = isinstance(params, nnx.State)
    params = nnx.to_pure_dict(params) if is_state else unfreeze(params)
    for state in _states_in(opt_state):
        scales = _by_path(state.scale)
        params = _with_part(params, scales, "scale")
        # In the dtype of the scale, because params are floats.
        zero_points = {
            path: zero.astype(scales[path].dtype)
            for path, zero in _by_path(state.zero_point).items()
        }
        params = _with_part(params, zero_points, "zero_point")
    return params


def _with_part(params: Any, values: Any, part: Any) -> Any:
    named = stored.by_path(params)
    for owner, value in values.items():
        if owner not in named:
            raise ValueError(
                f"{'/'.join(owner)!r} has a grid, and is not among the params: give "
                "the params that the optimizer trains."
            )
        path = Leaf(owner, part).path
        if path in named:
            raise ValueError(f"There already is a param {'/'.join(path)!r}.")
        params = inserted(params, path, value)
    return params


def _by_path(tree: Any) -> dict[Any, Any]:
    """The arrays of a tree that the state holds for params, by their path."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return stored.by_path(tree)


def _states_in(opt_state: Any) -> list[ProximalState]:
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_state)
    return list(filter(_is_state, leaves))


def _is_state(node: Any) -> bool:
    return isinstance(node, ProximalState)

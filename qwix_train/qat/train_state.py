"""Changes the leaves among params, and carries the optimizer's state over."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp

from qwix_train.frontends.targets import (
    frozen_like,
    has_collections,
    is_tree,
    params_of,
)
from qwix_train.planning import learned_scale
from qwix_train.trace.function import param_path


def learned_scale_mask(params: Any) -> Any:
    """Which leaves of params are learned scales, for `optax.masked` and the like.

    Args:
      params: a tree of params.

    Returns:
      The same tree with a bool at each leaf: whether it is the scale of a param beside
      it, or a scale, offset or clipping level of an activation.

    Example:
      >>> from qwix_train.qat import learned_scale_mask
      >>> learned_scale_mask({"kernel": 1.0, "kernel_scale": 0.1, "scale": 1.0})
      {'kernel': False, 'kernel_scale': True, 'scale': False}
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [param_path(key_path) for key_path, _ in leaves]
    known = set(paths)
    is_learned = [learned_scale.trained_leaf(path, known) is not None for path in paths]
    return jax.tree.unflatten(structure, is_learned)


def with_params(target: Any, params: Any, *, fewer: bool = False) -> Any:
    """A train state, variables or params with other params.

    Args:
      target: the state, whose optimizer state is carried over, or the tree.
      params: the params: those that the target has, and more, or fewer.
      fewer: whether the optimizer state of params that are gone is dropped.

    Raises:
      ValueError: see `carried_over`.
    """
    params = frozen_like(params_of(target), params)
    if is_tree(target):
        whole = has_collections(target)
        return frozen_like(target, {**target, "params": params}) if whole else params
    if not hasattr(target, "tx"):
        return target.replace(params=params)
    opt_state = carried_over(target.opt_state, target.tx.init(params), fewer=fewer)
    return target.replace(params=params, opt_state=opt_state)


def carried_over(old: Any, new: Any, *, fewer: bool = False) -> Any:
    """The state of an optimizer for other params, with the values that it had before.

    Args:
      old: the state before.
      new: a new state, for the other params.
      fewer: whether values that have no place in the new state are dropped.

    Raises:
      ValueError: if a value has no place in the new state.
    """
    before = dict(_by_path(old))
    leaves = []
    for path, leaf in _by_path(new):
        held = before.pop(path, leaf)
        if jnp.shape(held) != jnp.shape(leaf):
            reason = f"has shape {jnp.shape(held)}, and afterwards {jnp.shape(leaf)}"
            raise _lost(path, reason)
        leaves.append(held)
    if before and not fewer:
        raise _lost(next(iter(before)), "has no place in it afterwards")
    return jax.tree.unflatten(jax.tree.structure(new), leaves)


def _lost(path: str, reason: str) -> ValueError:
    return ValueError(
        f"The state of the optimizer cannot be carried over: opt_state{path} {reason}. "
        "Attach before training, or begin with a new opt_state: attach the leaves to "
        "the params alone, then state.tx.init(params)."
    )


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]

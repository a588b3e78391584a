"""Running statistics of batch normalization that stay as they are from a step on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from qwix_train.frontends import attributes, nnx_objects

Step = Callable[..., Any]


def freezing(step: Step, frozen: Callable[[Any, Any], Any]) -> Step:
    """A step that leaves the statistics of batch normalization as they are.

    Args:
      step: the step.
      frozen: whether it does, from the arguments and keyword arguments: a bool, or a
        bool scalar.

    Returns:
      The step. Called, it raises a ValueError if there are no such statistics, or it
      is not known which of its arguments those in its results come from.
    """

    def call(*args, **kwargs):
        keep = frozen(args, kwargs)
        states = _states_in((args, kwargs))
        variables = _variables_in((args, kwargs))
        if not states and not variables:
            raise ValueError(
                "batch_stats_freeze_step is set, and no argument of the step is a "
                "state with batch_stats or an NNX object with nnx.BatchStat variables."
            )
        before = [variable.get_value() for variable in variables]
        out = step(*args, **kwargs)
        for variable, old in zip(variables, before, strict=True):
            variable.set_value(_kept(keep, old, variable.get_value()))
        after = len(_states_in(out))
        if after != len(states):
            raise ValueError(
                f"batch_stats_freeze_step is set, and {len(states)} states with "
                f"batch_stats are among the arguments of the step, {after} among its "
                "results. It must return those that it takes."
            )
        rest = iter(states)

        def put(value):
            if not _is_state(value):
                return value
            old = next(rest).batch_stats
            return value.replace(batch_stats=_kept(keep, old, value.batch_stats))

        return jax.tree.map(put, out, is_leaf=_is_leaf) if states else out

    return call


def _kept(keep: Any, old: Any, new: Any) -> Any:
    if keep is True or keep is False:
        return old if keep else new
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), old, new)


def _is_state(value: Any) -> bool:
    if isinstance(value, type) or not attributes.has(value, "batch_stats", "replace"):
        return False
    return isinstance(value.batch_stats, Mapping) and bool(value.batch_stats)


def _is_leaf(value: Any) -> bool:
    return nnx_objects.is_node(value) or _is_state(value)


def _states_in(tree: Any) -> list[Any]:
    return list(filter(_is_state, jax.tree.leaves(tree, is_leaf=_is_leaf)))


def _variables_in(tree: Any) -> list[nnx.BatchStat]:
    """The variables, each once."""
    found = {}
    for leaf in jax.tree.leaves(tree, is_leaf=nnx_objects.is_node):
        if nnx_objects.is_node(leaf):
            for _, node in nnx.iter_graph(leaf):
                if isinstance(node, nnx.BatchStat):
                    found[id(node)] = node
    return list(found.values())

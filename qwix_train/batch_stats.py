"""Running statistics of batch normalization that stay as they are from a step on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from qwix_train.frontends import held

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
        states = held.states_with((args, kwargs), "batch_stats")
        variables = held.nodes_of((args, kwargs), nnx.BatchStat)
        if not states and not variables:
            raise ValueError(
                "batch_stats_freeze_step is set, and no argument of the step is a "
                "state with batch_stats or an NNX object with nnx.BatchStat variables."
            )
        before = [variable.get_value() for variable in variables]
        out = step(*args, **kwargs)
        for variable, old in zip(variables, before, strict=True):
            variable.set_value(_kept(keep, old, variable.get_value()))
        after = len(held.states_with(out, "batch_stats"))
        if after != len(states):
            raise ValueError(
                f"batch_stats_freeze_step is set, and {len(states)} states with "
                f"batch_stats are among the arguments of the step, {after} among its "
                "results. It must return those that it takes."
            )
        olds = (state.batch_stats for state in states)
        return held.with_field(
            out, "batch_stats", lambda new: _kept(keep, next(olds), new)
        )

    return call


def _kept(keep: Any, old: Any, new: Any) -> Any:
    if keep is True or keep is False:
        return old if keep else new
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), old, new)

"""The float params and the ranges in the state of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from flax import nnx

from qwix_train import ptq
from qwix_train.calib.ranges import collected_ranges
from qwix_train.planning.plan import Plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.state import states_of

Source: TypeAlias = nnx.Pytree | Callable[[], Any] | None
"""An NNX module, or a function that returns the state of the loop as it is now."""

QuantStats: TypeAlias = Mapping[str, Any] | Callable[[], Any] | None
"""Ranges of activations, or a function that returns them as they are now."""


def current(state: Any, source: Source, hook: str) -> Any:
    """The state to work on: that of the call, or else that of the source.

    Args:
      state: what the call was given, or None.
      source: what the constructor was given.
      hook: the name of the hook.

    Raises:
      ValueError: if there is neither.
    """
    if state is not None:
        return state
    if source is None:
        raise ValueError(
            f"{hook} was given no state. Call it with the train state or the params, "
            f"hook(step, state=state), or make it with {hook}(..., state=lambda: "
            "state) or, for an NNX model, state=model."
        )
    # NNX modules can be called, too.
    return source if isinstance(source, nnx.Pytree) else source()


def params_of(state: Any) -> Any:
    """The params in a state, as nested dictionaries of arrays, unboxed.

    Args:
      state: a train state, with `params`; an NNX module, or an `nnx.ModelAndOptimizer`;
        variables of a Linen model, with the collection `params`; or a tree of params.

    Example:
      >>> from jax import numpy as jnp
      >>> params_of({"params": {"kernel": jnp.ones(2)}, "batch_stats": {}})
      {'kernel': Array([1., 1.], dtype=float32)}
    """
    if isinstance(state, nnx.Pytree):
        return ptq.to_tree(module_of(state), nnx.Param)
    if isinstance(state, Mapping):
        return ptq.to_tree(state["params"] if "params" in state else state)
    return ptq.to_tree(getattr(state, "params", state))


def module_of(state: Any) -> nnx.Module:
    """The NNX module in a state: itself, or that of an `nnx.ModelAndOptimizer`.

    Raises:
      TypeError: if there is none.
    """
    module = state if isinstance(state, nnx.Module) else getattr(state, "model", None)
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"Expected an NNX module or an nnx.ModelAndOptimizer, got a "
            f"{type(state).__name__}."
        )
    return module


def quant_stats_of(
    given: QuantStats, state: Any, rules: Sequence[QuantizationRule] | Plan
) -> Mapping[str, Any] | None:
    """The ranges of activations, as `quantize_params` takes them.

    Args:
      given: what the constructor was given.
      state: the state, which may hold statistics: see `attach`.
      rules: the rules, or the plan of the model.

    Returns:
      The ranges that were given, or else those in the state; None if there are none.

    Raises:
      ValueError: if those in the state have seen no batch.
    """
    if given is not None:
        return given() if callable(given) else given
    found = states_of(state)
    if not found:
        return None
    return collected_ranges(found, rules)

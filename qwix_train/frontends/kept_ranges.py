"""Models that keep statistics of ranges: in a collection, or in variables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jax import numpy as jnp

from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends.quant_stat import put_quant_stats, quant_stats_of
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import QuantizationProvider, checked_plan
from qwix_train.planning.quant_stats import (
    as_quant_stats,
    initial_states,
    states_in,
)
from qwix_train.planning.running_ranges import RangeUpdates, RunningRanges
from qwix_train.trace import function, harvest, session
from qwix_train.trace.function import TracedCall

COLLECTION = "quant_stats"


def linen_call(call: linen_calls.Call, provider: QuantizationProvider) -> Any:
    """The result of a call of a Linen module that holds statistics.

    They are updated where the collection is mutable.

    Args:
      call: the call.
      provider: the mode.
    """
    module = call.module
    held = dict(module.variables.get(COLLECTION, {}))
    found: dict[str, Any] = {}

    def initialize(traced):
        plan = checked_plan(provider, traced)
        found.update(_with_initial(provider, {}, plan))
        if not provider.adds_params:
            return {}, session.UNCHANGED
        params = provider.store_params(traced, plan)
        called = traced.with_params(params), plan, found, False
        return params, _run(provider, *called)[0]

    def rewrite(traced):
        plan = checked_plan(provider, traced)
        if not plan.has_effect:
            return session.UNCHANGED
        update = module.is_mutable_collection(COLLECTION)
        out, after = _run(provider, traced, plan, held, update)
        if update:
            found.update(after)
        return out

    if linen_calls.can_rewrite(module):
        out = call.rewritten(rewrite)
    else:
        out = call.initialized(initialize)
    for key, value in found.items():
        module.put_variable(COLLECTION, key, value)
    return out


def nnx_call(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    provider: QuantizationProvider,
) -> Any:
    """The result of a call of an NNX model that holds statistics, which are updated.

    Args:
      method: the method.
      args: its arguments, the model first.
      kwargs: its keyword arguments.
      provider: the mode.
    """
    held, update = quant_stats_of(args[0])
    found: dict[str, Any] = {}

    def rewrite(traced):
        plan = checked_plan(provider, traced)
        if not plan.has_effect:
            return session.UNCHANGED
        stats = _with_initial(provider, held, plan)
        out, after = _run(provider, traced, plan, stats, update)
        found.update(after)
        return out

    out = nnx_calls.rewrite_call(method, args, kwargs, rewrite)
    put_quant_stats(args[0], found)
    return out


def hold_initial(model: nnx.Module, provider: QuantizationProvider, plan: Plan) -> None:
    """Gives an NNX model the statistics that it does not have yet, in place.

    Args:
      model: the model.
      provider: the mode.
      plan: what it does to a call of the model.
    """
    held, _ = quant_stats_of(model)
    put_quant_stats(model, _with_initial(provider, held, plan))


def _with_initial(
    provider: QuantizationProvider, held: Mapping[str, Any], plan: Plan
) -> dict[str, Any]:
    """Statistics, and those before any batch of what a plan collects beside."""
    if provider.collect is not None:
        return dict(held)
    initial = initial_states(plan.collected_ranges())
    return as_quant_stats({**initial, **states_in(held)})


def _run(
    provider: QuantizationProvider,
    traced: TracedCall,
    plan: Plan,
    quant_stats: Any,
    update: bool,
) -> tuple[Any, Any]:
    """The result of a traced call, and the statistics after it.

    It may be differentiated, as part of a user's own loss function.
    """
    if provider.collect is not None:
        return provider.collect(traced, plan, quant_stats, update)
    states = {
        path: {"skipped": jnp.zeros_like(state["count"]), **state}
        for path, state in states_in(quant_stats).items()
    }
    ranges = RunningRanges(states, RangeUpdates(update))
    running = provider.with_ranges(ranges)
    if not update:
        return running.transform(traced, plan), quant_stats

    def call(inputs):
        return running.transform(traced.with_inputs(inputs), plan)

    add = functools.partial(ranges.add, updates=ranges.updates)
    outer = function.trace(call, (list(traced.inputs),), lambda key_path: None)
    named = {"/".join(path): state for path, state in states.items()}
    found = {name: named[name] for name in harvest.names_in(outer.body)}
    outs, after = harvest.harvest(outer.body, outer.inputs, found, add)
    updated = {tuple(name.split("/")): state for name, state in after.items()}
    return outer.rebuild(outs), as_quant_stats({**states, **updated})

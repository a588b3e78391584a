"""A step that does in each phase of a schedule what a step of that phase does.

Each phase is a step of its own: the user's in float, or wrapped with the rules of the
phase. A compiled step holds all of them and takes one, by the step count (`lax.switch`
around the whole step). So what a phase computes is, bit for bit, what its step computes
when it is compiled alone, which nothing that is decided inside of a model call gives:
XLA would fuse, and so round, other operations together.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import core, lax
from jax import numpy as jnp

from qwix_train.frontends.nnx import tracing_step
from qwix_train.frontends.wrapping import calls_when, is_planning
from qwix_train.planning.provider import QuantizationProvider, changed
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.blending import blended
from qwix_train.qat.phases import Amounts, Phase
from qwix_train.trace import jax_versions
from qwix_train.trace.canonical_convs import run_as_at_top

Step = Callable[..., Any]


def follow(
    step: Step,
    provider: QuantizationProvider,
    phases: Sequence[Phase],
    quantized: Callable[[QuantizationProvider], Step],
    count_of: Callable[[Any, Any], Any],
) -> Step:
    """A step that follows a schedule.

    Args:
      step: the step, in float.
      provider: the mode that it ends with.
      phases: the phases, two or more.
      quantized: gives the step quantized by a mode.
      count_of: gives the step count from the arguments and keyword arguments.

    Raises:
      TypeError: if the mode cannot follow the phases.
    """
    steps = [_step_of(phase, step, provider, quantized, count_of) for phase in phases]
    later = np.asarray([phase.begins_at for phase in phases[1:]])
    checked: list[None] = []

    def call(*args, **kwargs):
        if is_planning():
            for step, phase in zip(steps, phases, strict=True):
                blended = " (blended in)" if phase.amounts.ramps else ""
                with calls_when(f"from step {phase.begins_at}{blended}"):
                    out = step(*args, **kwargs)
            return out
        count = count_of(args, kwargs)
        if isinstance(count, core.Tracer):
            # A count of 8 bits does not hold the steps of most phases.
            places, count = jnp.asarray(later, jnp.int32), count.astype(jnp.int32)
            index = jnp.searchsorted(places, count, side="right")
            return _switch(index, steps, phases, args, kwargs)
        if not checked:
            # Rules that match nothing are not to be found out by the last phase.
            with tracing_step(steps[-1], args, kwargs):
                checked.append(None)
        return steps[np.searchsorted(later, int(count), side="right")](*args, **kwargs)

    return call


def _step_of(
    phase: Phase,
    step: Step,
    provider: QuantizationProvider,
    quantized: Callable[[QuantizationProvider], Step],
    count_of: Callable[[Any, Any], Any],
) -> Step:
    """The step of one phase."""
    if phase.in_float:
        return step
    if phase.amounts.whole and _without_schedules(phase.rules) == _without_schedules(
        provider.rules
    ):
        return quantized(provider)
    if not provider.follows_schedules:
        raise TypeError(
            f"{type(provider).__name__} follows no schedule but a start_step that is "
            "the same for weights and activations of all rules. Give that, or rules, "
            "or a QtProvider(rules)."
        )
    provider = copy.copy(provider)
    # That some rule matches is checked in the last phase.
    provider.rules, provider.allow_unmatched = phase.rules, True
    if not phase.amounts.ramps:
        if phase.amounts.whole:
            return quantized(provider)
        return quantized(_blended(provider, phase.amounts))

    def ramp(*args, **kwargs):
        # The amounts are values of this very call, so that a trace which is cached
        # under its session must not serve another.
        amounts = phase.amounts.at(count_of(args, kwargs))
        return quantized(_blended(provider, amounts))(*args, **kwargs)

    return ramp


def _without_schedules(rules: Sequence[QuantizationRule]) -> list[QuantizationRule]:
    return [dataclasses.replace(rule, schedule=None) for rule in rules]


def _blended(provider: QuantizationProvider, amounts: Amounts) -> QuantizationProvider:
    return changed(provider, functools.partial(blended, amounts=amounts))


def _switch(
    index: Any,
    steps: Sequence[Step],
    phases: Sequence[Phase],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """What one of several steps returns, by its index."""
    bodies = []
    for step in steps[:-1]:
        with tracing_step(step, args, kwargs, whole=True) as (traced, _):
            bodies.append(traced.body)
    with tracing_step(steps[-1], args, kwargs, whole=True) as (traced, finish):
        bodies.append(traced.body)
        _check_alike(bodies, phases)
        branches = [functools.partial(_run, body) for body in bodies]
        outs = lax.switch(index, branches, *traced.inputs)
        return finish(traced.rebuild(outs))


def _run(body: jax_versions.Body, *inputs: Any) -> list[Any]:
    return run_as_at_top(body, inputs)


def _check_alike(bodies: Sequence[jax_versions.Body], phases: Sequence[Phase]) -> None:
    def results(body):
        return [(x.aval.shape, x.aval.dtype) for x in body.jaxpr.outvars]

    last = results(bodies[-1])
    for body, phase in zip(bodies, phases, strict=True):
        if results(body) != last:
            raise ValueError(
                "The step returns arrays of other shapes or dtypes in the phase of its "
                f"schedule that begins at step {phase.begins_at} than in the last: "
                f"{results(body)} and {last}. It must return the same whether its "
                "model is quantized or not."
            )

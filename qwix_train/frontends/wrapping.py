"""A step with the model calls in it rewritten by a provider.

What wraps train and eval steps, and what collects ranges in them, share this.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from qwix_train.core.shortened import shortened
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends import param_trees, step_models
from qwix_train.frontends.param_trees import CalledTrees
from qwix_train.planning import current_rule
from qwix_train.planning.plan import PlannedCall, StepPlan
from qwix_train.planning.provider import (
    QuantizationProvider,
    rewrite,
    warn_of_unmatched,
)
from qwix_train.planning.rule_use import RuleUse, RuleUseInCalls
from qwix_train.trace import session


def wrap(
    step: Callable[..., Any], provider: QuantizationProvider
) -> Callable[..., Any]:
    """Has a provider rewrite the model calls in a step.

    Args:
      step: the step.
      provider: the mode and the rules.

    Raises:
      TypeError: if the step is compiled already, or no function.
    """
    check_step(step)
    # What a partial function holds are arguments of the step like any other.
    function, bound_args, bound_kwargs = step, (), {}
    while isinstance(function, functools.partial):
        bound_args = (*function.args, *bound_args)
        bound_kwargs = {**function.keywords, **bound_kwargs}
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    # The step as a whole is checked, not each of its models.
    checked, provider = not provider.allow_unmatched, copy.copy(provider)
    provider.allow_unmatched = True
    wrapped = _Wrapped(provider, name)

    def run(open_session, args, kwargs, shared=True):
        args, kwargs = step_models.entered((args, kwargs))
        held = step_models.held_modules(step)
        with (
            nnx_calls.intercepted((held, args, kwargs)),
            nn.intercept_methods(linen_calls.interceptor),
            # Another step may not know of what this one holds, and has it in float.
            open_session.open(shared, held),
            current_rule.answering(provider.rules),
        ):
            out = function(*args, **kwargs)
        nnx_calls.release_all(out)
        return step_models.left(out)

    def quantized_step(*args, **kwargs):
        args, kwargs = (*bound_args, *args), {**bound_kwargs, **kwargs}
        if is_planning():
            # What another session has traced would be found, and not be seen.
            return run(session.Session(wrapped.rewrite), args, kwargs, shared=False)
        with wrapped.checking(checked, (args, kwargs)) as trees:
            # What a compiled step finds in caches can be looked at: it can be traced.
            out = run(wrapped.session, args, kwargs, shared=trees.while_compiled)
            if trees.while_compiled:
                wrapped.look_again(run, args, kwargs)
        wrapped.check_trees(trees, run, args, kwargs)
        return out

    # `jax.jit` finds the step's signature, for `static_argnames` and the like, through
    # `__wrapped__`. Attributes, such as those of a function that was jitted before,
    # would say of this one what is not so.
    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(quantized_step, step, updated=())
    mark_wrapped(quantized_step)
    return quantized_step


class _Collecting(threading.local):
    """The calls that this thread takes down, in the place of quantizing a step."""

    calls: list[PlannedCall] | None = None
    when = ""


_collecting = _Collecting()
# Steps that are wrapped; a compiled one leads to its function by `__wrapped__`.
_wrapped_steps: weakref.WeakSet[Any] = weakref.WeakSet()


def mark_wrapped(step: Callable[..., Any]) -> None:
    """Lets `plan_step` know of a step that quantizes model calls."""
    _wrapped_steps.add(step)


def wrapped_step(step: Any) -> Callable[..., Any] | None:
    """The wrapped step that a function is, or that it was compiled from; or None.

    Args:
      step: any object.
    """
    while callable(step) and not isinstance(step, nn.Module | nnx.Module | type):
        # Other objects need not have a hash.
        if isinstance(step, types.FunctionType) and step in _wrapped_steps:
            return step
        step = getattr(step, "__wrapped__", None)
    return None


def plan_step(step: Callable[..., Any], args: Any, kwargs: Any) -> StepPlan:
    """What happens in each call of a model in a wrapped step; nothing is computed.

    Args:
      step: the wrapped step.
      args: its arguments, or shapes.
      kwargs: its keyword arguments.
    """
    before, calls = _collecting.calls, []
    _collecting.calls = calls
    try:
        with session.retracing(), nnx_calls.tracing_step(step, args, kwargs):
            pass
    finally:
        _collecting.calls = before
    return StepPlan(tuple(calls))


def is_planning() -> bool:
    """Whether `plan_step` traces a step in this thread."""
    return _collecting.calls is not None


@contextlib.contextmanager
def calls_when(when: str) -> Iterator[None]:
    """Says of the calls that are taken down when they are made.

    Args:
      when: such as `"from step 100"`.
    """
    before, _collecting.when = _collecting.when, when
    try:
        yield
    finally:
        _collecting.when = before


def check_step(step: Any) -> None:
    """Complains of what cannot be wrapped.

    Args:
      step: the step.

    Raises:
      TypeError: if it is compiled already, a model, or no function.
    """
    if isinstance(step, nn.Module | nnx.Module):
        call = "model(x)"
        if isinstance(step, nn.Module):
            call = 'model.apply({"params": params}, x)'
        raise TypeError(
            f"This {type(step).__name__} is a model, not a step. Wrap a function that "
            f"calls it, as {call}; or quantize the model itself with quantize_model."
        )
    if isinstance(step, jax.stages.Compiled | jax.stages.Lowered):
        raise TypeError(
            "The step was compiled ahead of time and can no longer be quantized. Wrap "
            "the function first, and compile the result: "
            "jax.jit(wrap_train_step(step, rules)).lower(...).compile()."
        )
    if not callable(step):
        raise TypeError(
            f"Expected a step function, got {shortened(step)}: "
            "wrap_train_step(step, rules)."
        )


class _Wrapped:
    """What is known of a wrapped step over all of its calls.

    A call of a step that was jitted traces nothing if an earlier call did, so what
    that one found counts for this one.
    """

    def __init__(self, provider: QuantizationProvider, name: str):
        self.provider = provider
        self.name = name
        self.session = session.Session(self.rewrite, provider.rewrite_key)
        self.quantized = False
        # Models that no rule matches, in steps that hold others that one does.
        self.tolerated: set[str] = set()
        self.seen = _Seen()

    def rewrite(self, traced):
        plan = self.provider.plan(traced)
        if _collecting.calls is not None:
            annotated = self.provider.annotate(traced, plan)
            _collecting.calls.append(PlannedCall(_collecting.when, annotated))
        if self.seen.plans is not None and isinstance(plan, RuleUse):
            self.seen.plans.append(plan)
        if plan.has_effect:
            self.seen.quantized = True
            self.seen.trees.add(traced)
        elif plan.ops:
            self.seen.unmatched.add(plan.no_match_message())
        return rewrite(self.provider, traced, plan)

    def quantizes(self, traced):
        """Whether a call is quantized."""
        return self.provider.plan(traced).has_effect

    @contextlib.contextmanager
    def checking(self, checked, given):
        """Complains after a call that left all models in float."""
        seen = self.seen
        before = vars(seen).copy()
        trees = CalledTrees(given)
        plans: list[RuleUse] | None = [] if checked else None
        vars(seen).update(quantized=False, unmatched=set(), plans=plans, trees=trees)
        try:
            yield trees
            quantized, unmatched = seen.quantized, seen.unmatched
        finally:
            vars(seen).update(before)
        if quantized:
            if plans and not self.quantized:
                # A rule may be for one of several models, or calls. In later calls
                # some of them may be compiled already.
                warn_of_unmatched(self.provider, RuleUseInCalls(plans))
            self.quantized = True
            self.tolerated |= unmatched
        elif not checked:
            pass
        elif unmatched - self.tolerated:
            raise ValueError(f"{self.name}: {min(unmatched - self.tolerated)}")
        elif not self.quantized:
            raise ValueError(
                f"{self.name} reached no call of a Flax model, so nothing in it was "
                "quantized. If it was compiled ahead of time "
                "(`.lower(...).compile()`), wrap the function first and compile the "
                "result. If it uses a graph definition that it does not receive as an "
                "argument, or an NNX model that it neither receives nor names (such as "
                "one in an attribute of another object), pass that in. If it is "
                "wrapped already, or calls only what is, wrap it once. If its model is "
                "a plain function, mark that: forward = qwix_train.as_model(forward)."
            )

    def look_again(self, run, args, kwargs):
        """Finds what a step has from JAX's caches, where another one has put it."""
        found = self.quantized or self.seen.quantized or self.seen.unmatched
        if found or not self.session.finds_traces:
            return
        alone = session.Session(self.rewrite)
        with nnx_calls.tracing_step(_running(run, alone), args, kwargs):
            pass

    def check_trees(self, trees, run, args, kwargs):
        """Warns, once, of two trees of params of one model."""
        if not trees.may_be_several or not self.provider.told.first_time((self.name,)):
            return

        key = self.session.shared_key

        def step(rewrite):
            tagging = session.Session(rewrite, None if key is None else ("trees", key))
            return _running(run, tagging)

        # A step that runs as it is may do what cannot be traced, such as float(loss).
        can_fail = [] if trees.while_compiled else [Exception]
        several = []
        with contextlib.suppress(*can_fail):
            several = param_trees.given_trees(step, self.quantizes, args, kwargs)
        for found in several:
            param_trees.warn(self.name, *found)


def _running(run, open_session):
    def step(*args, **kwargs):
        return run(open_session, args, kwargs)

    return step


class _Seen(threading.local):
    """What this thread's call of a step has found so far."""

    def __init__(self):
        self.quantized = False
        self.unmatched: set[str] = set()
        # None while no call is being checked, so that nothing is kept.
        self.plans: list[RuleUse] | None = None
        self.trees = CalledTrees(())

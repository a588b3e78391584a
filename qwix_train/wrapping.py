"""A step with the model calls in it rewritten by a provider.

What wraps train and eval steps, and what collects ranges in them, share this.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from qwix_train.model import rewrite_function
from qwix_train.planning import Plan
from qwix_train.provider import QuantizationProvider
from qwix_train.trace import linen as linen_calls
from qwix_train.trace import nnx as nnx_calls
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
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", None) or type(function).__name__
    # The step as a whole is checked, not each of its models.
    checked, provider = not provider.allow_unmatched, copy.copy(provider)
    provider.allow_unmatched = True
    wrapped = _Wrapped(provider, name)

    def quantized_step(*args, **kwargs):
        given = ((*bound_args, *args), {**bound_kwargs, **kwargs})
        args, kwargs = _map_arguments(_ENTER, given)
        with contextlib.ExitStack() as stack:
            if checked:
                stack.enter_context(wrapped.checking())
            held = owner if nnx_calls.is_node(owner) else None
            stack.enter_context(nnx_calls.intercepted((held, args, kwargs)))
            stack.enter_context(nn.intercept_methods(linen_calls.interceptor))
            stack.enter_context(wrapped.session.open())
            out = function(*args, **kwargs)
        nnx_calls.release_all(out)
        return _map_arguments(_LEAVE, out)

    # `jax.jit` finds the step's signature, for `static_argnames` and the like, through
    # `__wrapped__`. Attributes, such as those of a function that was jitted before,
    # would say of this one what is not so.
    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(quantized_step, step, updated=())
    return quantized_step


def as_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a plain function as the model of the steps that call it.

    Models of Flax are known for what they are. Of any other function that a step calls
    it takes a word that it is the model: which of its arguments are params, and where
    the names of its ops begin. What wraps a step then treats it as any model:
    `wrap_train_step`, `wrap_eval_step`, `calib.Calibrator`, `calib.observe`,
    `calib.compare`, and the weight methods of `ptq`. Everywhere else the function is
    what it was.

    Args:
      fn: any JAX function whose first argument is a tree of params, as for
        `quantize_fn`. The `apply_fn` of a train state need not be marked.

    Returns:
      A function with the signature of `fn`.

    Raises:
      TypeError: if `fn` is no function.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, calib
      >>> forward = as_model(lambda params, x: x @ params["w"])
      >>> rule = QuantizationRule(
      ...     weight_qtype="int8", act_qtype="int8", act_static_scale=True
      ... )
      >>> calibrator = calib.Calibrator([rule])
      >>> eval_step = calibrator.wrap(jax.jit(lambda p, x: forward(p, x).mean()))
      >>> mean = eval_step({"w": jnp.ones((4, 2))}, 3 * jnp.ones((1, 4)))
      >>> calibrator.quant_stats["dot_general0_lhs"]["sum_of_absmax"]
      Array([[3.]], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(f"Expected a function, got {fn!r}: as_model(forward).")

    @functools.wraps(fn)
    def call(*args, **kwargs):
        open_session = session.current()
        if open_session is None:
            return fn(*args, **kwargs)
        return rewrite_function(fn, args, kwargs, open_session.rewrite)

    return call


def check_step(step: Any) -> None:
    """Complains of what cannot be wrapped.

    Args:
      step: the step.

    Raises:
      TypeError: if it is compiled already, or no function.
    """
    if isinstance(step, jax.stages.Compiled | jax.stages.Lowered):
        raise TypeError(
            "The step was compiled ahead of time and can no longer be quantized. Wrap "
            "the function first, and compile the result: "
            "jax.jit(wrap_train_step(step, rules)).lower(...).compile()."
        )
    if not callable(step):
        raise TypeError(
            f"Expected a step function, got {step!r}: wrap_train_step(step, rules)."
        )


class _Wrapped:
    """What is known of a wrapped step over all of its calls.

    A call of a step that was jitted traces nothing if an earlier call did, so what
    that one found counts for this one.
    """

    def __init__(self, provider: QuantizationProvider, name: str):
        self.provider = provider
        self.name = name
        self.session = session.Session(self.rewrite)
        self.quantized = False
        # Models that no rule matches, in steps that hold others that one does.
        self.tolerated: set[str] = set()
        self.seen = _Seen()

    def rewrite(self, traced):
        plan = self.provider.plan(traced)
        if self.seen.plans is not None and isinstance(plan, Plan):
            self.seen.plans.append(plan)
        if self.provider.matches(plan):
            self.seen.quantized = True
        elif plan.ops:
            self.seen.unmatched.add(self.provider.no_match_message(plan))
        return self.provider.rewrite(traced, plan)

    @contextlib.contextmanager
    def checking(self):
        """Complains after a call that left all models in float."""
        seen = self.seen
        before = seen.quantized, seen.unmatched, seen.plans
        seen.quantized, seen.unmatched, seen.plans = False, set(), []
        try:
            yield
            quantized, unmatched, plans = seen.quantized, seen.unmatched, seen.plans
        finally:
            seen.quantized, seen.unmatched, seen.plans = before
        if quantized:
            if plans and not self.quantized:
                # A rule may be for one of several models, or calls. In later calls
                # some of them may be compiled already.
                ops = tuple(op for plan in plans for op in plan.ops)
                self.provider.warn_of_unmatched(Plan(self.provider.rules, ops, {}))
            self.quantized = True
            self.tolerated |= unmatched
        elif unmatched - self.tolerated:
            raise ValueError(f"{self.name}: {min(unmatched - self.tolerated)}")
        elif not self.quantized:
            raise ValueError(
                f"{self.name} reached no call of a Flax model, so nothing in it was "
                "quantized. If it was compiled ahead of time "
                "(`.lower(...).compile()`), wrap the function first and compile the "
                "result. If it uses an NNX model, or a graph definition, that it does "
                "not receive as an argument, pass that in. If its model is a plain "
                "function, mark that: forward = qwix_train.as_model(forward)."
            )


class _Seen(threading.local):
    """What this thread's call of a step has found so far."""

    def __init__(self):
        self.quantized = False
        self.unmatched: set[str] = set()
        # None while no call is being checked, so that nothing is kept.
        self.plans: list[Plan] | None = None


class _RewrittenApply:
    """An `apply_fn` that is no Linen module's, rewritten while a session is open.

    Equal to the function it stands for, so that a train state that holds it has the
    same tree structure as the user's.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args, **kwargs):
        open_session = session.current()
        if open_session is None or session.marking():
            return self.function(*args, **kwargs)
        return rewrite_function(self.function, args, kwargs, open_session.rewrite)

    def __eq__(self, other):
        return self.function == getattr(other, "function", other)

    def __hash__(self):
        return hash(self.function)


class _InterceptedApply(_RewrittenApply):
    """The `apply` of an NNX graph definition, whose modules are intercepted."""

    def __call__(self, *args, **kwargs):
        graphdef = nnx_calls.intercepted_graphdef(self.function.__self__)
        return graphdef.apply(*args, **kwargs)


def _enter_state(state):
    if not callable(state.apply_fn):
        return state
    owner = getattr(state.apply_fn, "__self__", None)
    if isinstance(owner, nn.Module):
        return state  # its calls are intercepted
    if getattr(state.apply_fn, "rewrites_itself", False):
        return state
    wrapper = _InterceptedApply if isinstance(owner, nnx.GraphDef) else _RewrittenApply
    return state.replace(apply_fn=wrapper(state.apply_fn))


def _leave_state(state):
    if isinstance(state.apply_fn, _RewrittenApply):
        return state.replace(apply_fn=state.apply_fn.function)
    return state


# What becomes of a train state and of a graph definition, before and after a step.
_ENTER = (_enter_state, nnx_calls.intercepted_graphdef)
_LEAVE = (_leave_state, nnx_calls.original_graphdef)


def _map_arguments(changes, tree):
    """Changes the train states and graph definitions in a tree of arguments.

    All else stays the same object: NNX modules are trees, too, but a copy of one
    would not see the step's updates.
    """
    change_state, change_graphdef = changes

    def is_state(value):
        return hasattr(value, "apply_fn") and hasattr(value, "replace")

    def is_leaf(value):
        return (
            nnx_calls.is_node(value)
            or is_state(value)
            or isinstance(value, nnx.GraphDef)
        )

    def change(value):
        if nnx_calls.is_node(value):
            return value
        if is_state(value):
            return change_state(value)
        if isinstance(value, nnx.GraphDef):
            return change_graphdef(value)
        return value

    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    changed = [change(leaf) for leaf in leaves]
    if all(map(operator.is_, leaves, changed)):
        return tree
    return jax.tree.unflatten(structure, changed)

"""A user's train or eval step in, the same step quantized out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import linen as nn

from qwix_train.model import QuantizationProvider, rewrite_function
from qwix_train.planning import make_plan
from qwix_train.qat import QtProvider
from qwix_train.rules import QuantizationRule
from qwix_train.trace import linen as linen_calls
from qwix_train.trace import nnx as nnx_calls
from qwix_train.trace import session

Step = TypeVar("Step", bound=Callable[..., Any])


def wrap_train_step(
    step: Step,
    rules: Sequence[QuantizationRule],
    *,
    allow_unmatched: bool = False,
) -> Step:
    """Makes a train step quantization-aware.

    The step is called as it is; the model calls in it are rewritten, inside of its
    own `value_and_grad`. It may be one that

    * takes a `flax.training.train_state.TrainState`, and calls its `apply_fn`,
    * closes over a Linen module, and calls `model.apply`, or
    * takes NNX modules, as in `step(model, optimizer, batch)`,

    with any other arguments. What comes back has the same signature; jit it as you
    would the step: `jax.jit(wrap_train_step(step, rules), donate_argnums=0)`. Called
    eagerly it traces the model at every call, which takes milliseconds.

    Args:
      step: the train step.
      rules: the rules, in order of precedence: the first that matches an op decides.
      allow_unmatched: whether a step in which no rule matches any op is left in
        float. An error otherwise.

    Returns:
      The step, quantization-aware. The state that it takes and returns is that of
      the float step: params stay in float, checkpoints are the same.

    Raises:
      ValueError: by the step when called, if no model call was reached, or no rule
        matches any op.

    Example:
      >>> step = jax.jit(wrap_train_step(train_step, [rule]))
      >>> state, loss = step(state, batch)
    """
    return _wrap(step, QtProvider(rules, allow_unmatched=True), allow_unmatched)


def wrap_eval_step(
    step: Step,
    rules: Sequence[QuantizationRule],
    *,
    allow_unmatched: bool = False,
) -> Step:
    """Makes an eval step compute what the quantized model will.

    See `wrap_train_step`; the forward is the same. With params from float training
    this measures post-training quantization.

    Args:
      step: the eval step.
      rules: the rules.
      allow_unmatched: whether a step in which no rule matches any op is left in
        float. An error otherwise.
    """
    return _wrap(step, QtProvider(rules, allow_unmatched=True), allow_unmatched)


class _Wrapped:
    """What is known of a wrapped step over all of its calls."""

    def __init__(self, provider: QuantizationProvider, name: str):
        self.provider = provider
        self.name = name
        self.quantized = False
        self.unmatched: str | None = None
        self.session = session.Session(self.rewrite)

    def rewrite(self, traced):
        if traced.ops:
            plan = make_plan(traced, self.provider.rules)
            if plan.quantized_ops:
                self.quantized = True
            else:
                self.unmatched = plan.no_match_message()
        return self.provider.rewrite(traced)

    def check(self) -> None:
        """Complains if all calls so far left the model in float."""
        if self.quantized:
            return
        if self.unmatched is not None:
            raise ValueError(f"{self.name}: {self.unmatched}")
        raise ValueError(
            f"{self.name} reached no call of a Flax model, so nothing in it was "
            "quantized. If it was compiled ahead of time (`.lower(...).compile()`), "
            "wrap the function first and compile the result. If it uses an NNX model "
            "that it does not receive as an argument, pass the model in. If it calls "
            "a plain function, wrap that with quantize_fn."
        )


def _wrap(step, provider: QuantizationProvider, allow_unmatched: bool):
    name = getattr(step, "__name__", None) or type(step).__name__
    wrapped = _Wrapped(provider, name)

    def quantized_step(*args, **kwargs):
        args, kwargs = _map_states(_wrap_apply_fn, (args, kwargs))
        with contextlib.ExitStack() as stack:
            modules = nnx_calls.modules_in((args, kwargs))
            stack.enter_context(nnx_calls.intercepted(modules))
            stack.enter_context(nn.intercept_methods(linen_calls.interceptor))
            stack.enter_context(wrapped.session.open())
            out = step(*args, **kwargs)
        if not allow_unmatched:
            wrapped.check()
        nnx_calls.release_all(out)
        return _map_states(_unwrap_apply_fn, out)

    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(quantized_step, step)
    # `jax.jit` would otherwise look through to the step's own signature and flags.
    return quantized_step


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


def _map_states(change, tree):
    """Applies `change` to the train states in a tree; all else stays the same object.

    NNX modules are trees, too, but a copy of one would not see the step's updates.
    """

    def holds_apply_fn(value):
        return hasattr(value, "apply_fn") and hasattr(value, "replace")

    leaves, structure = jax.tree.flatten(
        tree, is_leaf=lambda x: holds_apply_fn(x) or nnx_calls.is_node(x)
    )
    if not any(map(holds_apply_fn, leaves)):
        return tree
    return jax.tree.unflatten(
        structure, [change(x) if holds_apply_fn(x) else x for x in leaves]
    )


def _wrap_apply_fn(state):
    if not callable(state.apply_fn):
        return state
    if isinstance(getattr(state.apply_fn, "__self__", None), nn.Module):
        return state  # its calls are intercepted
    return state.replace(apply_fn=_RewrittenApply(state.apply_fn))


def _unwrap_apply_fn(state):
    if isinstance(state.apply_fn, _RewrittenApply):
        return state.replace(apply_fn=state.apply_fn.function)
    return state

"""Methods of a quantized model that were not named to `quantize_model`.

They run in float. One that runs products which the rules quantize says so: with a
warning where the params are in float, and with an error where they are quantized, since
it could not read them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import linen as nn

from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import marks
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.trace import session
from qwix_train.values import stored

_QUANTIZED = "qwix_train_quantized_method"
# A method that branches on values cannot be traced. Whether it reads what is quantized
# shows when it runs.
_BRANCHES_ON_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def marked(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that leaves a mark in the trace: what runs in it runs quantized."""

    @functools.wraps(method)
    def run(*args, **kwargs):
        with jax.named_scope(_QUANTIZED):
            return method(*args, **kwargs)

    return run


def of(
    cls: type, provider: QuantizationProvider, methods: Collection[str]
) -> dict[str, Any]:
    """The methods of a model's class that are not among those that run quantized.

    Args:
      cls: the class, of Linen or NNX modules.
      provider: the mode and the rules.
      methods: the names of those that run quantized.
    """
    # Linen would wrap them again, and have their calls intercepted twice.
    return {
        name: nn.nowrap(_in_float(cls, name, provider, methods))
        for name in marks.methods_of(cls)
        if name not in methods
    }


def _traced(cls: type, name: str, args: Any, kwargs: Any) -> Any:
    """A call of a method of a model; None if the model cannot be traced here."""
    method, (model, *inputs) = getattr(cls, name), args
    if not isinstance(model, nn.Module):
        with nnx_calls.tracing_call(method, args, kwargs) as (traced, _):
            return traced
    if linen_calls.can_rewrite(model):
        return linen_calls.Call(model, name, method, tuple(inputs), kwargs).traced()
    return None


def resolved(cls: type, method: Any) -> Any:
    """The name of a method of a class that is given as a function; others stay.

    Args:
      cls: the user's class.
      method: what `Module.apply` takes as its `method`, such as `Model.encode`.
    """
    function = method
    if inspect.ismethod(method) and isinstance(method.__self__, nn.Module):
        function = method.__func__
    name = getattr(function, "__name__", None)
    is_own = name is not None and getattr(cls, name, None) is function
    return name if is_own else method


def check_no_product_in_float(model: str, plan: Plan) -> None:
    """Complains of ops that run in a method which is not quantized.

    Args:
      model: the name of the class of a quantized model.
      plan: the plan of one of its calls, which was traced.
    """
    left = _in_no_quantized_method(plan)
    if left:
        raise ValueError(
            f"{len(left)} ops that the rules quantize, such as {left[0].op.where}, run "
            f"in what calls no method of {model} that runs quantized. "
            "Give a method of the model: method='encode'."
        )


def _in_no_quantized_method(plan: Plan) -> list[OpPlan]:
    """The ops of a traced call of a quantized model that run in float there."""
    return [op for op in plan.quantized_ops if _QUANTIZED not in op.op.name_stack]


def _in_float(
    cls: type, name: str, provider: QuantizationProvider, methods: Collection[str]
) -> Callable[..., Any]:
    """A method that says, before it runs in float, what the rules would do in it."""
    method, where = getattr(cls, name), f"{cls.__name__}.{name}"
    every = ", ".join(map(repr, (*methods, name)))
    advice = (
        f"It is not among the methods=({', '.join(map(repr, methods))},) that "
        "quantize_model was given. Have it run quantized, too: "
        f"quantize_model(model, provider, methods=({every}))."
    )

    def tell(args, kwargs):
        try:
            traced = _traced(cls, name, args, kwargs)
        except _BRANCHES_ON_VALUES:
            return
        if traced is None:
            return
        left = _in_no_quantized_method(provider.plan(traced))
        quantized = {
            param.path
            for param in traced.params
            if param is not None and stored.is_quantized(param.value)
        }
        for path in (path for op in left for path in op.weights):
            if path in quantized:
                raise ValueError(
                    f"{where} reads params that are quantized, such as "
                    f"{'/'.join(path)!r}. {advice}"
                )
        if left:
            warnings.warn(
                f"{where} runs {len(left)} ops in float that the rules quantize, such "
                f"as {left[0].op.where}. {advice}",
                stacklevel=3,
            )

    @functools.wraps(method)
    def in_float(*args, **kwargs):
        if not session.marking() and session.current() is None:
            tell(args, kwargs)
        return method(*args, **kwargs)

    # Linen asks these of a method that is compact itself, and this one is not.
    for attribute in COPIED_MARKS:
        in_float.__dict__.pop(attribute, None)
    return in_float


# What `functools.wraps` copies from a Linen method and does not hold for a wrapper:
# that Linen has wrapped it already, and that it is compact.
COPIED_MARKS = ("method_handler_wrapped", "nn_compact", "compact", "__wrapped__")

"""What rules do to a model, or to each model call of a step, as a plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

from flax import linen as nn
from flax import nnx

from qwix_train.core.shortened import shortened
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends import nnx_objects, random_keys
from qwix_train.frontends.model import takes_rngs, trace_function
from qwix_train.frontends.wrapping import plan_step, wrapped_step
from qwix_train.planning import current_rule
from qwix_train.planning.plan import Plan, StepPlan
from qwix_train.planning.planner import make_plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.trace import subclasses

_UNSAID = {"variables": None, "method": "__call__", "rngs": None}


@overload
def plan(
    model: Any,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    *inputs: Any,
    variables: Any = None,
    method: str | Callable[..., Any] = "__call__",
    rngs: Any = None,
    **kwargs: Any,
) -> Plan: ...


@overload
def plan(model: Callable[..., Any], *args: Any, **kwargs: Any) -> StepPlan: ...


def plan(
    model: Any,
    rules: Any = None,
    *inputs: Any,
    variables: Any = None,
    method: str | Callable[..., Any] = "__call__",
    rngs: Any = None,
    **kwargs: Any,
) -> Plan | StepPlan:
    """What rules would do to every op of a model; nothing is computed.

    `plan(step, *args)` takes a step that `wrap_train_step` or `wrap_eval_step` gave.
    The step may be jitted, partial or decorated, and shapes will do for `args`. It
    returns a `StepPlan`, with a plan for each model call in the step.

    Args:
      model: a Linen module, an NNX module, or a function whose first input is a tree
        of params.
      rules: the rules, or a provider. With a `PtqProvider`, the plan also says what
        dequantizes params.
      *inputs: inputs of the model. Shapes (`jax.ShapeDtypeStruct`) will do.
      variables: the variables of a Linen model. If None, `model.init` gives their
        shapes.
      method: the method of the model, by name or as a function.
      rngs: the random keys of a Linen model, such as `{"dropout": key}`. A plan needs
        none. For an NNX model or a function, the keyword input `rngs`, if the method
        has one.
      **kwargs: keyword inputs.

    Returns:
      The plan. `print(plan)` shows it as a table, `plan.records()` as dictionaries.

    Raises:
      TypeError: if `model` is no model, or `rules` are no rules: a step has to be
        wrapped first.
      ValueError: if a rule asks for what does not fit an op; if a provider stores
        params quantized, and an NNX module holds one as an array, in no `nnx.Param`.

    Example:
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, plan
      >>> rules = [QuantizationRule(weight_qtype="int8")]
      >>> plan(nn.Dense(4), rules, jnp.ones((2, 8))).records()[0]["weights"]
      ('kernel',)
    """
    # Arguments of a step may have the names of those of a model.
    named = {"variables": variables, "method": method, "rngs": rngs}
    said = {name: x for name, x in named.items() if x is not _UNSAID[name]}
    args = _without_none((rules, *inputs))
    step = wrapped_step(model)
    if step is not None:
        return plan_step(step, args, said | kwargs)
    if not isinstance(rules, QuantizationProvider):
        try:
            rules = check_rules(rules)
        except TypeError as error:
            found = _plan_around(model, args, said | kwargs)
            if isinstance(found, StepPlan):
                return found
            raise TypeError(
                f"{error} plan(model, rules, *inputs) takes the rules, or a provider, "
                "after the model. A step has its rules from the wrap: "
                "plan(wrap_train_step(step, rules), *args)."
            ) from found
        for rule in rules:
            rule.check_collects()
    return plan_model(
        model, rules, *inputs, variables=variables, method=method, rngs=rngs, **kwargs
    )


def _without_none(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a step: none where `rules` alone was there, and not given."""
    return () if len(args) == 1 and args[0] is None else args


def _plan_around(function: Any, args: Any, kwargs: Any) -> StepPlan | Exception | None:
    """The plan of what calls a wrapped step: a partial function, or a decorator.

    Returns:
      The plan; None if no wrapped step was called, or what kept it from being called.
    """
    if not callable(function) or isinstance(function, nn.Module | nnx.Module | type):
        return None
    try:
        found = plan_step(function, args, kwargs)
    except Exception as error:
        return error
    return found if found.calls else None


def plan_model(
    model: Any,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    *inputs: Any,
    variables: Any = None,
    method: str | Callable[..., Any] = "__call__",
    rngs: Any = None,
    **kwargs: Any,
) -> Plan:
    """What rules would do to every op of a model; see `plan`."""
    given = rules.rules if isinstance(rules, QuantizationProvider) else rules
    with current_rule.answering(given):
        return _planned(model, rules, inputs, variables, method, rngs, kwargs)


def _planned(model, rules, inputs, variables, method, rngs, kwargs) -> Plan:
    def planned(traced):
        if isinstance(rules, QuantizationProvider):
            return rules.annotate(traced, rules.plan(traced))
        return make_plan(traced, rules)

    if isinstance(model, nnx.Module):
        cls = subclasses.original(type(model))
        called = getattr(cls, method) if isinstance(method, str) else method
        if rngs is not None and takes_rngs(called):
            kwargs["rngs"] = rngs
        with nnx_calls.tracing_call(called, (model, *inputs), kwargs) as (traced, _):
            found = planned(traced)
        if isinstance(rules, QuantizationProvider) and rules.stores_params:
            held = [path for path, param in found.params.items() if param.how]
            nnx_objects.check_in_variables(model, held)
        return found
    if isinstance(model, nn.Module):
        if variables is None:
            given = {"method": method, **kwargs}
            variables = linen_calls.abstract_variables(model, inputs, given, rngs)
        mutable = [name for name in variables if name != "params"]
        keys = random_keys.by_stream(rngs)
        apply = functools.partial(
            model.apply, method=method, rngs=keys, mutable=mutable
        )
        with linen_calls.naming_missing_collections(
            model, variables, inputs, {"method": method, **kwargs}
        ):
            traced = trace_function(apply, (variables, *inputs), kwargs)
    elif callable(model):
        given = {} if rngs is None else {"rngs": rngs}
        traced = trace_function(model, inputs, {**given, **kwargs})
    else:
        raise TypeError(
            f"Expected a Flax module or a function, got {shortened(model)}."
        )
    return planned(traced)

"""Quantized models and functions: Linen, NNX and plain JAX behind one door."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from flax import linen as nn
from flax import nnx

from qwix_train.core.shortened import shortened
from qwix_train.frontends import (
    call_mode,
    kept_ranges,
    marks,
    nested,
    nnx_keys,
    nnx_objects,
    other_methods,
    random_keys,
)
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.planning import current_rule
from qwix_train.planning.leaves import LEFT_OUT, Path, adapter_part
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import (
    QuantizationProvider,
    checked_plan,
    rewrite,
)
from qwix_train.trace import function, session, subclasses
from qwix_train.values import stored

Model = TypeVar("Model", bound=nn.Module | nnx.Module)


def quantize_model(
    model: Model,
    provider: QuantizationProvider,
    *model_inputs: Any,
    methods: Collection[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> Model:
    """A copy of a model whose methods run quantized.

    Args:
      model: a Linen module, or an NNX module. If it is quantized already, it gets this
        provider instead.
      provider: the mode and the rules, such as `QtProvider(rules)`.
      *model_inputs: inputs for the first method of an NNX model; a `PtqProvider` needs
        them. Shapes will do: with them, the rules are checked against the model at
        once. Nothing in `model` changes.
      methods: the methods to quantize, by name. `apply` of a Linen model takes them by
        name and as functions, such as `Model.encode`. Other methods run in float, and
        warn if they run ops that the rules quantize. With a `QtProvider` whose rules
        have `act_static_scale=True`, each call of an NNX model updates the statistics
        of ranges that it holds in `QuantStat`s. Set its attribute
        `disable_quant_stats_update` to stop that.
      **model_inputs_kwargs: keyword inputs. `rngs` are the random keys for new params
        of an NNX model, such as adapters. Its method gets them, too, if it has a
        parameter of that name.

    Returns:
      A model of the same kind. With `QtProvider` it has the same params. With
      `PtqProvider` an NNX model holds its params quantized, and a Linen model has them
      so in what `init` returns and `apply` takes.

    Raises:
      TypeError: if `model` is neither.
      ValueError: if it has no such method, or a Linen model comes with inputs; by a
        method that is not among `methods`, if it reads params that are quantized.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QtProvider, QuantizationRule, quantize_model
      >>> provider = QtProvider([QuantizationRule(weight_qtype="int8")])
      >>> model = quantize_model(nn.Dense(4), provider)
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8)))
      >>> model.apply(variables, jnp.ones((2, 8))).shape
      (2, 4)
    """
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(
            f"Expected a Flax Linen or NNX module, got {type(model).__name__}. For a "
            "plain function, use quantize_fn."
        )
    _check_provider(provider)
    cls = subclasses.original(type(model))
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    for name in methods:
        if not callable(getattr(cls, name, None)):
            raise ValueError(f"{cls.__name__} has no method {name!r} to quantize.")
    if isinstance(model, nn.Module):
        if model_inputs or model_inputs_kwargs:
            raise ValueError(
                "A Linen model is quantized without inputs, since it holds no params: "
                "quantize_model(model, provider). To see what the rules do to it, use "
                "plan(model, rules, *inputs)."
            )
        return linen_calls.with_class(model, _quantized_class(cls, provider, methods))
    given = bool(model_inputs or model_inputs_kwargs)
    rngs = model_inputs_kwargs.get("rngs")
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        random_keys.checked(rngs)
    if provider.stores_params and not given:
        raise ValueError(
            f"{type(provider).__name__} needs inputs of an NNX model, since what it "
            "calls decides how its params are quantized: "
            "quantize_model(model, provider, *inputs)."
        )
    quantized = nnx.clone(model)
    if given:
        method = getattr(cls, methods[0])
        if not takes_rngs(method):
            model_inputs_kwargs.pop("rngs", None)
        with (
            current_rule.answering(provider.rules),
            nnx_calls.tracing_call(
                method, (model, *model_inputs), model_inputs_kwargs
            ) as (traced, _),
        ):
            plan = checked_plan(provider, traced)
        if provider.stores_params or provider.adds_params:
            hold_params(quantized, provider, provider.store_params, traced, plan, rngs)
        if provider.keeps_quant_stats:
            kept_ranges.hold_initial(quantized, provider, plan)
    run_quantized(quantized, provider, methods)
    return quantized


def hold_params(
    model: nnx.Module,
    provider: QuantizationProvider,
    store: Callable[[function.TracedCall, Plan], Mapping[Path, Any]],
    traced: function.TracedCall,
    plan: Plan,
    rngs: Any = None,
) -> None:
    """Puts into an NNX model what a mode keeps in it, in place.

    Args:
      model: the model.
      provider: the mode.
      store: gives the params that change or are new, as `provider.store_params` does.
      traced: a call of the model.
      plan: what the mode does to it.
      rngs: the random keys of new params.
    """
    traced = dataclasses.replace(traced, boxes=nnx_objects.variables_of(model))
    if rngs is not None:
        traced = dataclasses.replace(traced, make_rng=lambda name: rngs[name]())
    values = store(traced, plan)
    kept = {path: x for path, x in values.items() if x is not LEFT_OUT}
    nnx_objects.replace_params(model, kept, stored.box, _new_variable)
    nnx_objects.remove_params(model, values.keys() - kept.keys())
    if provider.random_stream:
        nnx_keys.hold(model, provider.random_stream, rngs)


def _new_variable(path: Path, value: Any) -> nnx.Variable:
    """The variable of an NNX model for what stands beside its params."""
    if adapter_part(path):
        return value if isinstance(value, nnx.Variable) else nnx.LoRAParam(value)
    if stored.is_quantized(value):
        return stored.box(value, nnx.Param(None))
    return nnx_objects.attached(value)


def run_quantized(
    model: nnx.Module, provider: QuantizationProvider, methods: tuple[str, ...]
) -> None:
    """Makes methods of an NNX model run as a mode says, in place."""
    cls = subclasses.original(type(model))
    marks.set_class(model, _quantized_class(cls, provider, methods))


apply_lora_to_model = quantize_model
"""The same with a `LoraProvider`, under the name that it has in `qwix`."""


def takes_rngs(method: Callable[..., Any]) -> bool:
    """Whether a method has a parameter `rngs`; `**kwargs` may be for anything else."""
    return "rngs" in inspect.signature(method).parameters


def quantize_fn(
    fn: Callable[..., Any], provider: QuantizationProvider
) -> Callable[..., Any]:
    """A function whose products and convolutions run quantized.

    Args:
      fn: any JAX function whose first argument is a tree of params. If that tree has a
        `params` collection, as Flax variables do, that collection holds the params.
      provider: the mode and the rules. Ops in a Flax module have its path, and ops
        outside of any module the path "".

    Returns:
      A function with the signature of `fn`.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QtProvider, QuantizationRule, quantize_fn
      >>> provider = QtProvider([QuantizationRule(weight_qtype="int4")])
      >>> layer = quantize_fn(lambda params, x: x @ params["w"], provider)
      >>> layer({"w": jnp.array([[0.4, 7.5]])}, jnp.ones((1, 1))).shape
      (1, 2)
    """
    _check_provider(provider)
    if not callable(fn):
        raise TypeError(f"Expected a function, got {shortened(fn)}.")

    @functools.wraps(fn)
    def quantized(*args, **kwargs):
        with current_rule.answering(provider.rules):
            mode = functools.partial(rewrite, provider)
            return rewrite_function(fn, args, kwargs, mode)

    return quantized


def _check_provider(provider: Any) -> None:
    if not isinstance(provider, QuantizationProvider):
        raise TypeError(
            "Expected a provider, such as QtProvider(rules), got "
            f"{shortened(provider)}."
        )


def call_function(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function whose first argument is a tree of params.

    While a session is open, it is rewritten.
    """
    open_session = session.current()
    if open_session is None:
        return fn(*args, **kwargs)
    return rewrite_function(fn, args, kwargs, open_session.rewrite)


def rewrite_function(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewrite: session.Rewrite,
) -> Any:
    """Calls a function whose first argument is a tree of params, rewritten."""
    traced = trace_function(fn, args, kwargs)
    with session.suspended(current_rule.key):
        out = rewrite(traced)
    if out is session.UNCHANGED:
        with session.suspended():
            out = nested.taking_params(fn)(*args, **kwargs)
    return out


def trace_function(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> function.TracedCall:
    """Traces a function whose first argument is a tree of params.

    Raises:
      TypeError: if it was called without arguments.
    """
    if not args and not kwargs:
        raise TypeError(
            "A quantized function takes its params as its first argument; it was "
            "called without any."
        )
    # The params may come by keyword. They are the parameter that stands first.
    key = None if args else _first_name(fn, kwargs)
    first = args[0] if key is None else kwargs[key]
    others = {name: value for name, value in kwargs.items() if name != key}
    variables = hasattr(first, "keys") and "params" in first.keys()
    name = linen_calls.param_name if variables else function.param_path

    def flat(first, rest, kwargs):
        call = nested.taking_params(fn)
        if key is None:
            return call(first, *rest, **kwargs)
        return call(**{key: first}, **kwargs)

    with marks.tracing() as seen:
        traced = function.trace(flat, (first, args[1:], others), name)
    return dataclasses.replace(
        traced,
        make_rng=functools.partial(_key_of, kwargs.get("rngs")),
        deterministic=_deterministic(fn, args, kwargs),
        method=_method_name(kwargs.get("method")),
        declares=functools.partial(_declares, seen, session.current() is not None),
        seen_shapes=seen.linen,
    )


def _declares(seen: marks.Seen, in_step: bool, path: Path) -> bool | None:
    """See `TracedCall.declares`: for a function, in which Linen modules may be called.

    One that is quantized by itself is a whole model. In a step, another may have the
    same params.
    """
    return path in seen.linen if seen.linen or not in_step else None


def _key_of(rngs: Any, name: str) -> Any:
    """The random key of a stream, from those given to Linen's `Module.apply`."""
    if isinstance(rngs, Mapping):
        return rngs.get(name, rngs.get("params"))
    return rngs


def _deterministic(fn: Callable[..., Any], args, kwargs) -> bool | None:
    """Whether a call of a function, or of a Linen model, says that it evaluates."""
    module = getattr(fn, "__self__", None)
    if not isinstance(module, nn.Module):
        return call_mode.deterministic_of(fn, args, kwargs)
    method = kwargs.get("method") or "__call__"
    if isinstance(method, str):
        method = getattr(subclasses.original(type(module)), method)
    apply_only = ("variables", "rngs", "method", "mutable", "capture_intermediates")
    given = {name: x for name, x in kwargs.items() if name not in apply_only}
    return call_mode.deterministic_of(method, (module, *args[1:]), given, module)


def _method_name(method: Any) -> str:
    if isinstance(method, str):
        return method
    return getattr(method, "__name__", None) or "__call__"


def _first_name(fn: Callable[..., Any], kwargs: dict[str, Any]) -> str:
    """The keyword argument that stands first in the signature of a function."""
    try:
        names = list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        names = []
    return next((name for name in names if name in kwargs), next(iter(kwargs)))


def _quantized_class(
    cls: type, provider: QuantizationProvider, methods: tuple[str, ...]
) -> type:
    is_linen = issubclass(cls, nn.Module)
    quantized = _linen_method if is_linen else _nnx_method
    fields = {subclasses.ORIGINAL: cls, subclasses.MODE: (provider, methods)}
    fields |= {name: quantized(cls, name, provider) for name in methods}
    fields |= other_methods.of(cls, provider, methods)
    if is_linen:
        fields |= {name: _by_name(cls, name) for name in ("apply", "init_with_output")}

    def within(self, rewrite):
        inner = provider.within(rewrite)
        return inner if is_linen else nnx_keys.drawn(self, inner)

    # Linen would take it for a method of the model, and have its calls intercepted.
    fields[subclasses.WITHIN] = nn.nowrap(within)
    return marks.subclass(cls, fields)


def _by_name(cls: type, name: str) -> Callable[..., Any]:
    """A method of `nn.Module` that calls methods of the model, given as functions, too.

    `Model.encode` is the function of the user's class, which knows of no quantization.
    """
    original = getattr(cls, name)

    @nn.nowrap
    @functools.wraps(original)
    def call(*args, method=None, **kwargs):
        method = other_methods.resolved(cls, method)
        return original(*args, method=method, **kwargs)

    return call


def _linen_method(cls: type, name: str, provider: QuantizationProvider):
    method = getattr(cls, name)
    in_trace = other_methods.marked(method)

    @functools.wraps(method)
    def quantized(self, *args, **kwargs):
        if session.marking():
            return in_trace(self, *args, **kwargs)
        if self.scope is None:
            return method(self, *args, **kwargs)
        original = functools.partial(method, self)
        call = linen_calls.Call(self, name, original, args, kwargs)
        with current_rule.answering(provider.rules):
            if provider.keeps_quant_stats:
                return kept_ranges.linen_call(call, provider)
            if linen_calls.can_rewrite(self):
                return call.rewritten(functools.partial(rewrite, provider))
            if provider.stores_params or provider.adds_params:
                return call.initialized(functools.partial(_initialize, provider))
            return call.unchanged()

    for attribute in other_methods.COPIED_MARKS:  # Linen wraps it as a plain method
        quantized.__dict__.pop(attribute, None)
    return quantized


def _initialize(provider: QuantizationProvider, traced: function.TracedCall):
    """The params that a model is to hold, and the result of a call with them."""
    plan = checked_plan(provider, traced)
    if not plan.has_effect:
        return {}, session.UNCHANGED
    params = provider.store_params(traced, plan)
    return params, provider.transform(traced.with_params(params), plan)


def _nnx_method(cls: type, name: str, provider: QuantizationProvider):
    method = getattr(cls, name)
    in_trace = other_methods.marked(method)

    @functools.wraps(method)
    def quantized(*args, **kwargs):
        if session.marking():
            return in_trace(*args, **kwargs)
        mode = nnx_keys.drawn(args[0], functools.partial(rewrite, provider))
        with current_rule.answering(provider.rules):
            if provider.keeps_quant_stats:
                return kept_ranges.nnx_call(method, args, kwargs, provider)
            return nnx_calls.rewrite_call(method, args, kwargs, mode)

    return quantized

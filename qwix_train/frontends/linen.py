"""Calls of Flax Linen modules, as pure functions that can be traced and rewritten."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import core
from flax import linen as nn

from qwix_train.frontends import call_mode, marks, random_keys
from qwix_train.trace import function, passed, session, subclasses

Module = TypeVar("Module", bound=nn.Module)


@functools.cache
def float_class(cls: type) -> type:
    """A subclass of a module's class whose calls stay in float."""
    return subclasses.subclass(cls, nn.Module, {subclasses.IN_FLOAT: True})


def with_class(module: Module, cls: type) -> Module:
    """A copy of a module that is of another class."""
    # A bound one, such as one just made in a compact method, keeps its scope; a copy
    # that Linen makes would ask for a name of its own there.
    bound = module.scope is not None
    changed = copy.copy(module) if bound else module.copy(name=module.name)
    object.__setattr__(changed, "__class__", cls)
    return changed


def interceptor(
    next_function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """For `nn.intercept_methods`: rewrites calls while a session is open.

    The outermost call of a module is what is rewritten. That is the model's own
    method for `model.apply` and `nn.apply`, and a submodule's where a function was
    applied that calls one.
    """
    module = context.module
    if session.marking():
        return next_function(*args, **kwargs)
    with session.calls_of(module):
        open_session = session.current()
        attribute = _attribute_of(module, context) if open_session else None
        # `setup` is called on the way to another method, and defines submodules.
        if (
            open_session is None
            or not can_rewrite(module)
            or attribute in (None, "setup")
        ):
            return next_function(*args, **kwargs)
        return rewrite_call(
            module,
            attribute,
            lambda: next_function(*args, **kwargs),
            args,
            kwargs,
            subclasses.within(module, open_session.rewrite),
        )


def _attribute_of(
    module: nn.Module, context: nn.module.InterceptorContext
) -> str | None:
    """The attribute of a class that holds a method.

    Decorators may have given the method another name. None for what no attribute holds:
    a transformation of Linen, such as `nn.remat`, sets a module up by a function of its
    own before it calls the method.
    """
    method = getattr(context.orig_method, "func", context.orig_method)
    cls = type(module)
    for name in (context.method_name, "__call__", *dir(cls)):
        found = inspect.getattr_static(cls, name, None)
        while found is not None and found is not method:
            found = getattr(found, "__wrapped__", None)
        if found is method:
            return name
    return None


def can_rewrite(module: nn.Module) -> bool:
    """Whether a module is bound to variables that exist."""
    return module.scope is not None and not module.is_initializing()


def rewrite_call(
    module: nn.Module,
    method_name: str,
    original: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewrite: session.Rewrite,
) -> Any:
    """Calls a method of a bound module, rewritten.

    Args:
      module: the bound module.
      method_name: the method.
      original: calls the method as it is; used when there is nothing to rewrite.
      args: the positional arguments.
      kwargs: the keyword arguments.
      rewrite: the rewrite.
    """
    counters = _counters_of(module)
    traced = _trace(module, method_name, args, kwargs, counters)
    with session.suspended():
        out = rewrite(traced)
        if out is session.UNCHANGED:
            return original()
    scope = _scope_of(module)
    _update_counters(scope.rng_counters, counters)
    if scope.mutable is False:
        return out
    out, updates = out
    held = _stored_params(module)
    captured_as = getattr(getattr(type(module), method_name), "__name__", method_name)
    for collection, values in updates.items():
        for name, value in values.items():
            # The caller of `original` captures the result of this very method.
            if (collection, name) != ("intermediates", captured_as):
                module.put_variable(collection, name, value)
    for path, value in held.items():
        # Handed on as it came, it has lost the metadata of its parts.
        handed_on = updates.get("params", {})
        for name in path:
            handed_on = handed_on.get(name, {})
        leaves = jax.tree.leaves(handed_on, is_leaf=function.is_stored)
        if any(map(function.is_stored, leaves)):
            _put_param(module, path, value)
    return out


def abstract_variables(
    model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any], rngs: Any = None
) -> Any:
    """The shapes of the variables that a model is initialized with.

    Args:
      model: the model, unbound.
      inputs: its inputs, or their shapes.
      kwargs: its keyword inputs, and those of `nn.Module.init`, such as `method`.
      rngs: a random key, or keys by the names of their streams, as
        `nn.Module.apply` takes them.

    Raises:
      TypeError: if `rngs` are no random keys.
    """
    if rngs is not None:
        random_keys.checked(rngs)
    keys = rngs if isinstance(rngs, Mapping | None) else {"params": rngs}
    keys = {"params": jax.random.key(0), **(keys or {})}
    return function.eval_shape(model.init, keys, *inputs, **kwargs)


def trace_call(
    module: nn.Module, method_name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> function.TracedCall:
    """Traces a call of a method of a bound module, which stays as it is."""
    return _trace(module, method_name, args, kwargs, _counters_of(module))


def init_call(
    module: nn.Module,
    method_name: str,
    original: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    initialize: Callable[[function.TracedCall], tuple[Mapping[Any, Any], Any]],
    box: Callable[[Any, Any], Any],
    stand_in: Callable[[Any], Any],
) -> Any:
    """Initializes a module, and puts other values in the place of its params.

    Args:
      module: the module, bound, with variables that do not exist yet.
      method_name: the method that is called.
      original: calls the method as it is.
      args: the positional arguments.
      kwargs: the keyword arguments.
      initialize: from a traced call with the initialized params, the values to put in
        their places, by path, and the result of the call with these.
      box: puts the metadata of a param around the value that takes its place.
      stand_in: an array, in its metadata, for a value that took the place of a param
        when the module was called before.
    """
    counters = _counters_of(module)
    held = _stored_params(module)
    at_first = core.unfreeze(dict(module.variables))
    for path, value in held.items():
        _put_param(module, path, stand_in(value))
    with session.tracing():  # so that submodules do not put values of their own
        out = original()
    for path, value in held.items():
        _put_param(module, path, value)
    # The params exist now. What else a model holds, such as the cache of a decoder, is
    # to be made again: a module that finds it does what comes after initialization.
    variables = {**at_first, "params": module.variables.get("params", {})}
    traced = _trace(module, method_name, args, kwargs, counters, variables)
    _check_reads_params(module, traced)
    with session.suspended():
        values, result = initialize(traced)
    if result is session.UNCHANGED:
        return out
    for path, value in values.items():
        before = module.variables.get("params", {})
        for name in path:
            before = before.get(name, {})
        _put_param(module, path, box(value, before))
    return result[0]


def _check_reads_params(module: nn.Module, traced: function.TracedCall) -> None:
    """Complains of params that a module makes anew in `init`, whatever it holds.

    What takes their place is never read there, and so cannot be found.
    """
    sources = [-1 if i is None else i for i in passed.sources(traced.body)]
    _, updates = traced.rebuild(sources)
    leaves, _ = jax.tree_util.tree_flatten_with_path(updates.get("params", {}))
    anew = [
        "/".join(path)
        for key_path, source in leaves
        # A constant stands there itself.
        if (not isinstance(source, int) or source == -1)
        and (path := function.param_path(key_path)) in traced.paths
        and path not in traced.read
    ]
    if anew:
        raise ValueError(
            f"{type(module).__name__}.init writes {len(anew)} params that exist "
            f"already, among them {anew[0]!r}, so they cannot be quantized there. "
            "Write them only where they do not exist yet, as self.param does, or "
            "quantize float params: "
            "ptq.quantize(model, params, rules, *inputs, variables={})."
        )


def _stored_params(module: nn.Module) -> dict[tuple[str, ...], Any]:
    """The params of a bound module that are no arrays but stand for some, by path."""
    leaves = function.by_path(module.variables.get("params", {}), function.is_stored)
    return {path: leaf for path, leaf in leaves.items() if function.is_stored(leaf)}


def _put_param(module: nn.Module, path: tuple[str, ...], value: Any) -> None:
    for name in reversed(path[1:]):
        value = {name: value}
    module.put_variable("params", path[0], value)


def _scope_of(module: nn.Module):
    assert module.scope is not None
    return module.scope


def _counters_of(module: nn.Module) -> dict[Any, Any]:
    """How many random numbers were drawn so far, in a scope and those below it.

    A module that is called twice goes on counting, and so draws other numbers.
    """
    return _update_counters({}, _scope_of(module).rng_counters)


def _trace(
    module, method_name, args, kwargs, counters, variables=None
) -> function.TracedCall:
    """Traces a call of a method of a bound module; updates the counters.

    The variables are those that the module has, unless others are given.
    """
    scope = _scope_of(module)
    unbound, held = module.unbind()
    variables = held if variables is None else variables

    def call(inner_scope, args, kwargs):
        inner_scope.rng_counters = counters
        # `capture_intermediates` stays in force, as `Module.apply` would not have it.
        return getattr(unbound.clone(parent=inner_scope), method_name)(*args, **kwargs)

    def pure(variables, args, kwargs):
        apply = core.apply(call, mutable=scope.mutable, flags=scope.flags)
        # The random streams of a scope keep its path, so that a submodule that is
        # called on its own draws what it would within the model.
        return apply(variables, args, kwargs, rngs=dict(scope.rngs))

    with marks.tracing() as seen:
        traced = function.trace(
            pure,
            (dict(variables), args, kwargs),
            param_name,
            module_path="/".join(module.path),
        )
    method = getattr(subclasses.original(type(module)), method_name, None)
    deterministic = None
    if method is not None:
        deterministic = call_mode.deterministic_of(
            method, (module, *args), kwargs, module
        )

    def make_rng(name):
        # Where a stream is missing, Linen draws from that of the params.
        known = module.has_rng(name) or module.has_rng("params")
        return module.make_rng(name) if known else None

    leaves, _ = jax.tree_util.tree_flatten_with_path(
        variables.get("params", {}), is_leaf=_is_box
    )
    return dataclasses.replace(
        traced,
        make_rng=make_rng,
        deterministic=deterministic,
        method=method_name,
        declares=seen.linen.__contains__,
        seen_shapes=seen.linen,
        boxes={function.param_path(p): leaf for p, leaf in leaves if _is_box(leaf)},
    )


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.meta.AxisMetadata)


def _update_counters(target: dict[Any, Any], source: dict[Any, Any]) -> dict[Any, Any]:
    """Copies counters in place: the scopes of submodules hold parts of `target`."""
    for key, value in source.items():
        if isinstance(value, dict):
            value = _update_counters(target.get(key, {}), value)
        target[key] = value
    return target


def param_name(key_path: tuple[Any, ...]) -> tuple[str, ...] | None:
    """The path of a param, from that of a leaf of the variables."""
    if function.param_path(key_path[:1]) != ("params",):
        return None
    return function.param_path(key_path[1:])

"""Calls of Flax Linen modules, as pure functions that can be traced and rewritten."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from flax import core, errors
from flax import linen as nn
from jax import numpy as jnp

from qwix_train.frontends import call_mode, marks, random_keys
from qwix_train.planning import current_rule
from qwix_train.trace import function, passed, session, subclasses
from qwix_train.values import stored

Module = TypeVar("Module", bound=nn.Module)


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
        call = Call(module, attribute, next_function, args, kwargs)
        return call.rewritten(subclasses.within(module, open_session.rewrite))


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


class Call(NamedTuple):
    """A call of a method of a bound module.

    Attributes:
      module: the module.
      method: the name of the method.
      original: the method as it is, without the module.
      args: the positional arguments.
      kwargs: the keyword arguments.
    """

    module: nn.Module
    method: str
    original: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def unchanged(self) -> Any:
        """The result of the method as it is."""
        return self.original(*self.args, **self.kwargs)

    def traced(
        self, counters: dict[Any, Any] | None = None, variables: Any = None
    ) -> function.TracedCall:
        """The call, traced; the module stays as it is.

        Args:
          counters: how many random numbers were drawn so far, which is updated; those
            of the module are counted further if None.
          variables: the variables; those that the module has if None.
        """
        module, method = self.module, self.method
        counters = _counters_of(module) if counters is None else counters
        scope = _scope_of(module)
        unbound, held = module.unbind()
        variables = held if variables is None else variables

        def call(inner_scope, args, kwargs):
            inner_scope.rng_counters = counters
            # `capture_intermediates` stays in force, as `Module.apply` would not have
            # it.
            return getattr(unbound.clone(parent=inner_scope), method)(*args, **kwargs)

        def pure(variables, args, kwargs):
            apply = core.apply(call, mutable=scope.mutable, flags=scope.flags)
            # The random streams of a scope keep its path, so that a submodule that is
            # called on its own draws what it would within the model.
            return apply(variables, args, kwargs, rngs=dict(scope.rngs))

        path = "/".join(module.path)
        with marks.tracing(path) as seen:
            traced = function.trace(
                pure,
                (dict(variables), self.args, self.kwargs),
                param_name,
                module_path=path,
            )

        def make_rng(name):
            # Where a stream is missing, Linen draws from that of the params.
            known = module.has_rng(name) or module.has_rng("params")
            return module.make_rng(name) if known else None

        boxes = function.by_path(variables.get("params", {}), stored.is_box)
        own, deterministic = subclasses.original(type(module)), None
        if hasattr(own, method):
            called = getattr(own, method), (module, *self.args), self.kwargs
            deterministic = call_mode.deterministic_of(*called, module)
        return dataclasses.replace(
            traced,
            make_rng=make_rng,
            deterministic=deterministic,
            method=method,
            declares=seen.linen.__contains__,
            seen_shapes=seen.linen,
            boxes={path: leaf for path, leaf in boxes.items() if stored.is_box(leaf)},
        )

    def rewritten(self, rewrite: session.Rewrite) -> Any:
        """The result of the call, rewritten.

        Args:
          rewrite: the rewrite.
        """
        module = self.module
        counters = _counters_of(module)
        traced = self.traced(counters)
        with session.suspended(current_rule.key):
            out = rewrite(traced)
        if out is session.UNCHANGED:
            with session.suspended():
                return self.unchanged()
        scope = _scope_of(module)
        _update_counters(scope.rng_counters, counters)
        if scope.mutable is False:
            return out
        out, updates = out
        held = _stored_params(module)
        method = getattr(type(module), self.method)
        captured = ("intermediates", getattr(method, "__name__", self.method))
        for collection, values in updates.items():
            for name, value in values.items():
                # The caller of `original` captures the result of this very method.
                if (collection, name) != captured:
                    module.put_variable(collection, name, value)
        for path, value in held.items():
            # Handed on as it came, it has lost the metadata of its parts.
            handed_on = _at(updates.get("params", {}), path)
            leaves = jax.tree.leaves(handed_on, is_leaf=function.is_stored)
            if any(map(function.is_stored, leaves)):
                _put_param(module, path, value)
        return out

    def initialized(
        self,
        initialize: Callable[[function.TracedCall], tuple[Mapping[Any, Any], Any]],
    ) -> Any:
        """The result of a call that initializes the module.

        Puts other values in the place of its params.

        Args:
          initialize: from a traced call with the initialized params, the values to put
            in their places, by path, and the result of the call with these.
        """
        module = self.module
        counters = _counters_of(module)
        held = _stored_params(module)
        at_first = core.unfreeze(dict(module.variables))
        for path, value in held.items():
            zeros = jnp.zeros(value.shape, value.dtype)
            _put_param(module, path, stored.box_array(value, zeros))
        with marks.tracing():  # so that submodules do not put values of their own
            out = self.unchanged()
        for path, value in held.items():
            _put_param(module, path, value)
        # The params exist now. What else a model holds, such as the cache of a decoder,
        # is to be made again: a module that finds it does what comes after
        # initialization.
        params = module.variables.get("params", {})
        traced = self.traced(counters, {**at_first, "params": params})
        traced = dataclasses.replace(traced, initializing=True)
        _check_reads_params(module, traced)
        with session.suspended(current_rule.key):
            values, result = initialize(traced)
        if result is session.UNCHANGED:
            return out
        for path, value in values.items():
            before = _at(module.variables.get("params", {}), path)
            _put_param(module, path, stored.box(value, before))
        return result[0]


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What stands at a path of nested dictionaries; an empty one if nothing does."""
    return functools.reduce(lambda held, name: held.get(name, {}), path, tree)


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
    keys = random_keys.by_stream(rngs)
    return function.eval_shape(model.init, keys, *inputs, **kwargs)


@contextlib.contextmanager
def naming_missing_collections(
    model: Any,
    variables: Mapping[str, Any],
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    place: str = "variables=",
) -> Iterator[None]:
    """Says which collections of variables a call of a model lacks.

    Flax names the one that the call reads first, and does not say how to give it.

    Args:
      model: the Linen module. Calls of anything else are left as they are.
      variables: the variables that it is called with.
      inputs: its inputs, or their shapes.
      kwargs: its keyword inputs, and those of `nn.Module.apply`.
      place: where the caller gives variables, for the message.

    Raises:
      ValueError: if a collection is missing or empty.
    """
    try:
        yield
    except errors.ScopeCollectionNotFound as error:
        if not isinstance(model, nn.Module):
            raise
        given = {k: v for k, v in kwargs.items() if k not in ("rngs", "mutable")}
        try:
            with session.suspended():
                made = abstract_variables(model, inputs, given)
        except Exception:
            raise error from None
        missing = [name for name in made if not variables.get(name)]
        if not missing:
            raise
        entries = ", ".join(f'"{name}": {name}' for name in missing)
        raise ValueError(
            f"{subclasses.original(type(model)).__name__} has variables in "
            f"{', '.join(missing)}, and is called without them. Give "
            f"{place}{{..., {entries}}}."
        ) from error


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

"""The models among the arguments of a step, and in what the step closes over."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import linen as nn
from flax import nnx

from qwix_train.frontends import attributes, nnx_objects
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends.model import call_function

_APPLY = "apply_fn"
# Longer lists hold data.
_MOST_MODELS = 1000


class RewrittenApply:
    """An `apply_fn` that is no Linen module's, rewritten while a session is open.

    Equal to the function it stands for, so that a train state that holds it has the
    same tree structure as the user's.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args, **kwargs):
        """Calls the function, rewritten."""
        return call_function(self.function, args, kwargs)

    def __eq__(self, other):
        return self.function == getattr(other, "function", other)

    def __hash__(self):
        return hash(self.function)


class _InterceptedApply(RewrittenApply):
    """The `apply` of an NNX graph definition, whose modules are intercepted."""

    def __call__(self, *args, **kwargs):
        graphdef = nnx_calls.intercepted_graphdef(self.function.__self__)
        return graphdef.apply(*args, **kwargs)


def _enter_apply(apply_fn: Any) -> Any:
    if not callable(apply_fn) or getattr(apply_fn, "rewrites_itself", False):
        return apply_fn
    owner = getattr(apply_fn, "__self__", None)
    if isinstance(owner, nn.Module):
        return apply_fn  # its calls are intercepted
    is_graphdef = isinstance(owner, nnx.GraphDef)
    return (_InterceptedApply if is_graphdef else RewrittenApply)(apply_fn)


def _leave_apply(apply_fn: Any) -> Any:
    return apply_fn.function if isinstance(apply_fn, RewrittenApply) else apply_fn


def entered(tree: Any) -> Any:
    """The arguments of a step with the models in them rewritten while it runs.

    These are the graph definitions and the `apply_fn`s, in the fields of states, too,
    static or not. All else stays the same object: NNX modules are trees, too, but a
    copy of one would not see the step's updates.

    Args:
      tree: the arguments.
    """
    return _map_models(tree, _enter_apply, nnx_calls.intercepted_graphdef)


def left(tree: Any) -> Any:
    """The results of a step with the models in them as they were before it.

    Args:
      tree: the results.
    """
    return _map_models(tree, _leave_apply, nnx_calls.original_graphdef)


def _map_models(tree, change_apply, change_graphdef):
    def change(value):
        if isinstance(value, nnx.GraphDef):
            return change_graphdef(value)
        if nnx_objects.is_node(value) or not _is_state(value):
            return value
        changes = {}
        for name in _fields_of(value):
            old = getattr(value, name)
            new = change_apply(old) if name == _APPLY else changed(old)
            if new is not old:
                changes[name] = new
        return _replaced(value, changes) if changes else value

    def changed(tree):
        leaves, structure = jax.tree.flatten(tree, is_leaf=_is_whole)
        new = [change(leaf) for leaf in leaves]
        if all(map(operator.is_, leaves, new)):
            return tree
        return jax.tree.unflatten(structure, new)

    return changed(tree)


def _is_whole(value: Any) -> bool:
    is_model = nnx_objects.is_node(value) or isinstance(value, nnx.GraphDef)
    return is_model or _is_state(value)


def _is_state(value: Any) -> bool:
    """Whether an object has fields that may hold models: a dataclass, as most have."""
    is_dataclass, has_replace = _kind_of_state(type(value))
    return is_dataclass or (has_replace and attributes.has(value, _APPLY))


@functools.cache
def _kind_of_state(cls: type) -> tuple[bool, bool]:
    # Cached, since each leaf of a state is asked.
    if issubclass(cls, type | nn.Module):
        return False, False
    return dataclasses.is_dataclass(cls), attributes.has(cls, "replace")


def _fields_of(state: Any) -> list[str]:
    if not dataclasses.is_dataclass(state):
        return [_APPLY]
    names = [field.name for field in dataclasses.fields(state)]
    return [name for name in names if attributes.has(state, name)]


def _replaced(state: Any, changes: dict[str, Any]) -> Any:
    if attributes.has(state, "replace"):
        return state.replace(**changes)
    state = copy.copy(state)
    for name, value in changes.items():
        object.__setattr__(state, name, value)
    return state


def held_modules(step: Callable[..., Any]) -> list[Any]:
    """The NNX objects that a step holds without receiving them as arguments.

    These are what it, and the functions that it calls, close over or name as globals
    of their module, and the attributes of the object whose method it is.

    Args:
      step: the step.
    """
    function = step
    while isinstance(function, functools.partial):
        function = function.func
    module = getattr(inspect.unwrap(function), "__globals__", {})
    return list(_held(step, module, set()))


def _held(value: Any, module: dict[str, Any], seen: set[int]) -> Iterator[Any]:
    """The NNX objects within a value.

    Args:
      value: any object.
      module: the globals of the step. Functions of other modules are libraries, and
        hold no models.
      seen: the identities of the objects met before.
    """
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[Any] = ()
    if nnx_objects.is_node(value):
        yield value
    elif isinstance(value, functools.partial):
        inner = (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        held = value.__self__
        inner = (value.__func__, held, *getattr(held, "__dict__", {}).values())
    elif isinstance(value, types.FunctionType):
        inner = _named_in(value, module)
    elif isinstance(value, list | tuple | dict) and len(value) < _MOST_MODELS:
        inner = value.values() if isinstance(value, dict) else value
    elif callable(value) and attributes.has(value, "__wrapped__"):
        inner = (value.__wrapped__,)  # compiled
    for part in inner:
        yield from _held(part, module, seen)


def _named_in(function: types.FunctionType, module: dict[str, Any]) -> Iterator[Any]:
    """What a function closes over, and the globals of a module that it names."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            yield cell.cell_contents
    if function.__globals__ is module:
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            yield from (module[name] for name in code.co_names if name in module)
            codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    yield getattr(function, "__wrapped__", None)

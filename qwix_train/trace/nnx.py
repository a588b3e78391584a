"""Calls of Flax NNX modules, as pure functions that can be traced and rewritten.

NNX puts no module path into the trace, and calls methods on plain Python objects.
So for the time of a rewrite each module gets a subclass of its own class whose
methods first look at what is going on: while a model is traced they mark the trace
with the module's path, while a session is open they rewrite the call, and otherwise
they are the methods of the original class.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from qwix_train.trace import function, scopes, session

_CLASS = "_qwix_train_class"
_PATH = "_qwix_train_path"

_lock = threading.Lock()
# How many rewrites in progress, in any thread, hold a module, by its identity.
_holders: dict[int, int] = {}


def is_node(value: Any) -> bool:
    """Whether a leaf of the arguments is an NNX object, not an array."""
    return isinstance(value, nnx.Pytree | nnx.Variable)


def modules_in(tree: Any) -> list[nnx.Module]:
    """The NNX modules in a tree of arguments, each once."""
    leaves = jax.tree.leaves(tree, is_leaf=is_node)
    found = {id(leaf): leaf for leaf in leaves if isinstance(leaf, nnx.Pytree)}
    return list(found.values())


@contextlib.contextmanager
def intercepted(roots: list[Any]) -> Iterator[None]:
    """Within this context, calls of the modules below `roots` are rewritten.

    The modules themselves are changed (their class is), not copies: a step updates
    the very objects it was given. Threads may share a module: what its methods do
    depends on the session of the thread that calls them.
    """
    held = []
    with _lock:
        for root in roots:
            for path, module in nnx.iter_modules(root):
                _holders[id(module)] = _holders.get(id(module), 0) + 1
                held.append(module)
                _intercept(module, "/".join(map(str, path)))
    try:
        yield
    finally:
        with _lock:
            for module in held:
                _holders[id(module)] -= 1
                if not _holders[id(module)]:
                    del _holders[id(module)]
                    release(module)


def release(module: nnx.Module) -> None:
    """Gives a module its original class back."""
    original = getattr(type(module), _CLASS, None)
    if original is not None:
        module.__class__ = original


def release_all(tree: Any) -> None:
    """Gives all modules in a tree of results their original classes back."""
    for root in modules_in(tree):
        for _, module in nnx.iter_modules(root):
            with _lock:
                if id(module) not in _holders:
                    release(module)


def _intercept(module: nnx.Module, path: str) -> None:
    cls = type(module)
    if getattr(cls, _PATH, None) == path:
        return
    module.__class__ = intercepting_class(getattr(cls, _CLASS, cls), path)


@functools.cache
def intercepting_class(cls: type, path: str) -> type:
    """A subclass of a module's class that marks and rewrites calls.

    Cached, so that two traces of one model have equal graph definitions.
    """
    fields: dict[str, Any] = {_CLASS: cls, _PATH: path, "__doc__": cls.__doc__}
    for name in methods_of(cls):
        fields[name] = _intercepting_method(getattr(cls, name), path)
    return type(cls.__name__, (cls,), fields)


def methods_of(cls: type) -> list[str]:
    """The methods that a model's author wrote: `__call__` and the public ones."""
    names = {
        name
        for base in cls.__mro__
        if base not in nnx.Module.__mro__
        for name in vars(base)
    }
    return sorted(
        name
        for name in names
        if (name == "__call__" or not name.startswith("_"))
        and inspect.isfunction(inspect.getattr_static(cls, name))
    )


def _intercepting_method(method: Callable[..., Any], path: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        if session.marking():
            with scopes.module_scope(path):
                return method(*args, **kwargs)
        open_session = session.current()
        if open_session is None:
            return method(*args, **kwargs)
        return rewrite_call(method, args, kwargs, open_session.rewrite, path)

    return wrapped


def rewrite_call(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewrite: session.Rewrite,
    path: str = "",
) -> Any:
    """Calls a method of a module, rewritten.

    Args:
      method: the plain function of the class.
      args: the module, then the arguments.
      kwargs: the keyword arguments.
      rewrite: the rewrite.
      path: the path of the module within the model.
    """
    traced, update = trace_call(method, args, kwargs, path)
    with session.suspended():
        out = rewrite(traced)
        if out is session.UNCHANGED:
            return method(*args, **kwargs)
    out, state = out
    update(state)
    return out


def trace_call(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: str = "",
) -> tuple[function.TracedCall, Callable[[Any], None]]:
    """Traces a call of a method of a module.

    Args:
      method: the plain function of the class.
      args: the module, then the arguments, which may hold NNX objects themselves
        (such as `nnx.Rngs`).
      kwargs: the keyword arguments.
      path: the path of the module within the model.

    Returns:
      The traced call, whose result is a pair of the method's result and the new
      state, and a function that writes such a state back into the NNX objects.
    """
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    slots = [i for i, leaf in enumerate(leaves) if is_node(leaf)]
    nodes = [leaves[i] for i in slots]
    graphdef, params, rest = nnx.split(nodes, nnx.Param, ...)
    static = [None if is_node(leaf) else leaf for leaf in leaves]

    def pure(params, rest, static):
        nodes = nnx.merge(graphdef, params, rest)
        for module_path, module in nnx.iter_modules(nodes[0]):
            names = [path, *map(str, module_path)]
            _intercept(module, "/".join(name for name in names if name))
        filled = list(static)
        for slot, node in zip(slots, nodes, strict=True):
            filled[slot] = node
        new_args, new_kwargs = jax.tree.unflatten(tree, filled)
        out = method(*new_args, **new_kwargs)
        return out, nnx.state(nodes)

    def param_name(key_path: tuple[str, ...]) -> tuple[str, ...]:
        names = key_path[1:-1] if key_path[-1] == "value" else key_path[1:]
        return (*filter(None, path.split("/")), *names)

    with session.tracing():
        traced = function.trace(pure, (params, rest, static), param_name)
    return traced, lambda state: nnx.update(nodes, state)

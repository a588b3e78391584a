"""How the modules of Flax mark what is traced with their paths.

Linen modules are marked by an interceptor of their methods, NNX modules by a subclass
of their own class (see `trace.nnx`). Where one kind holds the other, through
`nnx.bridge`, both leave marks, and `scopes.module_path_of` joins the two paths.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
from flax import core, nnx
from flax import linen as nn
from jax import numpy as jnp

from qwix_train.frontends import nnx_objects
from qwix_train.planning import current_rule
from qwix_train.planning.leaves import Path
from qwix_train.trace import scopes, session, subclasses
from qwix_train.values import stored

# The shapes of params, by path. Within `vmap` and `scan`, a module sees fewer axes.
Shapes = dict[Path, set[tuple[int, ...]]]


class Seen(NamedTuple):
    """The params of the modules that were called while a model was traced.

    Attributes:
      linen: what Linen modules declare, in `setup`, too, whether they compute with it
        or not. Paths begin at the outermost Linen module.
      nnx: what NNX modules hold. Paths begin at the outermost NNX module.
    """

    linen: Shapes
    nnx: Shapes


class _Thread(threading.local):
    """What the modules that are called in a thread add to."""

    seen: Seen | None = None


_thread = _Thread()


@contextlib.contextmanager
def tracing(path: str = "") -> Iterator[Seen]:
    """While a model is traced: no session is in force, and modules mark scopes.

    Args:
      path: the path of the Linen module that is traced, in a larger model.

    Yields:
      What was seen of the modules; complete when the trace is.
    """
    outer = _thread.seen
    _thread.seen = seen = Seen(
        collections.defaultdict(set), collections.defaultdict(set)
    )
    marking = functools.partial(_of_linen, seen.linen)
    try:
        with (
            scopes.part_of(path),
            session.tracing(current_rule.key()),
            nn.intercept_methods(marking),
        ):
            yield seen
    finally:
        _thread.seen = outer


@contextlib.contextmanager
def _in_module(
    path: str,
    kind: Literal["linen", "nnx"] | None = None,
    *,
    batch_norm: bool = False,
) -> Iterator[None]:
    """A context that marks what a module does, see `scopes.module_scope`.

    What JAX keeps of it is used again where kernels get the same answers.
    """
    with (
        scopes.module_scope(path, kind, batch_norm=batch_norm),
        session.tracing(current_rule.key()),
    ):
        yield


def _of_linen(
    shapes: Shapes,
    next_function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """For `nn.intercept_methods`: marks what a Linen module does."""
    module = context.module
    bridge = contextlib.nullcontext()
    if isinstance(module, nnx.bridge.ToLinen):
        bridge = _marking_parts(module, shapes)
    path, batch_norm = "/".join(module.path), isinstance(module, nn.BatchNorm)
    with (
        session.calls_of(module),
        _in_module(path, "linen", batch_norm=batch_norm),
        bridge,
    ):
        out = next_function(*args, **kwargs)
    if module.scope is not None:
        for name, kinds in module.scope.reservations.items():
            value = module.get_variable("params", name) if "params" in kinds else None
            if hasattr(array := stored.unbox(value), "shape"):  # it may be a tree
                shapes[(*module.path, name)].add(array.shape)
    return out


def of_nnx(module: Any, path: str) -> contextlib.AbstractContextManager[Any]:
    """A context that marks what an NNX module does.

    Args:
      module: the module, or another NNX object that has a method.
      path: its path within the outermost NNX module.
    """
    if (seen := _thread.seen) is not None:
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                here = tuple(filter(None, (*path.split("/"), name)))
                seen.nnx[here].add(jnp.shape(nnx_objects.raw(value)))
    batch_norm = isinstance(module, nnx.BatchNorm)
    return _in_module(path, "nnx", batch_norm=batch_norm)


@contextlib.contextmanager
def _marking_parts(module: nnx.bridge.ToLinen, shapes: Shapes) -> Iterator[None]:
    """While a Linen module that holds an NNX module is called: marks the parts of that.

    The bridge makes the NNX module within the call, and copies its variables into it.
    """
    make, scope = module.nnx_class, module.scope
    if scope is None:
        yield
        return
    held, flags = module.variables, scope.flags

    @functools.wraps(make, updated=())
    def marked(*args, **kwargs):
        made = make(*args, **kwargs)
        for path, variable in nnx_objects.variables_of(made).items():
            shapes[(*module.path, *path)].add(variable.shape)
        _make_room(made, held)
        for path, part in nnx.iter_modules(made):
            set_class(part, _marking_class(type(part), "/".join(map(str, path))))
        return made

    object.__setattr__(module, "nnx_class", marked)
    if "params" in held:
        # In `init` the bridge would make new params; it is to read those that exist.
        scope.flags = core.freeze({**flags, "initializing": False})
    try:
        yield
    finally:
        object.__setattr__(module, "nnx_class", make)
        scope.flags = flags


def _make_room(made: nnx.Module, variables: Mapping[str, Any]) -> None:
    """Gives an NNX module attributes for variables that only its Linen module has.

    Those are scales, adapters and statistics that stand next to params. The bridge
    copies each variable to the attribute of its name, and warns where the module has
    no such attribute.
    """
    nodes = {tuple(map(str, path)): node for path, node in nnx.iter_modules(made)}

    def fill(path, tree, collection):
        kind = nnx.variable_type_from_name(collection, allow_register=True)
        for name, value in tree.items():
            here = (*path, str(name))
            # Params of a module that does not exist are a mistake: it goes on warning.
            unknown = collection == "params" and isinstance(value, Mapping)
            if here in nodes:
                fill(here, value, collection)
            elif not unknown and not hasattr(nodes[path], str(name)):
                value = jax.tree.map(kind, value, is_leaf=stored.is_box)
                setattr(nodes[path], str(name), nnx.data(value))

    for collection, tree in variables.items():
        fill((), tree, collection)


@functools.cache
def _marking_class(cls: type, path: str) -> type:
    """A subclass of a module's class whose methods mark what they do."""

    def marking(method):
        @functools.wraps(method)
        def marked(*args, **kwargs):
            with session.calls_of(args[0]), of_nnx(args[0], path):
                return method(*args, **kwargs)

        return marked

    return subclass(
        cls, {name: marking(getattr(cls, name)) for name in methods_of(cls)}
    )


def set_class(module: nnx.Module, cls: type) -> None:
    """Changes the class of a module, and nothing else about it."""
    # NNX would list `__class__` among the attributes of the module.
    object.__setattr__(module, "__class__", cls)


def subclass(cls: type, fields: dict[str, Any]) -> type:
    """A subclass of a module's class, Linen's or NNX's; a pytree where that is one."""
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    keywords = {} if is_pytree else {"pytree": False}
    return subclasses.subclass(cls, _root_of(cls), fields, **keywords)


@functools.cache
def float_class(cls: type) -> type:
    """A subclass of a module's class whose calls stay in float."""
    return subclass(cls, {subclasses.IN_FLOAT: True})


def methods_of(cls: type) -> list[str]:
    """The methods that a model's author wrote: `__call__` and the public ones."""
    root = _root_of(cls)
    names = {
        name
        for base in cls.__mro__
        if base not in root.__mro__
        for name in vars(base)
        if name == "__call__" or not name.startswith("_")
    }
    if root is nn.Module:
        names -= {*getattr(cls, "__dataclass_fields__", ()), "setup"}
    return sorted(name for name in names if _is_method(cls, name))


def _root_of(cls: type) -> type:
    return nn.Module if issubclass(cls, nn.Module) else nnx.Module


def _is_method(cls: type, name: str) -> bool:
    """Whether an attribute is a method; those that `nnx.jit` made are, too."""
    value = next(vars(base)[name] for base in cls.__mro__ if name in vars(base))
    return (
        callable(value)
        and hasattr(type(value), "__get__")
        and not isinstance(value, type | staticmethod | classmethod)
        and not getattr(value, "nowrap", False)
    )

"""Calls of Flax NNX modules, as pure functions that can be traced and rewritten.

NNX puts no module path into the trace, and calls methods on plain Python objects.
So for the time of a rewrite each module gets a subclass of its own class whose
methods first look at what is going on: while a model is traced they mark the trace
with the module's path, while a session is open they rewrite the call, and otherwise
they are the methods of the original class.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx import graphlib

from qwix_train.frontends import marks, nnx_objects
from qwix_train.trace import function, session, subclasses

_CLASS = "_qwix_train_class"
_PATH = "_qwix_train_path"
_UPDATE = "qwix_train"

Module = TypeVar("Module", bound=nnx.Module)

_lock = threading.Lock()
# How many rewrites in progress, in any thread, hold a module, by its identity.
_holders: dict[int, int] = {}


@contextlib.contextmanager
def intercepted(tree: Any) -> Iterator[None]:
    """Within this context, calls of the modules in a tree are rewritten.

    The modules themselves are changed (their class is), not copies: a step updates
    the very objects it was given. Threads may share a module: what its methods do
    depends on the session of the thread that calls them.
    """
    held = []
    try:
        with _lock:
            for path, module in nnx_objects.modules_in(tree):
                # The class that another rewrite gave it serves this one, too.
                if id(module) not in _holders:
                    _intercept(module, path)
                _holders[id(module)] = _holders.get(id(module), 0) + 1
                held.append(module)
        yield
    finally:
        with _lock:
            for module in held:
                _holders[id(module)] -= 1
                if not _holders[id(module)]:
                    del _holders[id(module)]
                    _release(module)


def release_all(tree: Any) -> None:
    """Gives all modules in a tree of results their original classes back."""
    for _, module in nnx_objects.modules_in(tree):
        with _lock:
            if id(module) not in _holders:
                _release(module)


def intercepted_graphdef(graphdef: nnx.GraphDef[Any]) -> nnx.GraphDef[Any]:
    """A graph definition whose modules, once merged, have their calls rewritten."""
    return _map_graphdef(
        graphdef, lambda cls, path: intercepting_class(_original(cls), path)
    )


def original_graphdef(graphdef: nnx.GraphDef[Any]) -> nnx.GraphDef[Any]:
    """A graph definition with the original classes of its modules."""
    return _map_graphdef(graphdef, lambda cls, path: _original(cls))


def _map_graphdef(graphdef, change):
    """Applies `change(cls, path)` to the class of each module in a definition."""
    nodes = list(graphdef.nodes)
    attributes = iter(graphdef.attributes)
    index = 0

    def walk(path, root):
        nonlocal index
        here, node = index, nodes[index]
        index += 1
        cls = getattr(node, "type", None)
        if not hasattr(node, "num_attributes"):
            return  # a variable, or a reference to a node that came before
        is_module = isinstance(cls, type) and issubclass(cls, nnx.Module)
        if is_module:
            root = len(path) if root is None else root
            cls = change(cls, "/".join(map(str, path[root:])))
            # A module's metadata is the class to make an empty one of.
            metadata = cls if isinstance(node.metadata, type) else node.metadata
            nodes[here] = dataclasses.replace(node, type=cls, metadata=metadata)
        for _ in range(node.num_attributes):
            key, value = next(attributes)
            if isinstance(value, graphlib.NodeAttr):
                walk((*path, key), root)

    if nodes and hasattr(nodes[0], "num_attributes"):
        walk((), None)
    return dataclasses.replace(graphdef, nodes=nodes)


def _original(cls: type) -> type:
    return getattr(cls, _CLASS, cls)


def in_float(module: Module) -> Module:
    """A module that shares the variables of another one, and whose calls stay in float.

    Args:
      module: the module, which does not change.
    """
    changed = nnx.clone(module, variables=False)
    for _, part in nnx.iter_modules(changed):
        marks.set_class(part, float_class(type(part)))
    return changed


def graphdef_in_float(graphdef: nnx.GraphDef[Any]) -> nnx.GraphDef[Any]:
    """A graph definition whose modules, once merged, have calls that stay in float."""
    return _map_graphdef(graphdef, lambda cls, path: float_class(cls))


def float_class(cls: type) -> type:
    """A subclass of a module's class whose calls stay in float."""
    path = getattr(cls, _PATH, None)
    changed = marks.float_class(_original(cls))
    return changed if path is None else intercepting_class(changed, path)


def _release(module: nnx.Module) -> None:
    original = _original(type(module))
    if original is not type(module):
        marks.set_class(module, original)


def _intercept(module: nnx.Module, path: str) -> None:
    if getattr(type(module), _PATH, None) != path:
        marks.set_class(module, intercepting_class(_original(type(module)), path))


@functools.cache
def intercepting_class(cls: type, path: str) -> type:
    """A subclass of a module's class that marks and rewrites calls.

    Cached, so that two traces of one model have equal graph definitions.
    """
    fields: dict[str, Any] = {_CLASS: cls, _PATH: path}
    for name in marks.methods_of(cls):
        fields[name] = _intercepting_method(getattr(cls, name), path)
    return marks.subclass(cls, fields)


def _intercepting_method(method: Callable[..., Any], path: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        with session.calls_of(args[0]):
            if session.marking():
                with marks.of_nnx(args[0], path):
                    return method(*args, **kwargs)
            open_session = session.current()
            if open_session is None:
                return method(*args, **kwargs)
            rewrite = subclasses.within(args[0], open_session.rewrite)
            return rewrite_call(method, args, kwargs, rewrite, path)

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
    with tracing_call(method, args, kwargs, path) as (traced, finish):
        with session.suspended():
            out = rewrite(traced)
        if out is not session.UNCHANGED:
            return finish(out)
    with session.suspended():
        return method(*args, **kwargs)


@contextlib.contextmanager
def tracing_call(
    method: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    path: str = "",
    mark: bool = True,
    whole: bool = False,
) -> Iterator[tuple[function.TracedCall, Callable[[Any], Any]]]:
    """Traces a call of a method of a module, or of any function of NNX objects.

    Args:
      method: the plain function of the class.
      args: the module, then the arguments, which may hold NNX objects themselves
        (such as `nnx.Rngs`).
      kwargs: the keyword arguments.
      path: the path of the module within the model.
      mark: whether modules mark the trace with their paths, and find arrays in the
        place of stored params. A function that has its model calls rewritten does
        without.
      whole: whether the trace returns all that the NNX objects hold, not only what
        changed, so that traces of functions that change different parts are alike.

    Yields:
      The traced call, and a function that takes its result, updates the NNX objects
      among the arguments, and returns what the method does.
    """
    given = (tuple(args), kwargs)
    nodes, others, joined = function.divided(
        given, nnx_objects.is_node, nnx_objects.is_node
    )
    result = _Result(whole)
    prefix = tuple(filter(None, path.split("/")))
    found = nnx_objects.stored_params(nodes) if mark else []
    # The first key is the index of the object among the arguments.
    names = [(*prefix, *slot.path[1:]) for slot, _ in found]
    with nnx.update_context(_UPDATE):
        with nnx.split_context(_UPDATE) as split:
            graphdef, flat = split.flatten(nodes)
        # Without a tree around them: in that of an `nnx.List`, keys may be of several
        # types, which JAX cannot sort.
        params, rest, all_held = function.divided(
            list(flat.leaves),
            nnx_objects.is_param,
            is_leaf=lambda leaf: not isinstance(leaf, list),
        )
        held = zip(flat.paths, flat.leaves, strict=True)
        param_paths = [path for path, leaf in held if nnx_objects.is_param(leaf)]

        def pure(inputs, rest, others):
            stand_ins, params = inputs
            variables = all_held(params, rest)
            given = [jax.tree.leaves(variable) for variable in variables]
            with nnx.merge_context(_UPDATE, True) as merge:
                nodes = merge.unflatten(graphdef, variables)
            stored_copies = nnx_objects.stored_params(nodes) if mark else []
            for (slot, _), stand_in in zip(stored_copies, stand_ins, strict=True):
                slot.fill(stand_in)
            copies = list(nnx_objects.modules_in(nodes))
            classes = [type(module) for _, module in copies]
            for module_path, module in nnx.iter_modules(nodes[0]) if mark else ():
                names = [path, *map(str, module_path)]
                _intercept(module, "/".join(name for name in names if name))
            new_args, new_kwargs = joined(nodes, others)
            with marks.of_nnx(nodes[0], path):
                out = method(*new_args, **new_kwargs)
            finals = [nnx_objects.raw(stand_in) for stand_in in stand_ins]
            for slot, value in stored_copies:
                slot.fill(value)
            # The caller's objects have these classes.
            for (_, module), cls in zip(copies, classes, strict=True):
                marks.set_class(module, cls)
            with nnx.split_context(_UPDATE) as split:
                out = result.split(split, nodes, out, given, graphdef)
            return out, finals

        def param_name(key_path):
            which, *key_path = key_path
            if which.idx == 0:
                return names[key_path[0].idx]
            keys = map(jax.tree_util.DictKey, param_paths[key_path[0].idx][1:])
            name = (*prefix, *function.param_path((*keys, *key_path[1:])))
            parts = any(name[: len(whole)] == whole for whole in names)
            return None if parts else name

        inputs = ([value for _, value in found], params)
        with marks.tracing() if mark else contextlib.nullcontext() as seen:
            traced = function.trace(
                pure,
                (inputs, rest, others),
                param_name,
                as_arrays=mark,
                num_held=2,
            )
        attached = {
            (*prefix, *map(str, param_path[1:]))
            for param_path, leaf in zip(param_paths, params, strict=True)
            if nnx_objects.is_attached(leaf)
        }
        traced = dataclasses.replace(
            traced,
            method=method.__name__,
            declares=lambda path: False if path in attached else None,
            seen_shapes=seen.nnx if seen is not None else {},
        )

        def finish(out):
            out, finals = out
            # Loops write back what they only read, so that this cannot be told from
            # the trace: what was only read comes out as it is stored.
            for name, final in zip(names, finals, strict=True):
                if not function.is_stored(final):
                    raise ValueError(
                        f"The model writes to its param {'/'.join(name)!r}, which is "
                        "quantized and cannot change."
                    )
            return result.merge(nodes, out)

        yield traced, finish


@contextlib.contextmanager
def tracing_step(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    whole: bool = False,
) -> Iterator[tuple[function.TracedCall, Callable[[Any], Any]]]:
    """Traces a whole train or eval step, whatever its arguments are.

    Args:
      step: the step.
      args: its arguments, NNX objects among them or not.
      kwargs: its keyword arguments.
      whole: whether the trace returns all that NNX objects hold; see
        `tracing_call`.

    Yields:
      The traced call, and a function that takes its result, updates the NNX objects
      among the arguments, and returns what the step does.
    """
    leaves = jax.tree.leaves((args, kwargs), is_leaf=nnx_objects.is_node)
    if any(map(nnx_objects.is_node, leaves)):
        with tracing_call(
            step, args, dict(kwargs), mark=False, whole=whole
        ) as traced_and_finish:
            yield traced_and_finish
        return
    traced = function.trace(
        lambda args, kwargs: step(*args, **kwargs),
        (tuple(args), dict(kwargs)),
        lambda key_path: None,
        as_arrays=False,
    )
    yield traced, lambda out: out


class _Result:
    """What a traced method returned and changed, on its way out of the trace."""

    def __init__(self, whole: bool = False):
        self.whole = whole

    def split(self, context, nodes, out, given, graphdef):
        """Within the trace: the arrays of the result and of what changed."""
        is_node = nnx_objects.is_node
        out_nodes, others, self.joined = function.divided(out, is_node, is_node)
        self.graphdef, flat = context.flatten([nodes, out_nodes])
        # If only the values of variables changed, only those are written. That
        # matters where others cannot be: a teacher model that a loss closes over
        # belongs to an outer trace.
        self.whole |= bool(out_nodes) or nnx.graphdef(nodes) != graphdef
        if self.whole:
            return others, list(flat.leaves)
        changed = [
            (path[1:], after)
            for path, before, after in zip(flat.paths, given, flat.leaves, strict=True)
            if not _same(before, jax.tree.leaves(after))
        ]
        self.changed = [path for path, _ in changed]
        return others, [after for _, after in changed]

    def merge(self, nodes, out):
        """Outside of the trace: writes the changes; returns the result."""
        others, held = out
        out_nodes = ()
        if self.whole:
            with nnx.merge_context(_UPDATE, False) as merge:
                _, out_nodes = merge.unflatten(self.graphdef, held)
        else:
            changed = zip(self.changed, held, strict=True)
            nnx.update(nodes, nnx.from_flat_state(list(changed)))
        return self.joined(out_nodes, others)


def _same(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether two lists hold the very same arrays."""
    return len(before) == len(after) and all(map(operator.is_, before, after))

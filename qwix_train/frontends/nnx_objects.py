"""What NNX objects hold: modules, variables and arrays, found and put in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.trace import function

ATTACHED = "attached"
"""The metadata of a variable that is no param of the model's author."""


def is_node(value: Any) -> bool:
    """Whether a leaf of the arguments is an NNX object, not an array."""
    return _may_be_node(type(value)) and isinstance(value, nnx.Pytree | nnx.Variable)


@functools.cache
def _may_be_node(cls: type) -> bool:
    # NNX's instance checks look into tracers, which is slow for each leaf of a state.
    return issubclass(cls, nnx.Pytree | nnx.Variable | Tracer)


def modules_in(tree: Any) -> list[tuple[str, nnx.Module]]:
    """The NNX modules in a tree, each once, with their paths.

    The path of a module is that within the outermost module which holds it: the
    layers of `nnx.ModelAndOptimizer(model, tx)` have the paths that they have in
    `model`.
    """
    found: dict[int, tuple[str, nnx.Module]] = {}
    for leaf in jax.tree.leaves(tree, is_leaf=is_node):
        if not isinstance(leaf, nnx.Pytree):
            continue
        modules = list(nnx.iter_modules(leaf))  # type: ignore[arg-type]
        paths = {path for path, _ in modules}
        for path, module in modules:
            outermost = next(i for i in range(len(path) + 1) if path[:i] in paths)
            name = "/".join(map(str, path[outermost:]))
            found.setdefault(id(module), (name, module))
    return list(found.values())


def is_param(leaf: Any) -> bool:
    """Whether a leaf of an NNX object is a param.

    That is an `nnx.Param`, or an array of floats that the object holds as it is.
    """
    if isinstance(leaf, nnx.Variable):
        return isinstance(leaf, nnx.Param)
    is_array = function.is_array(leaf) or isinstance(leaf, np.ndarray)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def attached(value: Any) -> nnx.Variable[Any]:
    """A variable for what stands beside the params of a model, and says so of itself.

    Args:
      value: a float array, or its shape; or a variable that holds it.
    """
    variable = value if isinstance(value, nnx.Variable) else nnx.Param(value)
    variable.set_metadata(ATTACHED, True)
    return variable


def is_attached(leaf: Any) -> bool:
    """Whether a leaf of an NNX object is such a variable."""
    return isinstance(leaf, nnx.Variable) and leaf.get_metadata(ATTACHED, False)


def arrays_in(node: Any) -> list[Any]:
    """The arrays that an NNX object holds."""
    with nnx.split_context() as split:
        _, flat = split.flatten(node)
    return jax.tree.leaves(list(flat.leaves))


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A place in an object graph: within an attribute of one of its nodes.

    Attributes:
      owner: the node.
      path: the path to the place; that of the node, the attribute, and keys within.
      keys: the keys within the attribute, if that is a plain container.
    """

    owner: Any
    path: tuple[str, ...]
    attribute: str
    keys: tuple[Any, ...]

    def fill(self, value: Any) -> None:
        """Puts a value there."""
        if not self.keys:
            setattr(self.owner, self.attribute, value)
            return
        held = getattr(self.owner, self.attribute)
        flat, tree = jax.tree_util.tree_flatten_with_path(held, is_leaf=_is_whole)
        leaves = [value if key == self.keys else leaf for key, leaf in flat]
        setattr(self.owner, self.attribute, jax.tree.unflatten(tree, leaves))


def _is_whole(value: Any) -> bool:
    return function.is_stored(value) or is_node(value)


def _slots(root: Any) -> Iterator[tuple[_Slot, Any]]:
    """The places of a graph that hold variables, params or stored params."""
    for path, node in nnx.iter_graph(root):
        if not isinstance(node, nnx.Pytree):
            continue
        # Sorted, since a copy of a node has its attributes in another order.
        for attribute, held in sorted(vars(node).items()):
            if attribute.startswith("_pytree__"):
                continue
            flat, _ = jax.tree_util.tree_flatten_with_path(held, is_leaf=_is_whole)
            for keys, value in flat:
                is_held = function.is_stored(value) or is_param(value)
                if is_held or isinstance(value, nnx.Variable):
                    names = (*path, attribute, *function.param_path(keys))
                    yield _Slot(node, tuple(map(str, names)), attribute, keys), value


def variables_of(root: Any) -> dict[tuple[str, ...], nnx.Variable[Any]]:
    """The variables of a graph, by path."""
    return {
        slot.path: value
        for slot, value in _slots(root)
        if isinstance(value, nnx.Variable)
    }


def stored_params(root: Any) -> list[tuple[_Slot, Any]]:
    """The places of a graph that hold stored params, and these."""
    return [(slot, value) for slot, value in _slots(root) if function.is_stored(value)]


def replace_params(
    module: nnx.Module,
    values: Mapping[tuple[str, ...], Any],
    box: Callable[[Any, Any], Any],
    new_variable: Callable[[tuple[str, ...], Any], Any],
) -> None:
    """Puts stored params in the place of variables, wherever a module holds them.

    Args:
      module: the module, which is changed.
      values: the stored params, by path. A path that does not exist becomes a new
        attribute.
      box: puts the metadata of a variable around the value that takes its place.
      new_variable: gives what a new attribute holds, from its path and value.

    Raises:
      ValueError: if the module holds one of them in no variable.
    """
    check_in_variables(module, values)
    slots = list(_slots(module))
    new = {
        id(variable): box(values[slot.path], variable)
        for slot, variable in slots
        if slot.path in values
    }
    for slot, variable in slots:
        if id(variable) in new:
            slot.fill(new[id(variable)])
    for path in set(values) - {slot.path for slot, _ in slots}:
        put(module, path, new_variable(path, values[path]))


def check_in_variables(module: nnx.Module, paths: Collection[tuple[str, ...]]) -> None:
    """Complains of params that cannot be stored quantized.

    Args:
      module: the module.
      paths: the paths of the params that are to be.

    Raises:
      ValueError: if the module holds one of them in no variable.
    """
    for slot, held in _slots(module):
        if slot.path in paths and is_param(held) and not is_node(held):
            raise ValueError(
                f"{'/'.join(slot.path)!r} is an array that a "
                f"{type(slot.owner).__name__} holds as it is. Such a param can train "
                "quantized, but not be stored so: hold it in an nnx.Param(...)."
            )


def put(module: nnx.Module, path: tuple[str, ...], value: Any) -> None:
    """Puts a value at a path of a module.

    That is an attribute of one of its nodes; or, as in `nnx.bridge.ToNNX`, an entry of
    nested dictionaries that an attribute holds, which are made where they are missing.
    """
    owner, rest = _owner(module, path[:-1])
    name, *below = (*rest, path[-1])
    if isinstance(value, nnx.Variable):
        # `ToNNX` gives its variables to Linen by the names of their types.
        nnx.variable_name_from_type(type(value), allow_register=True)
    for key in reversed(below):
        value = {key: value}
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, nnx.data(value) if below else value)


def remove_params(module: nnx.Module, paths: Collection[tuple[str, ...]]) -> None:
    """Takes what holds variables from a module, by path."""
    for path in paths:
        owner, _ = _owner(module, path[:-1])
        if isinstance(owner, dict):
            del owner[path[-1]]
        else:
            delattr(owner, path[-1])


def _owner(node: Any, path: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """The last node or container on a path that exists, and what comes after it."""
    for index, name in enumerate(path):
        if isinstance(node, Mapping):
            child = node.get(name)
        elif isinstance(node, Sequence) or name.isdigit():
            child = node[int(name)]
        else:
            child = vars(node).get(name)
        if child is None:
            return node, path[index:]
        node = child
    return node, ()


def raw(variable: Any) -> Any:
    """What a variable holds; anything else as it is."""
    is_variable = isinstance(variable, nnx.Variable)
    return variable.get_raw_value() if is_variable else variable

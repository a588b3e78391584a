"""The state of an NNX model as a tree of params, and back.

Linen models and functions take their params as trees. NNX models hold theirs in
attributes, which are listed here in the same form: nested dictionaries by module path,
with a `WithAux` for each quantized param.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx, traverse_util

from qwix_train.core.qarray import WithAux
from qwix_train.trace.function import param_path
from qwix_train.values import stored

# What a model computes with: everything but its streams of random numbers.
_STATE = nnx.All(nnx.Variable, nnx.Not(nnx.RngState))


def to_tree(model: Any, kind: Any = _STATE) -> Any:
    """The state of a model as a tree, unboxed.

    Args:
      model: an NNX module; or a tree of params, which may be boxed.
      kind: an NNX filter, such as `nnx.Param`, for the variables to list. By default
        all but the random state, so that `nnx.BatchStat` is among them.

    Returns:
      A nested dictionary of arrays, with a `WithAux` for each quantized param. A
      variable that a module holds in several places is listed at the first of them, as
      in `nnx.state`.

    Example:
      >>> from flax import nnx
      >>> from qwix_train.ptq import to_tree
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> {name: array.shape for name, array in to_tree(model).items()}
      {'bias': (3,), 'kernel': (2, 3)}
    """
    if not isinstance(model, nnx.Module):
        return stored.unbox(model)
    # Where NNX lists a variable, and all that is around it there.
    listed = {
        tuple(map(str, path[:length]))
        for path, _ in nnx.to_flat_state(nnx.state(model, kind))
        for length in range(1, len(path) + 1)
    }
    flat: dict[tuple[str, ...], Any] = {}
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Pytree):
            continue
        held = {
            name: value
            for name, value in vars(node).items()
            if not name.startswith("_pytree__")
        }
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            held, is_leaf=lambda x: isinstance(x, WithAux | nnx.Variable | nnx.Pytree)
        )
        for keys, value in leaves:
            names = (*map(str, path), *param_path(keys))
            if isinstance(value, WithAux | nnx.Variable) and names in listed:
                flat[names] = stored.unbox(value)
    # The attributes of an `nnx.List` are the digits of its indices.
    return traverse_util.unflatten_dict(
        {
            tuple(int(name) if name.isdigit() else name for name in names): value
            for names, value in sorted(flat.items(), key=lambda item: item[0])
        }
    )


def plain(tree: Any) -> Any:
    """A tree of arrays alone, as `nnx.update` takes it.

    Args:
      tree: a nested dictionary with `WithAux` leaves; one becomes the dictionary
        `{"array": {"qvalue": ..., "scale": ...}}`.
    """
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if not isinstance(tree, WithAux):
        return tree
    if not isinstance(tree.array, stored.QUANTIZED_ARRAYS):
        return {"array": tree.array}
    return {"array": stored.parts(tree.array)}


def with_tree(model: nnx.Module, tree: Any) -> Any:
    """A copy of an NNX module with the state that a tree holds.

    Args:
      model: the module, which may be abstract.
      tree: as `to_tree` gives it.
    """
    graphdef, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, plain(tree))
    return nnx.merge(graphdef, state)

"""Compiles functions whose arguments are not all arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from qwix_train.trace import nnx as nnx_calls


class Compiled:
    """A function, compiled for each structure of its arguments.

    What is no array among the arguments (flags, strings) is part of the structure, so
    that a step with static arguments needs no more than it did. NNX objects among the
    arguments are updated, as `nnx.jit` does.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._compiled: dict[Any, tuple[Callable[..., Any], list[Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function, compiled."""
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=nnx_calls.is_node)
        is_input = [_is_input(leaf) for leaf in leaves]
        statics = tuple(
            None if given else leaf
            for leaf, given in zip(leaves, is_input, strict=True)
        )
        has_nodes = any(map(nnx_calls.is_node, leaves))
        key = (structure, tuple(is_input), statics, has_nodes)
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        function, layout = self._compiled[key]
        inputs = [leaf for leaf, given in zip(leaves, is_input, strict=True) if given]
        outs = function(inputs)
        out_structure, out_statics = layout
        rest = iter(outs)
        return jax.tree.unflatten(
            out_structure, [next(rest) if s is None else s[0] for s in out_statics]
        )

    def _compile(self, structure, is_input, statics, has_nodes):
        layout: list[Any] = []
        # `nnx.jit` walks over every input in Python, which takes it milliseconds.
        jit = nnx.jit if has_nodes else jax.jit

        @jit
        def function(inputs):
            rest = iter(inputs)
            leaves = [
                next(rest) if given else leaf
                for leaf, given in zip(statics, is_input, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, leaves)
            out = self._function(*args, **kwargs)
            outs, out_structure = jax.tree.flatten(out, is_leaf=nnx_calls.is_node)
            layout[:] = out_structure, [None if _is_input(x) else (x,) for x in outs]
            return [x for x in outs if _is_input(x)]

        return function, layout


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) or nnx_calls.is_node(leaf)

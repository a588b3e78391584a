"""Compiles functions whose arguments are not all arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from qwix_train.frontends import nnx_objects
from qwix_train.trace import bodies, jax_versions
from qwix_train.trace.function import divided


class Compiled:
    """A function, compiled for each structure of its arguments.

    Arguments that are not arrays (flags, strings) are part of the structure, so
    that a step with static arguments needs no more than it did. Numbers are inputs, as
    `jax.jit` has it, where the step does not take them as static; and inputs lie where
    the step says, by its `in_shardings`. NNX objects among the arguments are updated,
    as `nnx.jit` does.
    """

    def __init__(
        self, function: Callable[..., Any], step: Any = None, arguments_before: int = 0
    ):
        """Takes the function.

        Args:
          function: the function.
          step: a jitted step whose arguments the function takes. If None, numbers are
            part of the structure.
          arguments_before: how many arguments the function takes before those.
        """
        self._function = function
        self._step = step
        self._arguments_before = arguments_before
        # Which numbers the step takes as static, by the structure of its arguments.
        self._static_numbers: dict[Any, tuple[bool, ...]] = {}
        self._compiled: dict[Any, tuple[Callable[..., Any], list[Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function, compiled."""
        leaves, structure = jax.tree.flatten(
            (args, kwargs), is_leaf=nnx_objects.is_node
        )
        is_input = self._inputs(leaves, structure)
        statics = tuple(
            None if given else leaf
            for leaf, given in zip(leaves, is_input, strict=True)
        )
        has_nodes = any(map(nnx_objects.is_node, leaves))
        key = (structure, tuple(is_input), statics, has_nodes)
        inputs = [leaf for leaf, given in zip(leaves, is_input, strict=True) if given]
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key, inputs)
        function, layout = self._compiled[key]
        outs = function(inputs)
        statics, joined = layout
        return joined(outs, statics)

    def _inputs(self, leaves: list[Any], structure: Any) -> list[bool]:
        is_input = [_is_input(leaf) for leaf in leaves]
        numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _NUMBERS)]
        if not numbers or self._step is None:
            return is_input
        kinds = tuple(map(type, leaves))
        if (structure, kinds) not in self._static_numbers:
            self._static_numbers[structure, kinds] = tuple(
                self._takes_as_static(leaves, structure, i) for i in numbers
            )
        found = self._static_numbers[structure, kinds]
        for i, static in zip(numbers, found, strict=True):
            is_input[i] = not static
        return is_input

    def _takes_as_static(self, leaves: list[Any], structure: Any, index: int) -> bool:
        """Whether the step has a number among its static arguments.

        JAX has no public list of them. But what cannot be hashed is refused there with
        another error than elsewhere, before the step is traced.
        """
        changed = [*leaves[:index], _Unhashable(), *leaves[index + 1 :]]
        args, kwargs = jax.tree.unflatten(structure, changed)
        try:
            self._step.lower(*args[self._arguments_before :], **kwargs)
        except TypeError:  # It is not an array.
            return False
        except ValueError:  # It cannot be hashed.
            pass
        return True

    def _compile(self, structure, is_input, statics, has_nodes, inputs):
        layout: list[Any] = []

        def arguments(inputs):
            rest = iter(inputs)
            leaves = [
                next(rest) if given else leaf
                for leaf, given in zip(statics, is_input, strict=True)
            ]
            return jax.tree.unflatten(structure, leaves)

        def step(inputs):
            args, kwargs = arguments(inputs)
            return self._step(*args[self._arguments_before :], **kwargs)

        # `nnx.jit` walks over every input in Python, which takes it milliseconds.
        if has_nodes or self._step is None:
            jit = nnx.jit if has_nodes else jax.jit
        else:
            jit = functools.partial(
                jax.jit, in_shardings=(_in_shardings(step, inputs),)
            )

        @jit
        def function(inputs):
            args, kwargs = arguments(inputs)
            out = self._function(*args, **kwargs)
            outs, *layout[:] = divided(out, _is_input, nnx_objects.is_node)
            return outs

        return function, layout


def _in_shardings(step: Callable[..., Any], inputs: list[Any]) -> list[Any]:
    """The shardings that a jitted step asks for; None for an input without one."""
    traced = jax.make_jaxpr(step)(inputs).jaxpr
    shardings = {
        id(atom): sharding
        for eqn in traced.eqns
        if bodies.kind_of(eqn.primitive.name) is bodies.Kind.CALL
        for atom, sharding in zip(eqn.invars, eqn.params["in_shardings"], strict=True)
        if jax_versions.explicit_sharding(sharding)
    }
    return [shardings.get(id(var)) for var in traced.invars]


_NUMBERS = (bool, int, float, complex, np.generic)


class _Unhashable:
    __hash__ = None  # type: ignore[assignment]


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) or nnx_objects.is_node(leaf)

"""A call of a model that is to be converted: its trace, and the names of its ends."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train.core.shortened import shortened
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends import nnx_objects
from qwix_train.frontends.model import trace_function
from qwix_train.trace import function, subclasses


class ModelCall:
    """A call of a method of a model.

    Attributes:
      arrays: the arrays among its arguments, or their shapes, in order.
      traced: the traced call, and what makes the method's result of its own.
    """

    def __init__(
        self,
        model: Any,
        variables: Any,
        method: str | Callable[..., Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any],
    ):
        """Takes the call.

        Args:
          model: a Linen module, an NNX module, or a function of params and inputs.
          variables: the variables of a Linen model, or the params of a function.
          method: the method, by name or as a function.
          inputs: the arguments after the model, or the params.
          kwargs: the keyword arguments.

        Raises:
          TypeError: if the model is not a Flax module or a function.
          ValueError: if there are no arrays among the arguments, or they are for
            training.
        """
        self._model, self._variables = model, variables
        is_module = isinstance(model, nn.Module | nnx.Module)
        if not is_module and not callable(model):
            raise TypeError(
                f"Expected a Flax module or a function, got {shortened(model)}."
            )
        if not isinstance(inputs, Sequence):
            raise TypeError(
                "A signature is a method and a sequence of inputs, such as "
                f"('encode', (x,)); the inputs are of type {type(inputs).__name__}."
            )
        self._method = method
        for name in ("rngs", "mutable"):
            if isinstance(model, nn.Module) and name in kwargs:
                raise ValueError(
                    f"convert takes no {name}=: a converted model draws no random "
                    "numbers and updates no variables. Convert the call that evaluates "
                    "it, such as train=False or deterministic=True."
                )
        leaves, self._tree = jax.tree.flatten(
            (tuple(inputs), dict(kwargs)), is_leaf=nnx_objects.is_node
        )
        self._leaves = [_as_array(leaf) for leaf in leaves]
        self._places = [i for i, x in enumerate(self._leaves) if function.is_array(x)]
        self.arrays: list[Any] = [self._leaves[i] for i in self._places]
        if not self.arrays:
            raise ValueError(
                "convert needs inputs of the model, or their shapes: "
                "odml.convert(model, variables, rules, *inputs)."
            )
        self.traced: tuple[function.TracedCall, Callable[[Any], Any]] = self.trace(
            self.arrays
        )

    def trace(
        self, arrays: Sequence[Any]
    ) -> tuple[function.TracedCall, Callable[[Any], Any]]:
        """The traced call, and what makes the method's result of that of the trace.

        Args:
          arrays: the arrays among the arguments, or their shapes.

        Raises:
          ValueError: if an NNX model updates its variables.
        """
        leaves = list(self._leaves)
        for place, array in zip(self._places, arrays, strict=True):
            leaves[place] = array
        inputs, kwargs = jax.tree.unflatten(self._tree, leaves)
        model = self._model
        if isinstance(model, nnx.Module):
            return self._trace_nnx(inputs, kwargs)
        if isinstance(model, nn.Module):
            held = {k: v for k, v in self._variables.items() if k != "quant_stats"}
            apply = functools.partial(model.apply, method=self._method)
            with linen_calls.naming_missing_collections(
                model, held, inputs, {"method": self._method, **kwargs}
            ):
                traced = trace_function(apply, (held, *inputs), kwargs)
            name = getattr(self._method, "__name__", self._method)
            traced = dataclasses.replace(traced, method=name)
        else:
            traced = trace_function(self._called(), (self._variables, *inputs), kwargs)
        return traced, lambda out: out

    def _trace_nnx(self, inputs, kwargs):
        called, name = self._called(), type(self._model).__name__
        with nnx_calls.tracing_call(called, (self._model, *inputs), kwargs) as found:
            traced, finish = found

        def unwrap(out):
            (_, updates), _ = out
            if jax.tree.leaves(updates):
                raise ValueError(
                    f"{name} updates its variables, as in training, which a converted "
                    "model cannot: call model.eval() before."
                )
            return finish(out)

        return traced, unwrap

    def _called(self) -> Callable[..., Any]:
        """The function of the class, or the model itself."""
        if callable(self._method):
            return self._method
        if isinstance(self._model, nn.Module | nnx.Module):
            return getattr(subclasses.original(type(self._model)), self._method)
        if self._method != "__call__":
            raise ValueError(
                f"method={self._method!r}: a function has no methods. Give another "
                "function."
            )
        return self._model

    def batch_of(self, size: int) -> list[jax.ShapeDtypeStruct]:
        """The shapes of the arrays with another length of the batch.

        Args:
          size: the length of the first axis of each.

        Raises:
          ValueError: if they differ in their first axis.
        """
        lengths = {np.shape(x)[:1] for x in self.arrays}
        if len(lengths) > 1 or () in lengths:
            shapes = ", ".join(
                f"{name}: {np.shape(x)}"
                for name, x in zip(self.input_names(), self.arrays, strict=True)
            )
            raise ValueError(
                "dynamic_batch=True needs inputs whose first axis is that of the "
                f"batch, of one length; they have the shapes {shapes}."
            )
        return [
            jax.ShapeDtypeStruct((size, *np.shape(x)[1:]), x.dtype) for x in self.arrays
        ]

    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs: of the arguments, and of keys within."""
        called = self._called()
        try:
            parameters = list(inspect.signature(called).parameters.values())[1:]
        except (TypeError, ValueError):
            parameters = []
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        arguments = [
            f"args_{index}"
            if index >= len(parameters) or parameters[index].kind in variadic
            else parameters[index].name
            for index in range(len(self._leaves) + 1)
        ]
        inputs, kwargs = jax.tree.unflatten(self._tree, self._leaves)
        names = []
        for tree, name_of in ((inputs, lambda key: arguments[key.idx]), (kwargs, None)):
            for (first, *path), leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                if function.is_array(leaf):
                    name = first.key if name_of is None else name_of(first)
                    names.append("_".join([name, *function.param_path(path)]))
        return _distinct(names)

    def output_names(self) -> tuple[str, ...]:
        """The names of the outputs: `output_0`, or those of keys of dictionaries.

        Raises:
          ValueError: if an NNX model updates its variables.
        """
        traced, unwrap = self.traced
        count = len(traced.body.jaxpr.outvars)
        out = unwrap(traced.rebuild([_Place(i) for i in range(count)]))
        names = [f"output_{i}" for i in range(count)]
        for path, leaf in jax.tree_util.tree_flatten_with_path(out)[0]:
            if isinstance(leaf, _Place) and path:
                keys = "_".join(function.param_path(path))
                by_number = isinstance(path[0], jax.tree_util.SequenceKey)
                names[leaf.index] = f"output_{keys}" if by_number else keys
        return _distinct(names)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for an output."""

    index: int


def _as_array(leaf: Any) -> Any:
    """A leaf; a NumPy array as one of JAX, as it would count as a constant."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names, numbered where several are equal."""
    return tuple(
        f"{name}_{index}" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    )

"""What is trained, and how its model is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze

from qwix_train.core.shortened import shortened
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import random_keys
from qwix_train.frontends.model import trace_function
from qwix_train.trace.function import TracedCall, param_path
from qwix_train.values import stored

_NO_COLLECTIONS = ("params", "opt_state", "quant_stats")


class ModelCall(NamedTuple):
    """How the model of a state, or of params, is called.

    Attributes:
      function: the model as a function of what it takes first, and inputs.
      first: what it takes first: params, or variables.
      in_collection: whether that is variables.
      kwargs: keyword inputs that it needs.
    """

    function: Callable[..., Any]
    first: Any
    in_collection: bool
    kwargs: Mapping[str, Any]

    @property
    def params(self) -> Any:
        """The params that it takes."""
        return self.first["params"] if self.in_collection else self.first

    def traced(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> TracedCall:
        """A trace of the call, with the boxes of its params."""
        arguments = (self.first, *inputs)
        with self.naming_missing_collections(inputs, kwargs):
            traced = trace_function(self.function, arguments, {**self.kwargs, **kwargs})
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            self.params, is_leaf=stored.is_box
        )
        boxes = {param_path(path): leaf for path, leaf in leaves if stored.is_box(leaf)}
        return dataclasses.replace(traced, boxes=boxes)

    def naming_missing_collections(
        self, inputs: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """See `linen.naming_missing_collections`, of the call with these inputs."""
        return linen_calls.naming_missing_collections(
            getattr(self.function, "__self__", None),
            self.first,
            inputs,
            kwargs,
            "a train state with such a field, or variables instead of params: ",
        )


def model_call(target: Any, model: Any = None) -> ModelCall:
    """How the model of a target is called.

    Args:
      target: a train state; params, or variables.
      model: a Linen module or its `apply`, or a function, whose first argument is then
        the params of a state. None for a state whose `apply_fn` takes variables.

    Raises:
      TypeError: if there is no model.
    """
    if isinstance(model, nnx.Module):
        raise TypeError(
            "An NNX model holds its params, so it is what leaves are attached to: "
            "attach(model, rules, *inputs)."
        )
    if is_tree(target):
        if model is None:
            raise TypeError(
                "Expected a TrainState or an NNX model, or params and the model that "
                f"takes them, got {shortened(target)}: attach(params, rules, *inputs, "
                "model=model)."
            )
        whole = has_collections(target)
        variables = dict(target) if whole else {"params": target}
    else:
        if not hasattr(target, "params"):
            raise TypeError(
                f"{type(target).__name__} has no field params. Give its params and the "
                "model that takes them, attach(state.weights, rules, *inputs, "
                "model=model), or, for static ranges, step=train_step."
            )
        whole = model is None
        variables = {"params": target.params, **collections_of(target)}
        model = getattr(target, "apply_fn", None) if whole else model
    function = model.apply if isinstance(model, nn.Module) else model
    if not callable(function):
        raise TypeError(
            f"{type(target).__name__} has no apply_fn: give its model, "
            "attach(state, rules, *inputs, model=model), or, for static ranges, "
            "step=train_step."
        )
    others = [name for name in variables if name != "params"]
    if not isinstance(getattr(function, "__self__", None), nn.Module):
        first = variables if whole else variables["params"]
        return ModelCall(function, first, whole, {})
    # Layers such as dropout ask for a key; what they draw makes no leaf.
    kwargs: dict[str, Any] = {"rngs": random_keys.by_stream(None)}
    if others:
        kwargs["mutable"] = others
    return ModelCall(function, variables, True, kwargs)


def collections_of(state: Any) -> dict[str, Any]:
    """The collections of a train state but for the params, such as `batch_stats`.

    Args:
      state: a dataclass; the name of a field is that of the collection, by convention.
    """
    return {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name not in _NO_COLLECTIONS
        and isinstance(getattr(state, field.name), Mapping)
    }


def nnx_model(target: Any) -> nnx.Module | None:
    """The NNX model that a target is, or that an `nnx.ModelAndOptimizer` holds."""
    if isinstance(target, nnx.Optimizer):
        target = getattr(target, "model", target)
    return target if isinstance(target, nnx.Module) else None


def is_tree(target: Any) -> bool:
    """Whether a target is params or variables, and not a state or an NNX model."""
    is_state = dataclasses.is_dataclass(target) and hasattr(target, "replace")
    return not (is_state and not isinstance(target, type)) and nnx_model(target) is None


def check_target(target: Any) -> None:
    """Complains of what holds no params.

    Raises:
      TypeError: if it is not a train state, an NNX model or a tree of arrays.
    """
    is_leaf = target is None or jax.tree_util.all_leaves([target])
    if is_tree(target) and is_leaf and not hasattr(target, "shape"):
        raise TypeError(
            "Expected a train state, an NNX model, the variables of a Linen model, or "
            f"params, got {shortened(target)}."
        )


def check_beside(target: Any, model: Any, optimizer: Any) -> None:
    """Complains of a model beside an NNX model, and of an optimizer of no such model.

    Args:
      target: what leaves are attached to.
      model: the model that is given beside it, or None.
      optimizer: the optimizer that is given beside it, or None.

    Raises:
      TypeError: if there is one.
    """
    held = nnx_model(target)
    if held is not None and model is not None:
        raise TypeError(
            f"{shortened(target)} is the model that is called, so model= says nothing: "
            "leave it out."
        )
    if optimizer is None:
        return
    if held is None or not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            f"optimizer={shortened(optimizer)}: expected the nnx.Optimizer of an NNX "
            "model. A train state has its own, and params have none: leave it out."
        )
    if getattr(optimizer, "model", held) is not held:
        raise TypeError(
            "The nnx.ModelAndOptimizer that is given as optimizer= is that of another "
            "model."
        )


def has_collections(tree: Any) -> bool:
    """Whether a tree is the variables of a Linen model, and not params alone."""
    return hasattr(tree, "keys") and not {"params", "quant_stats"}.isdisjoint(
        tree.keys()
    )


def params_of(target: Any) -> Any:
    """The params of a state, an NNX model or variables, or params as they are.

    A state of one's own that calls them something else has none.
    """
    model = nnx_model(target)
    if model is not None:
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if has_collections(target):
        return target.get("params", {})
    return target if is_tree(target) else getattr(target, "params", {})


def frozen_like(tree: Any, new: Any) -> Any:
    """A dictionary, frozen if another is."""
    return freeze(new) if isinstance(tree, FrozenDict) else new

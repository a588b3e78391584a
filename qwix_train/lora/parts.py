"""The arrays of adapters: taken out of the params of a model, and checked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import unfreeze

from qwix_train.frontends.plan_of import plan_model
from qwix_train.lora.layout import AdapterLayout, find_layouts
from qwix_train.lora.provider import LoraProvider
from qwix_train.lora.train_state import LoraTrainState, by_path
from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import adapter_part
from qwix_train.planning.plan import Path
from qwix_train.ptq.trees import to_tree
from qwix_train.trace import subclasses

Layouts = Mapping[Path, AdapterLayout]
"""The layout of each adapter, by the path of its param."""


def split(
    model: Any,
    *inputs: Any,
    params: Any = None,
    variables: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, dict[Path, AdapterLayout]]:
    """Takes the params of a model with adapters apart.

    Args:
      model: what `apply_lora_to_model` gave: a Linen or an NNX module.
      *inputs: inputs of the model. Shapes (`jax.ShapeDtypeStruct`) will do: nothing is
        computed.
      params: the params of a Linen model, adapters among them.
      variables: the other collections of a Linen model, such as `batch_stats`.
      **kwargs: keyword inputs of the model.

    Returns:
      What `lora.init` gives: the adapters; the params of the base; and the layout of
      each adapter, by the path of its param. Trees of an NNX model are nested
      dictionaries, as `ptq.to_tree` gives them.

    Raises:
      TypeError: if the model is not one with adapters.
      ValueError: if an adapter is missing, or has another shape.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import LoraProvider, apply_lora_to_model
      >>> from qwix_train.lora import split
      >>> provider = LoraProvider(module_path=".*", rank=2, alpha=4.0)
      >>> model = apply_lora_to_model(nn.Dense(8), provider)
      >>> x = jnp.ones((1, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> adapters, base, layouts = split(model, x, params=params)
      >>> sorted(adapters), sorted(base), list(layouts)
      (['kernel_lora_a', 'kernel_lora_b'], ['bias', 'kernel'], [('kernel',)])
    """
    provider = provider_of(model)
    if isinstance(model, nnx.Module):
        if params is not None or variables is not None:
            raise TypeError("An NNX model holds its params: give inputs alone.")
        params = to_tree(model, nnx.Param)
    elif params is None:
        raise TypeError(
            "A Linen model holds no params: lora.split(model, *inputs, params=params)."
        )
    else:
        kwargs = {**kwargs, "variables": {**(variables or {}), "params": params}}
    planned = plan_model(model, provider.rules, *inputs, **kwargs)
    layouts = {path: layout for path, (layout, _) in find_layouts(planned).items()}
    parts = {path for layout in layouts.values() for path in layout.shapes}
    base, adapters = {}, {}
    for path, leaf in traverse_util.flatten_dict(unfreeze(params)).items():
        kind = adapters if tuple(map(str, path)) in parts else base
        kind[path] = leaf
    adapters = traverse_util.unflatten_dict(adapters)
    checked(adapters, layouts)
    return adapters, traverse_util.unflatten_dict(base), layouts


def provider_of(model: Any) -> LoraProvider:
    """The provider of a model with adapters.

    Raises:
      TypeError: if it is not a Flax module.
    """
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(f"Expected a Flax module, got {type(model).__name__}.")
    provider, _ = subclasses.mode(model) or (None, ())
    if not isinstance(provider, LoraProvider):
        raise TypeError(
            f"This {type(model).__name__} is no model with adapters, which "
            "apply_lora_to_model(model, LoraProvider(rules), ...) gives."
        )
    return provider


def layouts_of(value: Any) -> Layouts:
    """The layouts of a state, or layouts as they are.

    Args:
      value: a `LoraTrainState`, or layouts.

    Raises:
      TypeError: if it is neither.
    """
    if isinstance(value, LoraTrainState):
        return value.layouts
    got = f"got a {type(value).__name__}"
    if isinstance(value, Mapping):
        others = [x for x in value.values() if not isinstance(x, AdapterLayout)]
        if not others:
            return value
        got += f" that holds a {type(others[0]).__name__}"
    raise TypeError(
        "Expected a LoraTrainState or layouts, a mapping of paths to AdapterLayouts as "
        f"lora.init, lora.split and lora.read_manifest(path).layouts give it, {got}."
    )


def check_path(path: Any, call: str) -> None:
    """Complains of a path that is not one, as where arguments are in another order.

    Args:
      path: the path.
      call: how the function is called, for the error.

    Raises:
      TypeError: if it is not one.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Expected a path, got a {type(path).__name__}: {call}.")


def of_state(value: Any, given: Sequence[Any], call: str) -> tuple[Any, Layouts]:
    """Adapters and their layouts, from a state or from both.

    Args:
      value: a `LoraTrainState`, or adapters.
      given: the arguments after it: the layouts, if `value` is adapters.
      call: how the function is called, for the error.

    Raises:
      TypeError: if layouts are missing, or there is too much.
      ValueError: see `checked`.
    """
    if isinstance(value, LoraTrainState):
        if given:
            raise TypeError(f"A LoraTrainState holds its layouts: {call}(state).")
        value, layouts = value.params, value.layouts
    elif len(given) != 1:
        raise TypeError(
            f"Expected a LoraTrainState, or adapters and their layouts: {call}(state) "
            f"or {call}(adapters, layouts). Those of an NNX model, and its base, come "
            "from lora.split(model, *inputs)."
        )
    else:
        layouts = layouts_of(given[0])
    checked(value, layouts)
    return value, layouts


def checked(adapters: Any, layouts: Layouts) -> dict[Path, Any]:
    """The arrays of adapters, by path.

    Args:
      adapters: a nested dictionary of arrays.
      layouts: the layouts of the adapters.

    Raises:
      ValueError: if an array is missing, has no layout, or has another shape. The
        message names them.
    """
    parts = by_path(adapters)
    wanted = {
        path: (layout, shape)
        for layout in layouts.values()
        for path, shape in layout.shapes.items()
    }
    problems = {
        "Missing": without(wanted, parts),
        "Of no layout": without(parts, wanted),
        "Of other shapes": [
            f"{'/'.join(path)} has shape {tuple(parts[path].shape)}, and the adapter "
            f"of rank {layout.rank} of {'/'.join(layout.path)} {layout.shape} has "
            f"{shape}"
            for path, (layout, shape) in wanted.items()
            if path in parts and tuple(parts[path].shape) != shape
        ],
    }
    if said := listed(problems):
        hint = " Layouts and adapters come from one state, lora.init or lora.split."
        if any(not adapter_part(path) for path in parts if path not in wanted):
            hint = " Give adapters alone; lora.split takes them out of other params."
        raise ValueError(f"The adapters do not fit the layouts. {said}{hint}")
    return {path: parts[path] for path in wanted}


def without(paths: Iterable[Path], others: Collection[Path]) -> list[str]:
    """The paths that are not among others, as text."""
    return ["/".join(path) for path in paths if path not in others]


def listed(problems: Mapping[str, list[str]]) -> str:
    """The problems that some params have, each with some of these params."""
    found = {what: names for what, names in problems.items() if names}
    return " ".join(f"{what}: {plan_table.some(v, 3)}." for what, v in found.items())


def arrays_of(layout: AdapterLayout, parts: Mapping[Path, Any]) -> list[Any]:
    """``A``, ``B`` and perhaps the magnitude of an adapter."""
    return [parts[path] for path in layout.shapes]


def tree_of(parts: Mapping[Path, Any]) -> dict[str, Any]:
    """Adapters as a nested dictionary, from arrays by path."""
    return traverse_util.unflatten_dict(dict(parts))

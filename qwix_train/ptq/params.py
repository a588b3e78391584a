"""Quantizes trees of float params, for a model that runs on quantized ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

from qwix_train import stored
from qwix_train.core.qarray import WithAux
from qwix_train.model import quantize_fn, quantize_model, trace_function
from qwix_train.planning import Path, make_plan
from qwix_train.ptq import static_range, trees
from qwix_train.ptq.provider import PtqProvider
from qwix_train.rules import QuantizationRule
from qwix_train.trace.function import param_path


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = None,
    *,
    allow_extra_params: bool = False,
    donate: bool = False,
) -> Any:
    """Quantizes float params as a quantized model says. The model does not run.

    Args:
      params: a tree of float arrays, such as nested dictionaries, unboxed: the params
        of the float (or QAT) model, or any part of them, so that layers may be
        quantized one by one. Those of an NNX model are
        `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.
      abstract_quantized_params: the params of the quantized model, or their shapes:
        `jax.eval_shape(model.init, key, x)["params"]` for a Linen model; an NNX model
        itself, which may be abstract; for a function what `abstract_params` gives.
      quant_stats: the ranges of activations, for rules with `act_static_scale=True`:
        at the path of each module, for each operand such as `dot_general0_lhs`, the
        `count` of batches, and `sum_of_absmax`, or `sum_of_min` and `sum_of_max`.
      allow_extra_params: whether params that the quantized model does not have are
        left out. An error otherwise.
      donate: whether each float array is deleted once it is quantized, so that the
        float and the quantized tree together never take more than the float tree, the
        quantized tree, and the largest array.

    Returns:
      The quantized params: the same tree, with a `WithAux` for each array that is
      quantized, and the scales of `quant_stats`. For an NNX model a dictionary
      of arrays that `nnx.update(model, ...)` takes.

    Raises:
      TypeError: if a leaf of `params` is no array.
      ValueError: if a param is not one of the quantized model's, or has another shape,
        or if ranges are missing or empty.

    Example:
      >>> from jax import numpy as jnp
      >>> model = quantize_model(
      ...     nn.Dense(2), PtqProvider([QuantizationRule(weight_qtype="int8")])
      ... )
      >>> abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> quantized = quantize_params(params, abstract["params"])
      >>> quantized["kernel"].array.scale.shape
      (1, 2)
    """
    target = _flat(trees.to_tree(abstract_quantized_params))
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    quantized = []
    for key_path, param in leaves:
        names = param_path(key_path)
        if not isinstance(param, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(
                f"Param {'/'.join(names)!r} is a {type(param).__name__}, not an array. "
                "Unbox the params: flax.linen.unbox(params), or "
                "nnx.to_pure_dict(nnx.state(model, nnx.Param))."
            )
        if names in target:
            quantized.append(_quantized(names, param, target[names]))
        elif allow_extra_params:
            quantized.append(_LEFT_OUT)
        else:
            raise ValueError(_unknown(names, target))
        if donate and isinstance(param, jax.Array) and quantized[-1] is not param:
            jax.block_until_ready(quantized[-1])
            param.delete()
    tree = _pruned(jax.tree.unflatten(structure, quantized))
    for path, value in _static_ranges(quant_stats, target).items():
        tree = _inserted(tree, path, value)
    return (
        trees.plain(tree) if isinstance(abstract_quantized_params, nnx.Module) else tree
    )


def quantize(
    model: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    quant_stats: Any = None,
    donate: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Quantizes a model together with its params.

    Args:
      model: a Linen module, an NNX module, or a function whose first argument is a
        tree of params.
      params: its float params; for an NNX module, None stands for the ones it holds.
      rules: the rules.
      *inputs: inputs of the model. Shapes (`jax.ShapeDtypeStruct`) will do.
      variables: the other collections of a Linen model, such as `batch_stats`. If
        None, their shapes are found with `model.init`.
      quant_stats: see `quantize_params`.
      donate: see `quantize_params`.
      **kwargs: keyword inputs.

    Returns:
      The quantized model and its quantized params. An NNX model holds these; they are
      returned as a tree with `WithAux` leaves.

    Example:
      >>> from jax import numpy as jnp
      >>> rules = [QuantizationRule(weight_qtype="int8")]
      >>> layer, params = quantize(
      ...     lambda params, x: x @ params["w"], {"w": jnp.ones((4, 2))}, rules,
      ...     jnp.ones((1, 4)),
      ... )
      >>> layer(params, jnp.ones((1, 4))).round(1).tolist()
      [[4.0, 4.0]]
    """
    provider = PtqProvider(rules)
    options = {"quant_stats": quant_stats, "donate": donate}
    if isinstance(model, nnx.Module):
        quantized = quantize_model(model, provider, *inputs, **kwargs)
        if params is not None or quant_stats is not None:
            values = quantize_params(params or {}, quantized, **options)
            nnx.update(quantized, values)
        return quantized, trees.to_tree(quantized)
    if isinstance(model, nn.Module):
        quantized = quantize_model(model, provider)
        apply = functools.partial(model.apply, mutable=list(variables or ()), **kwargs)
        if variables is None:
            init = functools.partial(quantized.init, **kwargs)
            shapes = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
            return quantized, quantize_params(params, shapes, **options)
        first = {**variables, "params": params}
        shapes = abstract_params(apply, first, rules, *inputs)["params"]
        return quantized, quantize_params(params, shapes, **options)
    shapes = abstract_params(model, params, rules, *inputs, **kwargs)
    quantized = quantize_fn(model, provider)
    return quantized, quantize_params(params, shapes, **options)


def abstract_params(
    fn: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    *inputs: Any,
    **kwargs: Any,
) -> Any:
    """The shapes of the quantized params of a function, for `quantize_params`.

    Args:
      fn: a function whose first argument is a tree of params.
      params: its float params, or their shapes.
      rules: the rules.
      *inputs: its other arguments, or their shapes.
      **kwargs: its keyword arguments.

    Returns:
      The same tree of shapes, with a `WithAux` of shapes for each param that is
      quantized. A `params` collection is quantized within the dictionary that holds it.
    """
    provider = PtqProvider(rules)

    def shape(leaf):
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf

    params = jax.tree.map(shape, stored.unbox(params))
    traced = trace_function(fn, (params, *inputs), kwargs)
    plan = make_plan(traced, provider.rules)
    provider.check(plan)
    if not plan.quantized_ops:
        raise ValueError(plan.no_match_message())
    values = provider.store_params(traced, plan)
    in_collection = hasattr(params, "keys") and "params" in params.keys()
    values = {("params", *p) if in_collection else p: x for p, x in values.items()}
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    quantized = [values.pop(param_path(path), leaf) for path, leaf in leaves]
    tree = jax.tree.unflatten(structure, quantized)
    for path, value in values.items():  # static ranges
        tree = _inserted(tree, path, value)
    return tree


def _flat(tree: Any) -> dict[Path, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stored.is_quantized)
    return {param_path(path): leaf for path, leaf in leaves}


# Stands for a param that the quantized model does not have.
_LEFT_OUT = object()


def _pruned(tree: Any) -> Any:
    """A nested dictionary without what is left out, or would be empty."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: _pruned(value) for key, value in tree.items()}
    same = all(kept[key] is value for key, value in tree.items())
    left = {key: value for key, value in kept.items() if value is not _LEFT_OUT}
    if len(left) == len(tree) and same:
        return tree
    return left or _LEFT_OUT


def _inserted(tree: Any, path: Path, value: Any) -> Any:
    """A nested dictionary with another entry."""
    if not path:
        return value
    below = dict(tree)
    # The keys of some dictionaries, as those of an `nnx.List`, are integers.
    key = next((key for key in below if str(key) == path[0]), path[0])
    below[key] = _inserted(below.get(key, {}), path[1:], value)
    return below


def _quantized(names: Path, param: Any, target: Any) -> Any:
    if tuple(param.shape) != tuple(target.shape):
        raise ValueError(
            f"Param {'/'.join(names)!r} has shape {tuple(param.shape)}, and in the "
            f"quantized model {tuple(target.shape)}."
        )
    if not stored.is_quantized(target):
        return param
    return stored.quantize_param(param, target.how)


def _unknown(names: Path, flat: Mapping[Path, Any]) -> str:
    known = sorted({"/".join(path) for path in flat})
    return (
        f"Param {'/'.join(names)!r} is not one of the quantized model, which has "
        f"{', '.join(known[:8])}{' and more' if len(known) > 8 else ''}. Pass "
        "allow_extra_params=True to leave out what it does not have."
    )


def _static_ranges(quant_stats: Any, flat: Mapping[Path, Any]) -> dict[Path, Any]:
    """The scales and zero points that collected ranges give."""
    groups: dict[Path, dict[str, Any]] = {}
    for path, value in _flat(stored.unbox(quant_stats or {})).items():
        groups.setdefault(path[:-1], {})[path[-1]] = value
    ranges: dict[Path, Any] = {}
    for path, statistics in groups.items():
        scale = flat.get(static_range.scale_path(path))
        if not isinstance(scale, WithAux):
            raise ValueError(
                f"There are quant_stats for {'/'.join(path)!r}, and no rule of the "
                "quantized model gives that a static range."
            )
        ranges |= static_range.from_statistics(path, statistics, scale.how)
    return ranges

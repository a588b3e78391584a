"""Quantizes trees of float params, for a model that runs on quantized ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from jax.core import Tracer

from qwix_train.core.errors import located
from qwix_train.files.progress import tracked
from qwix_train.frontends.nested import WithLeaves, inserted
from qwix_train.planning import static_range
from qwix_train.planning.leaves import LEFT_OUT, Path
from qwix_train.ptq import given_scales, trees
from qwix_train.ptq.given_ranges import check_complete, given_ranges
from qwix_train.ptq.given_scales import GivenScales
from qwix_train.trace.function import param_path
from qwix_train.values import stored


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = None,
    *,
    allow_extra_params: bool = False,
    donate: bool = False,
) -> Any:
    """Quantizes float params as a quantized model says. The model does not run.

    A param that has a scale next to it, such as `kernel_scale` next to `kernel`, is
    quantized with exactly this scale. It was learned (see `attach`), or it is that of
    the grid on which an optimizer ends (`optim.proximal`). Learned scales of
    activations become static ranges. The quantized tree has no such leaves.

    Args:
      params: a tree of float arrays, such as nested dictionaries, unboxed: the params
        of the float (or QAT) model, or any part of them, so that you can quantize
        layers one by one. Those of an NNX model are
        `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.
      abstract_quantized_params: the params of the quantized model, or their shapes:
        what `ptq.abstract_params` gives, or for a Linen model
        `jax.eval_shape(model.init, key, x)["params"]`, and for an NNX model the model
        itself, which may be abstract. The params of a function may be any tree, such as
        a module of Equinox.
      quant_stats: the ranges of activations, for rules with `act_static_scale=True`:
        the `quant_stats` of a `calib.Calibrator`, or what `ranges(target, rules)` finds
        in a train state, a model or variables. At the path of each module there is an
        entry for each operand, such as `dot_general0_lhs`, with the `count` of batches,
        and `sum_of_absmax`, or `sum_of_min` and `sum_of_max`.
      allow_extra_params: whether params that the quantized model does not have are
        left out. An error otherwise.
      donate: whether each float array is deleted once it is quantized. Otherwise the
        whole float tree and the whole quantized tree are in memory in the end.

    Returns:
      The quantized params: the same tree, with a `WithAux` for each array that is
      quantized (packed, where the quantized model has it packed), and the scales of
      `quant_stats`. For an NNX model a dictionary of arrays that
      `nnx.update(model, ...)` takes.

    Raises:
      TypeError: if a leaf of `params` is not an array, `quant_stats` is not a nested
        dictionary, or the quantized params are given as a Linen model, a function, or
        the state of an NNX model.
      ValueError: if the quantized model does not have a param, or has it with another
        shape; if a param to quantize has an integer dtype; if a learned scale is
        missing, or is not finite; if the statistics of a range are empty, or the model
        does not have this range; or if all weights are there, but a range is missing.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import (
      ...     PtqProvider,
      ...     QuantizationRule,
      ...     quantize_model,
      ...     quantize_params,
      ... )
      >>> model = quantize_model(
      ...     nn.Dense(2), PtqProvider([QuantizationRule(weight_qtype="int8")])
      ... )
      >>> abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))
      >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> quantized = quantize_params(params, abstract["params"])
      >>> quantized["kernel"].array.scale.shape
      (1, 2)
    """
    static_range.check_quant_stats(quant_stats)
    return quantize_tree(
        params,
        abstract_quantized_params,
        quantized_leaf,
        lambda target: (quant_stats, {}),
        allow_extra_params=allow_extra_params,
        donate=donate,
    )


# Gives the quantized param. It takes its path, its float value, the param that the
# quantized model has there (which may be a `WithAux`), and the scales among the params.
QuantizeLeaf = Callable[[Path, Any, Any, GivenScales], Any]


def quantize_tree(
    params: Any,
    abstract_quantized_params: Any,
    quantize_leaf: QuantizeLeaf,
    finish: Callable[[Mapping[Path, Any]], tuple[Any, Mapping[Path, Any]]],
    *,
    allow_extra_params: bool = False,
    donate: bool = False,
) -> Any:
    """`quantize_params`, with another way to quantize one param.

    Args:
      params: see `quantize_params`.
      abstract_quantized_params: see `quantize_params`.
      quantize_leaf: quantizes a param, as `quantized_leaf` does.
      finish: called after the last param, with the params of the quantized model by
        path; gives the ranges of activations, as `quant_stats` of `quantize_params`,
        and values to put next to the params, by path.
      allow_extra_params: see `quantize_params`.
      donate: see `quantize_params`.
    """
    in_module = isinstance(abstract_quantized_params, nnx.Module)
    frozen, params = isinstance(params, FrozenDict), unfreeze(params)
    structure = jax.tree.structure(params, is_leaf=stored.is_whole)
    flat, target, given = by_path(params, abstract_quantized_params)
    # Two params may be the same array. It is deleted after it was read for both.
    last = {id(param): index for index, (_, param) in enumerate(flat)}
    quantized = []
    counted = tracked("quantizing params", flat, lambda leaf: "/".join(leaf[0]))
    for index, (names, param) in enumerate(counted):
        if names in given.used:
            quantized.append(LEFT_OUT)
        elif names in target:
            quantized.append(quantize_leaf(names, param, target[names], given))
        elif allow_extra_params:
            quantized.append(LEFT_OUT)
        else:
            raise ValueError(_unknown(names, target))
        if donate and last[id(param)] == index:
            _delete(param, quantized)
    if _is_float(target, flat):
        warnings.warn(
            "abstract_quantized_params holds no quantized param, so the params stay in "
            "float. Give those of the quantized model: "
            "ptq.abstract_params(model, params, rules, *inputs).",
            stacklevel=3,
        )
    quant_stats, added = finish(target)
    ranges = {**given_ranges(quant_stats, target), **given.ranges}
    check_complete({names for names, _ in flat}, ranges, target)
    tree = rebuilt(structure, quantized, {**ranges, **added})
    if in_module:
        return trees.plain(tree)
    return freeze(tree) if frozen else tree


class ByPath(NamedTuple):
    """Float params, with the params of a quantized model.

    Attributes:
      flat: the float params with their paths, in the order of their tree.
      target: the params of the quantized model, by path.
      given: the scales that are among the float params.
    """

    flat: list[tuple[Path, Any]]
    target: Mapping[Path, Any]
    given: GivenScales


def by_path(params: Any, abstract_quantized_params: Any) -> ByPath:
    """The params of a float and a quantized model by their paths.

    Args:
      params: see `quantize_params`.
      abstract_quantized_params: see there.

    Raises:
      TypeError: if a float param is not an array.
    """
    target = stored.by_path(_target(abstract_quantized_params))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=stored.is_whole)
    flat = [(param_path(key_path), param) for key_path, param in leaves]
    for names, param in flat:
        if not _is_static(param, target.get(names)):
            _check_array(names, param)
    return ByPath(flat, target, given_scales.among_params(dict(flat), target))


def quantized_leaf(names: Path, param: Any, target: Any, given: GivenScales) -> Any:
    """One param, quantized by rounding to the nearest codes.

    Args:
      names: its path.
      param: a float array, or the shape of one.
      target: what the quantized model has there.
      given: the scales that are among the params.

    Raises:
      ValueError: if it has another shape, or cannot be quantized.
    """
    if _is_static(param, target):
        return param
    if tuple(param.shape) != tuple(target.shape):
        raise ValueError(
            f"Param {'/'.join(names)!r} has shape {tuple(param.shape)}, and in the "
            f"quantized model {tuple(target.shape)}. Give the params of this model."
        )
    if not stored.is_quantized(target):
        return param
    if (quantized := given.quantized(names, param, target.how)) is None:
        given_scales.check_learned(names, target.how)
        with located(f"Param {'/'.join(names)!r}"):
            quantized = stored.quantize_param(param, target.how)
    return stored.packed_as(quantized, target)


def _target(quantized: Any) -> Any:
    """The params of a quantized model, or params that are given, as a tree."""
    if isinstance(quantized, nnx.State):
        raise TypeError(
            "The state of an NNX model does not say how its params are quantized. Give "
            "the quantized model itself."
        )
    # A function is a leaf. A module of Equinox can be called, too, but is a tree.
    function = callable(quantized) and jax.tree_util.all_leaves([quantized])
    if isinstance(quantized, nn.Module) or function:
        raise TypeError(
            "Expected the params of the quantized model, or their shapes, got "
            f"{type(quantized).__name__}: "
            "ptq.abstract_params(model, params, rules, *inputs)."
        )
    return trees.to_tree(quantized, nnx.Variable)


def _is_static(param: Any, target: Any) -> bool:
    """Whether a leaf is no array and the model uses it as it is, such as a function."""
    return param is target and not isinstance(param, jax.Array | np.ndarray)


def _check_array(names: Path, param: Any) -> None:
    if isinstance(param, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return
    name = "/".join(names)
    if stored.is_quantized(param):
        raise TypeError(f"Param {name!r} is quantized already. Give the float params.")
    hint = ""
    if stored.is_box(param):
        hint = (
            " Unbox the params: flax.linen.unbox(params), or "
            "nnx.to_pure_dict(nnx.state(model, nnx.Param))."
        )
    raise TypeError(f"Param {name!r} is a {type(param).__name__}, not an array.{hint}")


def _delete(param: Any, quantized: Sequence[Any]) -> None:
    """Frees a float array, unless it is one of the quantized params itself."""
    is_held = isinstance(param, jax.Array) and not isinstance(param, Tracer)
    if is_held and all(value is not param for value in quantized):
        jax.block_until_ready(quantized[-1])
        param.delete()


def rebuilt(structure: Any, leaves: Sequence[Any], added: Mapping[Path, Any]) -> Any:
    """A tree of params from its leaves, without those left out, and with added ones."""
    tree = jax.tree.unflatten(structure, leaves)
    if any(leaf is LEFT_OUT for leaf in leaves):
        tree = _pruned(tree)
        tree = {} if tree is LEFT_OUT else tree
    for path, value in added.items():
        tree = inserted(tree, path, value)
    return tree


def _pruned(tree: Any) -> Any:
    """A nested dictionary without what is left out, and without what that empties."""
    if isinstance(tree, WithLeaves):
        leaves = _pruned(tree.leaves)
        return tree.params if leaves is LEFT_OUT else WithLeaves(tree.params, leaves)
    if not isinstance(tree, Mapping):
        return tree
    kept = {key: _pruned(value) for key, value in tree.items()}
    left = {key: value for key, value in kept.items() if value is not LEFT_OUT}
    return left if left or not tree else LEFT_OUT


def _is_float(target: Mapping[Path, Any], flat: Sequence[tuple[Path, Any]]) -> bool:
    """Whether a target is the float model itself, without even adapters beside it."""
    is_quantized = any(map(stored.is_quantized, target.values()))
    return not is_quantized and target.keys() <= {path for path, _ in flat}


def _unknown(names: Path, flat: Mapping[Path, Any]) -> str:
    if (*names, "array", "qvalue") in flat:
        return (
            f"Param {'/'.join(names)!r} of the quantized model comes without how it is "
            "quantized. Give the NNX model itself, not its state."
        )
    known = sorted({"/".join(path) for path in flat}) or ["none"]
    return (
        f"Param {'/'.join(names)!r} is not one of the quantized model, which has "
        f"{', '.join(known[:8])}{' and more' if len(known) > 8 else ''}. Pass "
        "allow_extra_params=True to leave out what it does not have."
    )

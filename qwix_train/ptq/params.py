"""Quantizes trees of float params, for a model that runs on quantized ones."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import DenyList, FrozenDict, freeze, unfreeze
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.calib.ranges import collected_ranges
from qwix_train.core.errors import located
from qwix_train.core.how import needs_zero_point
from qwix_train.core.qarray import QArray, WithAux
from qwix_train.files.progress import tracked
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import random_keys
from qwix_train.frontends.model import quantize_fn, quantize_model, trace_function
from qwix_train.frontends.nested import WithLeaves, inserted
from qwix_train.frontends.other_methods import check_no_product_in_float, resolved
from qwix_train.frontends.plan_of import plan_model
from qwix_train.frontends.quant_stat import quant_stats_in
from qwix_train.planning import static_range
from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import LEFT_OUT, Leaf, Path, range_of, scale_path
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import checked_plan
from qwix_train.planning.quant_stats import is_of_gradient, states_in
from qwix_train.planning.rules import QuantizationRule, rule_of_range
from qwix_train.ptq import given_scales, trees
from qwix_train.ptq.given_scales import GivenScales
from qwix_train.ptq.provider import PtqProvider
from qwix_train.trace import subclasses
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
    quantized with exactly that: one that was learned (see `attach`), or
    that of the grid which an optimizer ends on (`optim.proximal`). Learned scales of
    activations become static ranges. These leaves are in no quantized tree.

    Args:
      params: a tree of float arrays, such as nested dictionaries, unboxed: the params
        of the float (or QAT) model, or any part of them, so that layers may be
        quantized one by one. Those of an NNX model are
        `nnx.to_pure_dict(nnx.state(model, nnx.Param))`.
      abstract_quantized_params: the params of the quantized model, or their shapes:
        `jax.eval_shape(model.init, key, x)["params"]` for a Linen model; an NNX model
        itself, which may be abstract; for a function what `abstract_params` gives.
        The params of a function may be any tree, such as a module of Equinox.
      quant_stats: the ranges of activations, for rules with `act_static_scale=True`:
        at the path of each module, for each operand such as `dot_general0_lhs`, the
        `count` of batches, and `sum_of_absmax`, or `sum_of_min` and `sum_of_max`. They
        are the `quant_stats` of a `calib.Calibrator`, or what `ranges(target, rules)`
        finds in a train state, a model or variables.
      allow_extra_params: whether params that the quantized model does not have are
        left out. An error otherwise.
      donate: whether each float array is deleted once it is quantized, so that the
        float and the quantized tree together never take more than the float tree, the
        quantized tree, and the largest array.

    Returns:
      The quantized params: the same tree, with a `WithAux` for each array that is
      quantized (packed, where the quantized model has it packed), and the scales of
      `quant_stats`. For an NNX model a dictionary of arrays that
      `nnx.update(model, ...)` takes.

    Raises:
      TypeError: if a leaf of `params` is not an array, `quant_stats` is not a nested
        dictionary, or the quantized params are given
        as a Linen model, a function, or the state of an NNX model.
      ValueError: if a param is not one of the quantized model's, or has another shape
        or an integer dtype; if a learned scale is missing, or is not finite; if the
        statistics of a range are empty, or of no range of the model's; or if all
        weights are there, and not the ranges that belong to them.

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


# What becomes of a param: from its path, its value, the param, which may be a
# `WithAux`, that the quantized model has there, and the scales among the params.
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
    # Two params may be one array, which is deleted after it was read for both.
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
            "float. Those of a model that is quantized are meant: "
            "jax.eval_shape(quantize_model(model, PtqProvider(rules)).init, key, x), "
            "or ptq.abstract_params(fn, params, rules, *inputs).",
            stacklevel=3,
        )
    quant_stats, added = finish(target)
    ranges = {**_static_ranges(quant_stats, target), **given.ranges}
    _check_ranges({names for names, _ in flat}, ranges, target)
    tree = _rebuilt(structure, quantized, {**ranges, **added})
    if in_module:
        return trees.plain(tree)
    return freeze(tree) if frozen else tree


class ByPath(NamedTuple):
    """Float params, next to what a quantized model has in their places.

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
            f"quantized model {tuple(target.shape)}."
        )
    if not stored.is_quantized(target):
        return param
    if (quantized := given.quantized(names, param, target.how)) is None:
        given_scales.check_learned(names, target.how)
        with located(f"Param {'/'.join(names)!r}"):
            quantized = stored.quantize_param(param, target.how)
    return stored.packed_as(quantized, target)


def quantize(
    model: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    quant_stats: Any = None,
    donate: bool = False,
    rngs: Any = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Quantizes a model together with its params.

    Args:
      model: a Linen module, an NNX module, or a function whose first argument is a
        tree of params.
      params: its float params; for an NNX module the ones that it is to have in the
        place of its own, as `nnx.to_pure_dict` gives them, or None.
      rules: the rules.
      *inputs: inputs of the model. Shapes (`jax.ShapeDtypeStruct`) will do.
      variables: the other collections of a Linen model, such as `batch_stats`. If
        None, the call makes them. Give those that only `init` makes.
      quant_stats: see `quantize_params`. If None, an NNX model has its own: what its
        `QuantStat`s have collected.
      donate: see `quantize_params`; without `params` it is the float arrays of the NNX
        module that are deleted.
      rngs: the random keys of a Linen model, such as `{"dropout": key}`; a keyword
        input of any other.
      **kwargs: keyword inputs. The method that `method` says of a Linen model is
        quantized, too.

    Returns:
      The quantized model and its quantized params. An NNX model holds these; they are
      returned as a tree with `WithAux` leaves.

    Raises:
      TypeError: see `quantize_params`.
      ValueError: if no rule matches; if params that the rules quantize did not come out
        quantized; see also `quantize_params`.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.ptq import quantize
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
    if rngs is not None and not isinstance(model, nn.Module):
        kwargs["rngs"] = rngs
    if isinstance(model, nnx.Module):
        if quant_stats is None:
            options["quant_stats"] = _own_ranges(model, rules)
        graphdef, held, rest = nnx.split(model, nnx.Param, ...)
        floats = nnx.to_pure_dict(held)
        if params is not None:
            floats = _updated(floats, params)
        # Its own params are quantized once, and not at all where others are given.
        abstract = nnx.merge(graphdef, jax.tree.map(_shape, held), rest)
        planned = plan_model(abstract, rules, *inputs, **kwargs)
        quantized = quantize_model(abstract, provider, *inputs, **kwargs)
        nnx.update(quantized, quantize_params(floats, quantized, **options))
        tree = trees.to_tree(quantized)
        _check_quantized(planned, tree)
        return quantized, tree
    if isinstance(model, nn.Module):
        method = resolved(subclasses.original(type(model)), kwargs.get("method"))
        methods = {"__call__", method if isinstance(method, str) else "__call__"}
        quantized = quantize_model(model, provider, methods=methods)
        if variables is None:
            made = linen_calls.abstract_variables(model, inputs, kwargs, rngs)
            _check_known(params, made.get("params", {}))
        others = {} if variables is None else variables
        # Without the other variables the call makes them, if it is one that does.
        mutable = DenyList("params") if variables is None else list(others)
        keys = random_keys.by_stream(rngs)
        call = functools.partial(quantized.apply, mutable=mutable, rngs=keys)
        first = {**others, "params": params}
        try:
            shapes, planned = _abstract(call, first, rules, inputs, kwargs)
        except Exception as error:
            if variables is None and len(made) > 1:
                names = sorted(name for name in made if name != "params")
                error.add_note(
                    f"The model has variables other than params ({', '.join(names)}). "
                    "ptq.quantize called it without them: give them as variables=."
                )
            raise
        check_no_product_in_float(type(model).__name__, planned)
        shapes = shapes["params"]
    else:
        quantized = quantize_fn(model, provider)
        shapes, planned = _abstract(model, params, rules, inputs, kwargs)
    tree = quantize_params(params, shapes, **options)
    _check_quantized(planned, tree)
    return quantized, tree


def _own_ranges(model: nnx.Module, rules: Sequence[QuantizationRule]) -> dict[str, Any]:
    """The ranges that an NNX model has collected and that rules ask for."""
    states = {}
    for path, stat in quant_stats_in(model):
        rule = rule_of_range(rules, path)
        if rule is not None and rule.static_act_ranges:
            states[path] = stat.get_value()
    return collected_ranges(states, rules)


def _check_known(params: Any, abstract: Any) -> None:
    """Complains of params that a model does not have.

    Args:
      params: the params that are given.
      abstract: those that the model makes.
    """
    known = stored.by_path(abstract)
    unknown = [
        path
        for path in stored.by_path(params)
        if path not in known and Leaf.parse(path, known) is None
    ]
    if unknown:
        has = plan_table.some(["/".join(path) for path in known]) or "no params"
        raise ValueError(
            f"Param {'/'.join(unknown[0])!r} is not one of the model, which has {has}. "
            "Give the params of this model alone."
        )


def _check_quantized(planned: Plan, tree: Any) -> None:
    """Complains of params that a plan quantizes and that are not quantized.

    Args:
      planned: the plan of the model.
      tree: its quantized params.
    """
    flat, prefix = stored.by_path(tree), _collection(tree)
    left = []
    for path, param in planned.params.items():
        leaf = flat.get((*prefix, *path))
        if param.how is None or stored.is_quantized(leaf):
            continue
        said = "missing" if leaf is None else f"a {type(leaf).__name__}"
        if leaf is not None and hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
            said = f"{leaf.dtype} of shape {tuple(leaf.shape)}"
        left.append(f"{'/'.join(path)} (is {said})")
    if left:
        raise ValueError(
            f"{len(left)} params that the rules quantize did not come out quantized: "
            f"{plan_table.some(left)}. Give the float params as the model takes them, "
            "each under a path of its own. To leave one in float, put a rule without "
            "weight_qtype for its module before the others."
        )


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
    return _abstract(fn, params, rules, inputs, kwargs)[0]


def _abstract(
    fn: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Any, Plan]:
    """What `abstract_params` gives, and the plan."""
    provider = PtqProvider(rules)
    params = jax.tree.map(_shape, stored.unbox(params))
    traced = trace_function(fn, (params, *inputs), kwargs)
    planned = checked_plan(provider, traced)
    values = provider.store_params(traced, planned)
    values = {(*_collection(params), *path): x for path, x in values.items()}
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    quantized = [values.pop(param_path(path), leaf) for path, leaf in leaves]
    # What is left is static ranges.
    return _rebuilt(structure, quantized, values), planned


def _collection(params: Any) -> Path:
    """Where the paths of params begin in a tree: in a collection, or at its root."""
    return ("params",) if hasattr(params, "keys") and "params" in params.keys() else ()


def _target(quantized: Any) -> Any:
    """The params of a quantized model, which it may be itself, as a tree."""
    if isinstance(quantized, nnx.State):
        raise TypeError(
            "The quantized params of an NNX model are given by the model itself. Its "
            "state does not say how they are quantized."
        )
    # A function is a leaf; a module of Equinox, which can be called, is a tree.
    function = callable(quantized) and jax.tree_util.all_leaves([quantized])
    if isinstance(quantized, nn.Module) or function:
        raise TypeError(
            "Expected the params of the quantized model, or their shapes, got "
            f"{type(quantized).__name__}. A Linen model has them in "
            'jax.eval_shape(model.init, key, x)["params"], a function in '
            "ptq.abstract_params(fn, params, rules, *inputs)."
        )
    return trees.to_tree(quantized, nnx.Variable)


def _shape(leaf: Any) -> Any:
    return stored.shape_of(leaf) if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _updated(tree: Any, other: Any) -> Any:
    """A nested dictionary with the entries of another one in the place of its own."""
    if not isinstance(tree, Mapping) or not isinstance(other, Mapping):
        return other
    below = {key: _updated(tree.get(key), value) for key, value in other.items()}
    return {**tree, **below}


def _is_static(param: Any, target: Any) -> bool:
    """Whether a leaf is what the model computes with as it is, such as a function."""
    return param is target and not isinstance(param, jax.Array | np.ndarray)


def _check_array(names: Path, param: Any) -> None:
    if isinstance(param, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return
    name = "/".join(names)
    if stored.is_quantized(param):
        raise TypeError(f"Param {name!r} is quantized already.")
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


def _rebuilt(structure: Any, leaves: Sequence[Any], added: Mapping[Path, Any]) -> Any:
    """A tree of params from its leaves, without those left out, and with others."""
    tree = jax.tree.unflatten(structure, leaves)
    if any(leaf is LEFT_OUT for leaf in leaves):
        tree = _pruned(tree)
        tree = {} if tree is LEFT_OUT else tree
    for path, value in added.items():
        tree = inserted(tree, path, value)
    return tree


def _pruned(tree: Any) -> Any:
    """A nested dictionary without what is left out, or would be empty."""
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


def _static_ranges(quant_stats: Any, flat: Mapping[Path, Any]) -> dict[Path, Any]:
    """The scales and zero points that collected ranges give."""
    ranges: dict[Path, Any] = {}
    for path, statistics in states_in(stored.unbox(quant_stats or {})).items():
        if is_of_gradient(path):  # in training alone
            continue
        # Params may stand in a collection, and the statistics in one of their own.
        places = [path, ("params", *path)]
        path = next((p for p in places if scale_path(p) in flat), path)
        scale = flat.get(scale_path(path))
        if not isinstance(scale, WithAux):
            raise ValueError(
                f"There are quant_stats for {'/'.join(path)!r}, and no rule of the "
                "quantized model gives that a static range."
            )
        ranges |= _range(path, statistics, scale)
    return ranges


def _stacked_as(
    wanted: tuple[int, ...], params: dict[Path, Any], num_layers: int
) -> dict[Path, Any]:
    """Ranges whose layers come first, stacked along the axis of the quantized model.

    One that all members of a `vmap` share is there for each of them.
    """
    ndim = len(wanted)
    for axis, length in enumerate(wanted):
        inner = wanted[:axis] + wanted[axis + 1 :]
        if all(x.shape == inner for x in jax.tree.leaves(params)):
            return jax.tree.map(
                lambda x, axis=axis, n=length: jnp.stack([x] * n, axis), params
            )
    if num_layers != 1 or any(np.ndim(x) != ndim for x in jax.tree.leaves(params)):
        return params
    for axis in range(ndim):
        moved = jax.tree.map(lambda x, axis=axis: jnp.moveaxis(x, 0, axis), params)
        if all(x.shape == wanted for x in jax.tree.leaves(moved)):
            return moved
    return params


def _range(
    path: Path, statistics: Mapping[str, Any], scale: WithAux
) -> dict[Path, Any]:
    """The scale and zero point of one range."""
    method = scale.how.calibration_method
    wanted = ["max", "min"] if needs_zero_point(method) else ["absmax"]
    given = sorted(end for _, end in static_range.ends_in(statistics))
    if not given and len(statistics) > 1:
        raise ValueError(
            f"The quant_stats of {'/'.join(path)!r} have {sorted(statistics)}, which "
            "are the data of an observer, and no range. Find the ranges with "
            "qwix_train.ranges(state, rules)."
        )
    if given != wanted:
        raise ValueError(
            f"The quant_stats of {'/'.join(path)!r} have the range {given}, and the "
            f"calibration method {method!r} takes {wanted}."
        )
    params = static_range.from_statistics(path, statistics, scale.how)
    params = _stacked_as(scale.shape, params, jnp.ndim(statistics["count"]))
    shape = params[scale_path(path)].shape
    # More than one entry along an axis is a finer range than was asked for.
    if len(shape) != len(scale.shape) or any(
        had > 1 and had != has for had, has in zip(scale.shape, shape, strict=True)
    ):
        raise ValueError(
            f"The quant_stats of {'/'.join(path)!r} give a range of shape {shape}; in "
            f"the quantized model it has {scale.shape}."
        )
    return params


def _check_ranges(
    names: Collection[Path], ranges: Mapping[Path, Any], target: Mapping[Path, Any]
) -> None:
    """Complains of ranges that are missing next to the params of a whole model."""
    quantized = {path: x for path, x in target.items() if stored.is_quantized(x)}
    weights = {path for path, x in quantized.items() if isinstance(x.array, QArray)}
    if not weights or not weights.issubset(names):
        return  # a part of a model, whose ranges may come with another
    missing = [
        "/".join(range_of(path))
        for path, x in quantized.items()
        if path not in weights and path not in ranges and not _is_known(x.array)
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} activations have a static range that is not known, among "
            f"them {missing[0]!r}. Pass the ranges as quant_stats: those of a "
            "Calibrator, of a train state, or of the QuantStat variables of an NNX "
            "model. Learned scales come with the params that have them."
        )


def _is_known(scale: Any) -> bool:
    """Whether the scale of a quantized model has a value already."""
    if isinstance(scale, Tracer):
        return True  # which cannot be told here
    return isinstance(scale, jax.Array) and not bool(jnp.isnan(scale).any())

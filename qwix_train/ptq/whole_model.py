"""Quantizes a model together with its params."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import DenyList

from qwix_train.calib.ranges import collected_ranges
from qwix_train.frontends import linen as linen_calls
from qwix_train.frontends import random_keys
from qwix_train.frontends.model import quantize_fn, quantize_model, trace_function
from qwix_train.frontends.other_methods import check_no_product_in_float, resolved
from qwix_train.frontends.plan_of import plan_model
from qwix_train.frontends.quant_stat import quant_stats_in
from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import checked_plan
from qwix_train.planning.rules import QuantizationRule, rule_of_range
from qwix_train.ptq import trees
from qwix_train.ptq.params import quantize_params, rebuilt
from qwix_train.ptq.provider import PtqProvider
from qwix_train.trace import subclasses
from qwix_train.trace.function import param_path
from qwix_train.values import stored


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
      params: its float params. For an NNX module None, for its own, or others in their
        place, as `nnx.to_pure_dict` gives them.
      rules: the rules.
      *inputs: inputs of the model. Shapes (`jax.ShapeDtypeStruct`) will do.
      variables: the other collections of a Linen model, such as `batch_stats`. You need
        them only if the model cannot make them when it is called.
      quant_stats: see `quantize_params`. If None, those that the `QuantStat`s of an NNX
        model have collected.
      donate: see `quantize_params`. Without `params`, the float arrays of the NNX
        module are deleted.
      rngs: the random keys of a Linen model, such as `{"dropout": key}`, which needs
        none. For any other model, a keyword input.
      **kwargs: keyword inputs. For a Linen model, `method` names the method that is
        called, and quantized, too.

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
    found = _abstract(model, params, rules, inputs, variables, rngs, kwargs)
    if isinstance(model, nnx.Module) and quant_stats is None:
        quant_stats = _own_ranges(model, rules)
    quantized = quantize_params(found.floats, found.params, quant_stats, donate=donate)
    if isinstance(model, nnx.Module):
        nnx.update(found.model, quantized)
        quantized = trees.to_tree(found.model)
    _check_quantized(found.plan, quantized)
    return found.model, quantized


def abstract_params(
    model: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    rngs: Any = None,
    **kwargs: Any,
) -> Any:
    """The shapes of quantized params, for `quantize_params` and `restore`.

    Nothing is computed. The arguments are those of `quantize`.

    Args:
      model: a Linen module, an NNX module, or a function whose first argument is a
        tree of params.
      params: its float params, or their shapes. If None, a Linen module has those that
        `init` makes, and an NNX module its own.
      rules: the rules.
      *inputs: inputs of the model, or their shapes.
      variables: see `quantize`.
      rngs: see `quantize`.
      **kwargs: keyword inputs; see `quantize`.

    Returns:
      The tree of `params` with shapes, and a `WithAux` of shapes for each param that is
      quantized. A `params` collection is quantized within the dictionary that holds it.
      For an NNX module the quantized module, whose params are shapes.

    Raises:
      TypeError: if a function comes without params.
      ValueError: if no rule matches, or the model does not have one of the params.

    Example:
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.ptq import abstract_params
      >>> rules = [QuantizationRule(weight_qtype="int8")]
      >>> abstract = abstract_params(nn.Dense(2), None, rules, jnp.ones((1, 4)))
      >>> abstract["kernel"].array.scale
      ShapeDtypeStruct(shape=(1, 2), dtype=float32)
    """
    if params is None and isinstance(model, nn.Module):
        made = linen_calls.abstract_variables(model, inputs, kwargs, rngs)
        params = made.get("params", {})
    return _abstract(model, params, rules, inputs, variables, rngs, kwargs).params


class _Abstract(NamedTuple):
    """A quantized model before its params are.

    Attributes:
      model: the quantized model.
      floats: its float params.
      params: the shapes of its quantized params, as `quantize_params` takes them.
      plan: its plan.
    """

    model: Any
    floats: Any
    params: Any
    plan: Plan


def _abstract(
    model: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    inputs: Sequence[Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    kwargs: dict[str, Any],
) -> _Abstract:
    """What is known of a quantized model from shapes; see `quantize`."""
    provider = PtqProvider(rules)
    if isinstance(model, nn.Module):
        return _abstract_linen(model, params, provider, inputs, variables, rngs, kwargs)
    if rngs is not None:
        kwargs = {**kwargs, "rngs": rngs}
    if isinstance(model, nnx.Module):
        graphdef, held, rest = nnx.split(model, nnx.Param, ...)
        floats = nnx.to_pure_dict(held)
        if params is not None:
            floats = _updated(floats, params)
        # Its own params are quantized once, and not at all where others are given.
        abstract = nnx.merge(graphdef, jax.tree.map(_shape, held), rest)
        plan = plan_model(abstract, rules, *inputs, **kwargs)
        quantized = quantize_model(abstract, provider, *inputs, **kwargs)
        return _Abstract(quantized, floats, quantized, plan)
    if params is None:
        raise TypeError(
            "A function holds no params: give them, or their shapes, after the model."
        )
    quantized = quantize_fn(model, provider)
    return _Abstract(
        quantized, params, *_shapes(model, params, provider, inputs, kwargs)
    )


def _abstract_linen(
    model: nn.Module,
    params: Any,
    provider: PtqProvider,
    inputs: Sequence[Any],
    variables: Mapping[str, Any] | None,
    rngs: Any,
    kwargs: dict[str, Any],
) -> _Abstract:
    method = resolved(subclasses.original(type(model)), kwargs.get("method"))
    methods = {"__call__", method if isinstance(method, str) else "__call__"}
    quantized = quantize_model(model, provider, methods=methods)
    made = {}
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
        with linen_calls.naming_missing_collections(model, first, inputs, kwargs):
            shapes, plan = _shapes(call, first, provider, inputs, kwargs)
    except Exception as error:
        names = sorted(name for name in made if name != "params")
        if names:
            error.add_note(
                f"The model has variables other than params ({', '.join(names)}), and "
                "was called without them: give them as variables=."
            )
        raise
    check_no_product_in_float(type(model).__name__, plan)
    return _Abstract(quantized, params, shapes["params"], plan)


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


def _shapes(
    fn: Any,
    params: Any,
    provider: PtqProvider,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
) -> tuple[Any, Plan]:
    """The shapes of the quantized params of a function, and the plan."""
    params = jax.tree.map(_shape, stored.unbox(params))
    traced = trace_function(fn, (params, *inputs), kwargs)
    planned = checked_plan(provider, traced)
    values = provider.store_params(traced, planned)
    values = {(*_collection(params), *path): x for path, x in values.items()}
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    quantized = [values.pop(param_path(path), leaf) for path, leaf in leaves]
    # What is left is static ranges.
    return rebuilt(structure, quantized, values), planned


def _collection(params: Any) -> Path:
    """Where the paths of params begin in a tree: in a collection, or at its root."""
    return ("params",) if hasattr(params, "keys") and "params" in params.keys() else ()


def _shape(leaf: Any) -> Any:
    return stored.shape_of(leaf) if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _updated(tree: Any, other: Any) -> Any:
    """A nested dictionary with the entries of another one in the place of its own."""
    if not isinstance(tree, Mapping) or not isinstance(other, Mapping):
        return other
    below = {key: _updated(tree.get(key), value) for key, value in other.items()}
    return {**tree, **below}

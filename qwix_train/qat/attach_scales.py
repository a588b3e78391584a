"""Learned scales for models and train states that are there already."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from jax import numpy as jnp

from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends import nnx_objects
from qwix_train.frontends.model import trace_function
from qwix_train.frontends.nested import inserted
from qwix_train.planning import learned_scale
from qwix_train.planning.leaves import Path
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.initial_scales import initial_leaves
from qwix_train.qat.provider import QtProvider
from qwix_train.qat.train_state import collections_of
from qwix_train.trace import subclasses
from qwix_train.trace.function import TracedCall, param_path
from qwix_train.values import stored


def attach_learned_scales(
    model: Any,
    params: Any,
    rules: Sequence[QuantizationRule],
    *inputs: Any,
    variables: Mapping[str, Any] | None = None,
    quant_stats: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Gives float params the scales that rules train.

    That is for rules with `weight_calibration_method="lsq"` or `"lsq+"`, and with
    `act_calibration_method="lsq"`, `"lsq+"` or `"pact"`. The scales become leaves among
    the params, so that the user's optimizer trains them and checkpoints hold them, and
    `quantize_params` stores exactly these: next to a `kernel` of shape `(rows, cols)`
    `kernel_scale`, of shape `(1, cols)`; for the activation that an op reads
    `dot_general0_lhs_scale`, of one element in as many axes as the activation has, with
    `"lsq+"` `dot_general0_lhs_offset`, too, and with `"pact"` `dot_general0_lhs_alpha`
    alone. Layers under `scan` have an axis in front. They are in float32 or wider. An
    array that several ops read alike, such as the input of query, key and value, has
    one range: its leaves stand under the name of the first of them, as `plan` says.

    A step trains them if it is wrapped with the same rules: the gradients are those of
    the papers, with LSQ's gradient scale ``1 / sqrt(N * Q_P)``. N is the number of
    elements that share the scale of a weight; of an activation the number of elements
    divided by the length of the first axis, which is taken for that of the batch. What
    else optimizers do is theirs: `learned_scale_mask` tells the leaves apart, such as
    for a weight decay of none, or, with PACT, for one of `alpha`.

    A weight's scale begins at LSQ's ``2 * mean(|w|) / sqrt(Q_P)``, or LSQ+'s
    ``max(|mean - 3 std|, |mean + 3 std|) / 2**(bits - 1)``. Those of activations begin
    with a range: what the `act_observer` of the rule measures in the inputs, or if it
    has none the same mean with `"lsq"`, the range of least squared error with `"lsq+"`,
    and the largest element with `"pact"`.

    Args:
      model: a Linen module, an NNX module, or a function whose first argument is a tree
        of params, such as the `apply_fn` of a train state.
      params: its float params; for a function its first argument, in which they may be
        a collection `params`. None for an NNX module, which holds them.
      rules: the rules, or a `QtProvider` with them.
      *inputs: inputs of the model: a batch of real data. Shapes will do if the ranges
        of activations are given, or none is trained.
      variables: the other collections of a Linen module, such as `batch_stats`.
      quant_stats: ranges of activations, such as those of a `calib.Calibrator(rules)`
        over several batches, in the place of what is measured in the inputs.
      **kwargs: keyword inputs.

    Returns:
      The params with the new leaves; those that are there already stay as they are.
      An NNX module is changed in place, and returned.

    Raises:
      ValueError: if no rule trains a scale; if an activation has no range, or PACT is
        to clip one that was seen to have negative elements; if a param is quantized
        already, or the model computes with one that has the name of a scale.
      TypeError: if there are shapes where real data is needed.

    References:
      LSQ: arXiv 1902.08153. LSQ+: arXiv 2004.09576. PACT: arXiv 1805.06085.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.qat import attach_learned_scales
      >>> model, x = nn.Dense(2), jnp.ones((8, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> rules = [QuantizationRule(weight_qtype="int4",
      ...     weight_calibration_method="lsq", act_qtype="int8",
      ...     act_calibration_method="lsq")]
      >>> params = attach_learned_scales(model, params, rules, x)
      >>> params["kernel_scale"].shape, params["dot_general0_lhs_scale"].shape
      ((1, 2), (1, 1))
    """
    provider = rules if isinstance(rules, QtProvider) else QtProvider(rules)
    if not any(rule.learns_scales for rule in provider.rules):
        raise ValueError(
            "No rule trains a scale. Set weight_calibration_method='lsq' or 'lsq+' "
            "next to a weight_qtype, or act_calibration_method='lsq', 'lsq+' or 'pact' "
            "next to an act_qtype."
        )
    leaves = functools.partial(_leaves, provider, quant_stats)
    if isinstance(model, nnx.Module):
        if params is not None:
            raise ValueError(
                "An NNX module holds its params: give None for them, "
                "attach_learned_scales(model, None, rules, *inputs)."
            )
        method = subclasses.original(type(model)).__call__
        call = (method, (model, *inputs), kwargs)
        with nnx_calls.tracing_call(*call) as (traced, _):
            boxes = nnx_objects.variables_of(model)
            found = leaves(dataclasses.replace(traced, boxes=boxes))
        nnx_objects.replace_params(model, found, stored.box, provider.variable)
        return model
    if isinstance(model, nn.Module):
        others = dict(variables or {})
        apply = functools.partial(model.apply, mutable=list(others), **kwargs)
        first = {**others, "params": params}
        return _attached(apply, first, inputs, {}, leaves)["params"]
    return _attached(model, params, inputs, kwargs, leaves)


def with_learned_scales(
    state: Any,
    rules: Sequence[QuantizationRule],
    *inputs: Any,
    quant_stats: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Gives a train state the scales that rules train, in the middle of training, too.

    Its `params` get the leaves of `attach_learned_scales`, and its `opt_state` that of
    these leaves at their start; what it holds for params that were there before stays.

    Args:
      state: a `TrainState`, of a class of your own, too. Its other collections, such as
        `batch_stats`, go into the call of the model under the names of its fields.
      rules: the rules, or a `QtProvider` with them.
      *inputs: see `attach_learned_scales`.
      quant_stats: see `attach_learned_scales`.
      **kwargs: keyword inputs.

    Returns:
      The state, of the same class.

    Raises:
      TypeError: if `state` is no such object.
      ValueError: see `attach_learned_scales`; or if the optimizer's state of the params
        that were there has no place in that of the new ones.

    Example:
      >>> import jax
      >>> import optax
      >>> from flax import linen as nn
      >>> from flax.training.train_state import TrainState
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.qat import with_learned_scales
      >>> model, x = nn.Dense(2), jnp.ones((8, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=optax.adam(0.1)
      ... )
      >>> rules = [QuantizationRule(
      ...     weight_qtype="int4", weight_calibration_method="lsq")]
      >>> state = with_learned_scales(state, rules, x)
      >>> sorted(state.opt_state[0].mu)
      ['bias', 'kernel', 'kernel_scale']
    """
    fields = ("apply_fn", "params", "tx", "opt_state", "replace")
    if isinstance(state, nnx.Module) or not all(hasattr(state, f) for f in fields):
        raise TypeError(
            f"Expected a TrainState, got {type(state).__name__}. Give an NNX model to "
            "attach_learned_scales before its optimizer is made, and for a state of "
            "another kind its params."
        )
    variables = {"params": state.params, **collections_of(state)}
    options = {"quant_stats": quant_stats, **kwargs}
    new = attach_learned_scales(state.apply_fn, variables, rules, *inputs, **options)
    params = new["params"]
    opt_state = _carried_over(state.opt_state, state.tx.init(params))
    return state.replace(params=params, opt_state=opt_state)


def learned_scale_mask(params: Any) -> Any:
    """Which leaves of params are learned scales, for `optax.masked` and the like.

    Args:
      params: a tree of params.

    Returns:
      The same tree with a bool at each leaf: whether it is the scale of a param beside
      it, or a scale, offset or clipping level of an activation.

    Example:
      >>> from qwix_train.qat import learned_scale_mask
      >>> learned_scale_mask({"kernel": 1.0, "kernel_scale": 0.1, "scale": 1.0})
      {'kernel': False, 'kernel_scale': True, 'scale': False}
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [param_path(key_path) for key_path, _ in leaves]
    known = set(paths)
    is_learned = [learned_scale.trained_leaf(path, known) is not None for path in paths]
    return jax.tree.unflatten(structure, is_learned)


def _leaves(
    provider: QtProvider, quant_stats: Mapping[str, Any] | None, traced: TracedCall
) -> dict[Path, Any]:
    plan = provider.plan(traced)
    provider.check(plan)
    if not provider.matches(plan):
        raise ValueError(provider.no_match_message(plan))
    return initial_leaves(traced, plan, provider.rules, quant_stats)


def _attached(
    function: Callable[..., Any],
    params: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaves_of: Callable[[TracedCall], dict[Path, Any]],
) -> Any:
    traced = trace_function(function, (params, *inputs), dict(kwargs))
    in_collection = hasattr(params, "keys") and "params" in params.keys()
    held = params["params"] if in_collection else params
    flat, _ = jax.tree_util.tree_flatten_with_path(held, is_leaf=stored.is_box)
    boxes = {param_path(path): leaf for path, leaf in flat if stored.is_box(leaf)}
    tree = params
    for path, value in leaves_of(dataclasses.replace(traced, boxes=boxes)).items():
        tree = inserted(tree, ("params", *path) if in_collection else path, value)
    if isinstance(params, FrozenDict):
        return freeze(tree)
    return _as_before(held, tree, in_collection)


def _as_before(held: Any, tree: Any, in_collection: bool) -> Any:
    """The params frozen, if they were, in a dictionary that is not."""
    if in_collection and isinstance(held, FrozenDict):
        return {**tree, "params": freeze(tree["params"])}
    return tree


def _carried_over(old: Any, new: Any) -> Any:
    """The state of an optimizer for more params, with what it had before.

    Raises:
      ValueError: if some of what it had has no place in it.
    """
    before = dict(_by_path(old))
    leaves = []
    for path, leaf in _by_path(new):
        held = before.pop(path, leaf)
        if jnp.shape(held) != jnp.shape(leaf):
            raise _lost(
                path,
                f"has shape {jnp.shape(held)}, and with the learned "
                f"scales {jnp.shape(leaf)}",
            )
        leaves.append(held)
    if before:
        raise _lost(next(iter(before)), "has no place in it with the learned scales")
    return jax.tree.unflatten(jax.tree.structure(new), leaves)


def _lost(path: str, reason: str) -> ValueError:
    return ValueError(
        f"The state of the optimizer cannot be carried over: opt_state{path} {reason}. "
        "Attach the scales before training, or begin with a new opt_state: "
        "params = attach_learned_scales(...), state.tx.init(params)."
    )


def _by_path(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]

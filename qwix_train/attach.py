"""The leaves that rules need beside the params: attached, listed, and taken off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train.calib.observe import Observed, RangeTagging
from qwix_train.core.operands import is_concrete
from qwix_train.core.shortened import shortened
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends import nnx_objects, random_keys
from qwix_train.frontends.model import (
    hold_params,
    run_quantized,
)
from qwix_train.frontends.nested import inserted, removed
from qwix_train.frontends.step_models import as_model
from qwix_train.frontends.targets import (
    ModelCall,
    check_beside,
    check_target,
    is_tree,
    model_call,
    nnx_model,
    params_of,
)
from qwix_train.planning import static_range
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.provider import QuantizationProvider, checked_plan
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.qat.initial_scales import initial_leaves, learned_paths
from qwix_train.qat.provider import QtProvider
from qwix_train.qat.state import held_states, with_states
from qwix_train.qat.train_state import carried_over, with_params
from qwix_train.trace import subclasses
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


def attach(
    target: Any,
    rules: Sequence[QuantizationRule] | QuantizationProvider | Any,
    *inputs: Any,
    model: Any = None,
    step: Callable[..., Any] | None = None,
    optimizer: nnx.Optimizer[Any] | None = None,
    rng: Any = None,
    quant_stats: Mapping[str, Any] | None = None,
    donate: bool = False,
    **kwargs: Any,
) -> Any:
    """Gives a train state, params or a model every leaf that rules need.

    * **Statistics of ranges**, for rules with `act_static_scale=True`. They start
      empty, and `wrap_train_step` updates them. A train state has them in a field
      `quant_stats`. An NNX model has a `QuantStat` in the module of each op. Variables
      of a Linen model have a collection `quant_stats`, which a model of
      `quantize_model` updates.
    * **Scales that are trained**, for rules with `weight_calibration_method="lsq"` or
      `"lsq+"`, or with `act_calibration_method="lsq"`, `"lsq+"` or `"pact"`. They are
      params: the optimizer trains them, checkpoints hold them, and `quantize_params`
      stores exactly these. They are in float32 or wider.
    * **Adapters**, for `LoraRule`s, beside a base that the rules may quantize. A train
      state becomes a `LoraTrainState`: its params are the adapters, and its float step
      trains them as it is. An NNX model runs with them at once. The params of a Linen
      model are for `apply_lora_to_model(model, LoraProvider(rules))`.
    * **Grids**, for an optimizer with `optim.proximal`. `attach(params, opt_state)`
      puts their scales beside the params, as `<param>_scale` and, if the grid has zero
      points, `<param>_zero_point`. Export then uses this grid, and finds no other.

    A leaf that is there already stays as it is. So does what an optimizer knows of the
    params; for a new param it starts anew. `attached` lists leaves, `ranges` reads
    ranges, and `detach` takes leaves off.

    **Names of trained scales.** Next to a `kernel` of shape `(rows, cols)` stands
    `kernel_scale`, of shape `(1, cols)`. For the activation that an op reads there is
    `dot_general0_lhs_scale`, of one element in as many axes as the activation has. With
    `"lsq+"` there is also `dot_general0_lhs_offset`, and with `"pact"` only
    `dot_general0_lhs_alpha`. Layers under `scan` have an axis in front. Several ops may
    read one array alike, such as query, key and value: it has one range, under the name
    of the first op, as `plan` says.

    **Where they begin.** A weight's scale begins at LSQ's
    ``2 * mean(|w|) / sqrt(Q_P)``, or LSQ+'s
    ``max(|mean - 3 std|, |mean + 3 std|) / 2**(bits - 1)``. The scale of an activation
    begins with the range that the rule's `act_observer` measures in the inputs. Without
    one, `"lsq"` takes the same mean, `"lsq+"` the range of least squared error, and
    `"pact"` the largest element.

    **Gradients** are those of the papers, with LSQ's gradient scale
    ``1 / sqrt(N * Q_P)``. For a weight, N is the number of elements that share the
    scale. For an activation it is the number of elements divided by the length of the
    first axis, which counts as that of the batch. `qat.learned_scale_mask` tells these
    leaves apart for the optimizer. So they can go without weight decay, or, with PACT,
    `alpha` can have its own.

    Args:
      target: a `TrainState`, of a class of your own, too, or another dataclass with a
        method `replace`; an NNX model, or an `nnx.ModelAndOptimizer`, which is changed
        in place; params, or the variables of a Linen model.
      rules: what asks for the leaves: the rules, or a provider such as
        `QtProvider(rules)` or `LoraProvider(rules)`; or the state of an optimizer.
      *inputs: inputs of the model. Shapes will do, but not where activations are
        measured. With `step`, what the step takes after the state.
      model: for params, the Linen module or the function that takes them. A state needs
        it if its `apply_fn` does not take variables, `{"params": state.params}` and the
        other collections of the state. Then `model` is a function whose first argument
        is `state.params`.
      step: the step, if you do not have the inputs of the model, or if the step calls
        it in another way. For statistics of ranges alone. It is traced, not run.
      optimizer: the optimizer of an NNX model, which is changed in place, too.
      rng: a random key, for adapters.
      quant_stats: the ranges that scales of activations begin with, such as those of a
        `calib.Calibrator(rules)` over several batches. If None, they are measured in
        the inputs.
      donate: for adapters: whether each float array is deleted once it is quantized.
      **kwargs: keyword inputs.

    Returns:
      The target with the leaves: the state (of a subclass, if its class has no field
      for them), the params or variables, or the NNX model that was changed. An
      optimizer without a state, `opt_state=()`, gets one. For adapters of a large base,
      that saves the memory of the moments that `TrainState.create` makes for the base.

    Raises:
      TypeError: if the target has no model, or none is given; if shapes are given where
        real data is needed; if `rng` is no random key; if an argument is given that
        has no use, such as an `optimizer` with a train state.
      ValueError: if the rules need no leaf, or match no op; if a `LoraRule` matches no
        weight; if an activation has no range, or PACT is to clip one that was seen to
        have negative elements; if a param is quantized already, or the model computes
        with one that has the name of a leaf; if what the optimizer knows has no place
        in its new state.

    References:
      LSQ: arXiv 1902.08153. LSQ+: arXiv 2004.09576. PACT: arXiv 1805.06085. LoRA: arXiv
      2106.09685.

    Example:
      >>> import jax
      >>> import optax
      >>> from flax import linen as nn
      >>> from flax.training.train_state import TrainState
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, attach, attached
      >>> model, x = nn.Dense(2), jnp.ones((8, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=optax.adam(0.1)
      ... )
      >>> rule = QuantizationRule(
      ...     weight_qtype="int4", weight_calibration_method="lsq",
      ...     act_qtype="int8", act_static_scale=True,
      ... )
      >>> state = attach(state, [rule], x)
      >>> for path, leaf in attached(state).items():
      ...     print(path, leaf)
      dot_general0_lhs range of 0 batches
      kernel_scale float32[1,2]
      >>> sorted(state.opt_state[0].mu)
      ['bias', 'kernel', 'kernel_scale']
    """
    if not _are_rules(rules):
        return _with_grids(target, rules, alone=not (inputs or kwargs or model))
    provider = _provider_of(rules)
    _check_needs(provider, "attach")
    of_adapters = {"rng": rng is not None, "donate": donate}
    _check_asked(provider, inputs, kwargs, step, quant_stats, of_adapters)
    check_beside(target, model, optimizer)
    states = {}
    if provider.keeps_quant_stats:
        states = _empty_states(target, provider, model, step, inputs, kwargs)
    store = provider.store_params
    if quant_stats is not None:
        store = functools.partial(initial_leaves, quant_stats=quant_stats)
    held = nnx_model(target)
    if provider.adds_params and held is not None:
        optimizer = target if optimizer is None else optimizer
        rngs = rng
        if provider.stores_params:
            _check_no_optimizer(optimizer)
            is_key = not isinstance(rng, nnx.Rngs)
            rngs = nnx.Rngs(random_keys.checked(rng, "rng")) if is_key else rng
        traced = _nnx_call(held, inputs, kwargs)
        hold_params(held, provider, store, traced, checked_plan(provider, traced), rngs)
        if provider.stores_params:
            run_quantized(held, provider, ("__call__",))
        _carry_over(optimizer, held)
    elif provider.adds_params:
        call = model_call(target, model)
        if provider.stores_params:
            given = {**call.kwargs, **kwargs}
            with call.naming_missing_collections(inputs, kwargs):
                return _with_adapters(
                    target, provider, call, rng, inputs, given, donate
                )
        traced = call.traced(inputs, kwargs)
        leaves = store(traced, checked_plan(provider, traced))
        target = with_params(target, _inserted(call.params, leaves))
    return with_states(target, states) if states else target


def detach(
    target: Any,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    *inputs: Any,
    model: Any = None,
    optimizer: nnx.Optimizer[Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Takes off the leaves that `attach` gave, so that the float loop goes on.

    Those are statistics of ranges, and scales that are trained. What an optimizer knows
    of the other params stays. Read `ranges` before. Adapters leave by `lora.merge`,
    which puts them into their base, or `lora.split`, which takes the two apart.

    Args:
      target: see `attach`. NNX models are changed in place.
      rules: the rules, or the provider, that `attach` was given.
      *inputs: inputs of the model, or their shapes, where scales are trained: a model
        may compute with a param of its own that has the name of one.
      model: see `attach`.
      optimizer: see `attach`.
      **kwargs: keyword inputs.

    Returns:
      The target without the leaves: what `attach` was given, with the params of now.

    Raises:
      TypeError: if inputs are needed and none are given; if the target holds no
        params; if an argument is given that has no use.
      ValueError: if the rules are for adapters, or need no leaf.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, attach, detach
      >>> model, x = nn.Dense(2), jnp.ones((8, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> rules = [
      ...     QuantizationRule(weight_qtype="int4", weight_calibration_method="lsq")
      ... ]
      >>> params = attach(params, rules, x, model=model)
      >>> sorted(params), sorted(detach(params, rules, x, model=model))
      (['bias', 'kernel', 'kernel_scale'], ['bias', 'kernel'])
    """
    provider = _provider_of(rules)
    if provider.stores_params:
        raise ValueError(
            f"{type(provider).__name__} has quantized the base, so there are no float "
            "params to go back to. Put adapters into their base with lora.merge, or "
            "take the two apart with lora.split."
        )
    _check_needs(provider, "detach")
    check_target(target)
    check_beside(target, model, optimizer)
    held, paths = nnx_model(target), set()
    if provider.adds_params:
        if not inputs and not kwargs:
            raise TypeError(
                "Which params are trained scales is seen in the call of the model: "
                "detach(state, rules, *inputs)."
            )
        if held is not None:
            traced = _nnx_call(held, inputs, kwargs)
        else:
            traced = model_call(target, model).traced(inputs, kwargs)
        paths = learned_paths(traced, provider.plan(traced))
    if held is not None:
        nnx_objects.remove_params(held, paths)
        _carry_over(target if optimizer is None else optimizer, held, fewer=True)
    elif paths:
        params = functools.reduce(removed, paths, params_of(target))
        target = with_params(target, params, fewer=True)
    return with_states(target, {})


def attached(target: Any) -> dict[str, str]:
    """What stands beside the params, by path: a line for each leaf.

    A leaf is told by its name, so that a param of the model's own that is named as the
    leaf of another is listed, too.

    Args:
      target: what `attach` gave, or its shapes.

    Raises:
      TypeError: if it is not a train state, an NNX model or a tree of arrays.
    """
    check_target(target)
    found = {
        "/".join(path): f"range of {_batches(state['count'])} batches"
        for path, state in held_states(target).items()
    }
    named = stored.by_path(stored.unbox(params_of(target)))
    owners = {**named, **stored.by_path(stored.unbox(getattr(target, "frozen", {})))}
    for path, value in named.items():
        if Leaf.parse(path, owners) is not None:
            shape = ",".join(map(str, value.shape))
            found["/".join(path)] = f"{value.dtype.name}[{shape}]"
    return found


def _batches(count: Any) -> Any:
    """The number of batches that a range has seen; ``?`` for the shape of a state."""
    return int(count.max()) if is_concrete(count) else "?"


def _are_rules(rules: Any) -> bool:
    """Whether these are rules, one rule or a mode, not the state of an optimizer."""
    return isinstance(rules, QuantizationProvider | QuantizationRule) or (
        isinstance(rules, Sequence)
        and all(isinstance(rule, QuantizationRule) for rule in rules)
    )


def _with_grids(target: Any, opt_state: Any, *, alone: bool) -> Any:
    # Late, as what is imported takes long, and other leaves do not need it.
    from qwix_train.qat import grid_scales

    if not grid_scales.has_grids(opt_state):
        raise TypeError(
            "Expected rules, a provider, or the state of an optimizer that "
            f"optim.proximal is a part of, got {shortened(opt_state)}."
        )
    if not alone or not is_tree(target):
        raise TypeError(
            "The grids of an optimizer are put beside params, and need no model: "
            f"attach(params, opt_state), not of {shortened(target)} with more."
        )
    return grid_scales.with_grid_scales(target, opt_state)


def _provider_of(rules: Any) -> QuantizationProvider:
    """The mode that rules are for."""
    if isinstance(rules, QuantizationProvider):
        return rules
    rules = check_rules(rules)
    if any(rule.adds_adapters for rule in rules):
        from qwix_train.lora.provider import LoraProvider

        return LoraProvider(rules)
    return QtProvider(rules)


def _check_needs(provider: QuantizationProvider, what: str) -> None:
    """Complains of a mode that needs no leaf."""
    if not provider.adds_params and not provider.keeps_quant_stats:
        raise ValueError(
            f"There is nothing to {what}: no rule of {type(provider).__name__} sets "
            "act_static_scale=True or bwd_averaging, for ranges that training keeps; "
            "trains a scale, by weight_calibration_method='lsq' or 'lsq+' or "
            "act_calibration_method='lsq', 'lsq+' or 'pact'; or is a LoraRule, for "
            "adapters."
        )


def _check_asked(
    provider: QuantizationProvider,
    inputs: Any,
    kwargs: Any,
    step: Any,
    quant_stats: Any,
    takes: Mapping[str, Any],
) -> None:
    """Complains of what a mode does not take, and of inputs that are missing.

    Args:
      provider: the mode.
      inputs: the inputs.
      kwargs: the keyword inputs.
      step: the step, if one is given.
      quant_stats: ranges, if they are given.
      takes: what is for adapters alone, by its name.

    Raises:
      TypeError: if there is one.
    """
    for name, value in takes.items():
        if value and not provider.stores_params:
            raise TypeError(
                f"{name}= is for adapters, and there is no LoraRule: leave it out."
            )
    if not inputs and not kwargs:
        raise TypeError(
            "attach needs inputs of the model, or, for static ranges, step= and what "
            "the step takes after the state: attach(state, rules, *inputs)."
        )
    if step is not None and provider.adds_params:
        raise TypeError(
            "step= makes room for ranges alone, and the rules need params, too. Give "
            "the inputs of the model: attach(state, rules, *inputs)."
        )
    static_range.check_quant_stats(quant_stats)
    learns = provider.adds_params and not provider.stores_params
    if quant_stats is not None and not learns:
        raise TypeError(
            "quant_stats are ranges that trained scales begin with, and no rule trains "
            "one. Ranges that stay as they are go to wrap_train_step(quant_stats=...)."
        )


def _empty_states(
    target: Any,
    provider: QuantizationProvider,
    model: Any,
    step: Callable[..., Any] | None,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[Path, Any]:
    """The statistics of a target: those it has, and of other ranges empty ones."""

    def call(state, *inputs, **kwargs):
        if isinstance(state, nnx.Module):
            return state(*inputs, **kwargs)
        is_function = not isinstance(model, nn.Module | None)
        found = model_call(state, as_model(model) if is_function else model)
        with found.naming_missing_collections(inputs, kwargs):
            return found.function(found.first, *inputs, **{**found.kwargs, **kwargs})

    if type(provider).tagging is QtProvider.tagging:
        tagging = RangeTagging(provider.rules, with_gradients=True)
    else:
        tagging = provider.tagging()
    observed = Observed(step or call, tagging)
    held = nnx_model(target)
    # A copy, as an NNX model may be updated by its call.
    traced = nnx.clone(target if step else held) if held is not None else target
    try:
        stats = observed.init(traced, *inputs, **kwargs)
    except Exception as error:
        if step is None:
            error.add_note(
                "attach has called the model on the inputs that it was given. If your "
                "step calls it in another way, such as on a part of a batch, use "
                "attach(state, rules, batch, step=train_step)."
            )
        raise
    found = {name: observed.ranges[name] for name in stats}
    states = {x.path: stats[name] for name, x in found.items() if not x.learned}
    if not states and not provider.adds_params:
        raise ValueError(
            "No rule that matches an op sets act_static_scale=True or bwd_averaging, "
            "so there is no range to keep."
        )
    owners = {x.path: x.owner or x.path for x in found.values()}
    return _kept(held_states(target), states, owners)


def _kept(
    before: Mapping[Path, Any], states: Mapping[Path, Any], owners: Mapping[Path, Path]
) -> dict[Path, Any]:
    """Statistics, and in their place those that there are already, of the same kind.

    The ranges of an array that several ops read are one range.

    Args:
      before: those that there are.
      states: the statistics, empty.
      owners: for each path of a range the first path of its array.
    """

    def shapes(state):
        return jax.tree.map(jnp.shape, state)

    kept: dict[Path, Any] = {}
    for path, state in states.items():
        if shapes(before.get(path)) == shapes(state):
            kept.setdefault(owners[path], before[path])

    def state_of(path):
        held = kept.get(owners[path])
        if held is None or held is before.get(path):
            return states[path] if held is None else held
        return jax.tree.map(jnp.copy, held)  # a step may donate each

    return {**before, **{path: state_of(path) for path in states}}


def _with_adapters(
    target: Any,
    provider: Any,
    call: ModelCall,
    rng: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    donate: bool,
) -> Any:
    from qwix_train.lora import train_state

    adapted = train_state.AdaptedApply(call.function, provider, call.in_collection)
    begun = (adapted, call.first, rng, inputs, kwargs)
    if not is_tree(target):
        return train_state.with_adapters(target, *begun, donate=donate)
    _, adapters, params = train_state.begin(*begun, donate=donate)
    return with_params(target, _inserted(params, stored.by_path(adapters)))


def _inserted(params: Any, leaves: Mapping[Path, Any]) -> Any:
    for path, value in leaves.items():
        params = inserted(params, path, value)
    return params


def _nnx_call(
    model: nnx.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> TracedCall:
    method = subclasses.original(type(model)).__call__
    arguments = (model, *inputs)
    with nnx_calls.tracing_call(method, arguments, dict(kwargs)) as (traced, _):
        return traced


def _check_no_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "This optimizer trains params that are frozen below adapters. Give the "
            "model alone, and make one for the adapters afterwards: "
            "nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)."
        )


def _carry_over(optimizer: Any, model: nnx.Module, *, fewer: bool = False) -> None:
    """Gives an NNX optimizer the params that its model has now, in place."""
    if isinstance(optimizer, nnx.Optimizer):
        new = nnx.Optimizer(model, optimizer.tx, wrt=optimizer.wrt).opt_state
        optimizer.opt_state = carried_over(optimizer.opt_state, new, fewer=fewer)

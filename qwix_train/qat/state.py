"""Train states that carry the statistics of static ranges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx, struct
from flax.training import train_state

from qwix_train import calib
from qwix_train.calib.ranges import states_in
from qwix_train.core.shortened import shortened
from qwix_train.frontends import attributes, nnx_objects
from qwix_train.planning.plan import Path
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.quant_stat import QuantStat, quant_stats_in
from qwix_train.qat.running_ranges import States, nested
from qwix_train.qat.train_state import collections_of


class QuantTrainState(train_state.TrainState):
    """A `TrainState` with the statistics of static ranges in it.

    Attributes:
      quant_stats: the statistics, as `with_quant_stats` makes them: a nested dictionary
        with, for each activation such as `["Dense_0"]["dot_general0_lhs"]`, a
        dictionary of arrays. `quantize_params` takes it.
    """

    quant_stats: Any = struct.field(default_factory=dict)


def with_quant_stats(
    state: Any,
    rules: Sequence[QuantizationRule] | QuantizationProvider,
    *inputs: Any,
    step: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Makes room, in a train state or NNX model, for the statistics of static ranges.

    They start empty; `wrap_train_step` updates them. Nothing is computed.

    Args:
      state: a `TrainState`, of a class of your own, too; any other dataclass with a
        `replace` method, if `step` is given; or an NNX model, which is changed in
        place.
      rules: what the step is to be wrapped with: the rules, or a provider that
        collects ranges, such as `QtProvider(rules)`.
      *inputs: inputs of the model, or their shapes. With `step`, what the step takes
        after the state.
      step: the step, where the model's inputs are not at hand, or are not all that its
        call takes. It is traced abstractly.
      **kwargs: keyword inputs.

    Returns:
      The NNX model, with a `QuantStat` in the module of each op; or the state, with a
      field `quant_stats`. If the class of the state has no such field, it is of a
      subclass that does. `state.quant_stats`, or of an NNX model
      `nnx.to_pure_dict(nnx.state(model, QuantStat))`, is what `ptq.quantize` takes.

    Raises:
      ValueError: if no rule sets `act_static_scale=True`, or none matches an op.
      TypeError: if `state` is no such object; if a provider collects no ranges.

    Example:
      >>> import jax
      >>> import optax
      >>> from flax import linen as nn
      >>> from flax.training import train_state
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, with_quant_stats
      >>> rule = QuantizationRule(
      ...     weight_qtype="int8", act_qtype="int8", act_static_scale=True
      ... )
      >>> model, x = nn.Dense(2), jnp.ones((8, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = train_state.TrainState.create(
      ...     apply_fn=model.apply, params=params, tx=optax.sgd(0.1)
      ... )
      >>> state = with_quant_stats(state, [rule], x)
      >>> sorted(state.quant_stats["dot_general0_lhs"])
      ['count', 'mean_size', 'narrowest', 'skipped', 'sum_of_absmax', 'widest']
    """
    if not inputs and not kwargs:
        raise TypeError(
            "with_quant_stats needs inputs of the model, or step= and what the step "
            "takes after the state: with_quant_stats(state, rules, *inputs)."
        )
    observed = calib.observe(step or _call_of(state), rules)
    # A copy, as an NNX model may be updated by its call.
    traced = nnx.clone(state) if isinstance(state, nnx.Module) else state
    try:
        stats = observed.init(traced, *inputs, **kwargs)
    except Exception as error:
        if step is None:
            error.add_note(
                "with_quant_stats has called the model on the inputs that it was "
                "given. If your step calls it in another way, such as on a part of a "
                "batch, use with_quant_stats(state, rules, batch, step=train_step)."
            )
        raise
    found = {name: observed.ranges[name] for name in stats}
    states = {x.path: stats[n] for n, x in found.items() if not x.learned}
    if not states:
        raise ValueError(
            "No rule that matches an op sets act_static_scale=True: ranges that are "
            "learned are among the params, see qat.attach_learned_scales."
        )
    if isinstance(state, nnx.Module):
        for path, value in states.items():
            nnx_objects.put(state, path, QuantStat(value))
        return state
    return _replaced(state, states)


def states_of(tree: Any) -> dict[Path, Mapping[str, Any]]:
    """The statistics that the arguments of a step hold, by path.

    Raises:
      ValueError: if two of them have statistics of the same name.
    """
    found: dict[Path, Mapping[str, Any]] = {}
    for state in _train_states(tree):
        _add(found, states_in(state.quant_stats))
    for path, stat in quant_stats_in(tree):
        _add(found, {path: dict(stat.get_value())})
    return found


def put_states(args: Any, out: Any, states: States) -> Any:
    """Puts statistics where a step keeps such.

    Args:
      args: the arguments of the step. NNX models among them are changed in place.
      out: the results of the step.
      states: the statistics, by path.

    Returns:
      The results, with the statistics in the train states among them.

    Raises:
      ValueError: if there is no place for them.
    """
    places = 0

    def put(value):
        nonlocal places
        if not _is_train_state(value):
            return value
        places += 1
        updated = {path: states[path] for path in states_in(value.quant_stats)}
        return value.replace(quant_stats=nested(updated))

    out = jax.tree.map(
        put, out, is_leaf=lambda x: _is_train_state(x) or nnx_objects.is_node(x)
    )
    for path, stat in quant_stats_in((args, out)):
        stat.set_value(dict(states[path]))
        places += 1
    if not places:
        raise ValueError(
            "The step updates static ranges, but returns no state that has "
            "quant_stats, so they would be lost. Return the state, or wrap the "
            "step with update_quant_stats=False."
        )
    return out


def step_count(tree: Any) -> Any:
    """The number of updates that the state among a step's arguments has had.

    Raises:
      ValueError: if there is none, or more than one.
    """
    counts = []
    seen: set[int] = set()
    for leaf in jax.tree.leaves(
        tree, is_leaf=lambda x: _counts_steps(x) or nnx_objects.is_node(x)
    ):
        if nnx_objects.is_node(leaf):
            for _, node in nnx.iter_graph(leaf):
                if isinstance(node, nnx.Optimizer) and id(node) not in seen:
                    seen.add(id(node))
                    counts.append(node.step.get_value())
        elif _counts_steps(leaf):
            counts.append(leaf.step)
    if len(counts) == 1:
        return counts[0]
    held = f"{len(counts)} arguments of the step are" if counts else "no argument is"
    raise ValueError(
        "A schedule, and what is frozen after some steps, needs the number of steps so "
        f"far, and {held} a train state or an nnx.Optimizer. Give wrap_train_step a "
        "function of the step's arguments that returns that number, such as "
        "schedule_step=lambda state, batch: state.step."
    )


def _counts_steps(value: Any) -> bool:
    return not isinstance(value, type) and attributes.has(value, "step", "replace")


def _call_of(state: Any) -> Callable[..., Any]:
    """The function of a state and inputs that calls its model."""
    if isinstance(state, nnx.Module):
        return lambda model, *inputs, **kwargs: model(*inputs, **kwargs)
    if not hasattr(state, "apply_fn") or not hasattr(state, "params"):
        raise TypeError(
            f"Expected a TrainState or an NNX model, got {type(state).__name__}. Give "
            "step= for a state that has no apply_fn and params."
        )

    def call(state, *inputs, **kwargs):
        others = collections_of(state)
        return state.apply_fn({"params": state.params, **others}, *inputs, **kwargs)

    return call


def _replaced(state: Any, states: States) -> Any:
    if not dataclasses.is_dataclass(state) or not hasattr(state, "replace"):
        raise TypeError(
            f"Expected a TrainState, or another flax.struct.dataclass, got "
            f"{shortened(state)}."
        )
    if not hasattr(state, "quant_stats"):
        fields = {
            field.name: getattr(state, field.name)
            for field in dataclasses.fields(state)
        }
        return _with_field(type(state))(**fields, quant_stats=nested(states))
    return state.replace(quant_stats=nested(states))  # type: ignore[attr-defined]


@functools.cache
def _with_field(cls: type) -> type:
    """A subclass of a dataclass with a field for statistics; the same each time."""
    fields = {
        "__annotations__": {"quant_stats": Any},
        "quant_stats": struct.field(default_factory=dict),
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    subclass = type(f"{cls.__name__}WithQuantStats", (cls,), fields)
    return (
        subclass if "_flax_dataclass" in vars(subclass) else struct.dataclass(subclass)
    )


def _is_train_state(value: Any) -> bool:
    return (
        not isinstance(value, nnx.Module | type)
        and attributes.has(value, "quant_stats", "replace")
        and bool(value.quant_stats)
    )


def _train_states(tree: Any) -> Iterator[Any]:
    leaves = jax.tree.leaves(
        tree, is_leaf=lambda x: _is_train_state(x) or nnx_objects.is_node(x)
    )
    return filter(_is_train_state, leaves)


def _add(found: dict[Path, Mapping[str, Any]], more: States) -> None:
    for path, state in more.items():
        if path in found:
            raise ValueError(
                f"Two arguments of the step have quant_stats for {'/'.join(path)!r}, "
                "and it is not known which model call is whose. Wrap a step for each."
            )
        found[path] = state

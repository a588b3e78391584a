"""Train states that carry the statistics of static ranges."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx, struct
from flax.training import train_state

from qwix_train.core.shortened import shortened
from qwix_train.frontends import held, nnx_objects
from qwix_train.frontends.quant_stat import QuantStat, quant_stats_in
from qwix_train.frontends.targets import (
    frozen_like,
    has_collections,
    is_tree,
    nnx_model,
)
from qwix_train.planning.leaves import Path
from qwix_train.planning.quant_stats import States, as_quant_stats, nested, states_in


class QuantTrainState(train_state.TrainState):
    """A `TrainState` with the statistics of static ranges in it.

    Attributes:
      quant_stats: the statistics, as `attach` makes them: a nested dictionary
        with, for each activation such as `["Dense_0"]["dot_general0_lhs"]`, a
        dictionary of arrays. `quantize_params` takes it.
    """

    quant_stats: Any = struct.field(default_factory=dict)


def states_of(tree: Any) -> dict[Path, Mapping[str, Any]]:
    """The statistics that the arguments of a step hold, by path.

    Raises:
      ValueError: if two of them have statistics of the same name.
    """
    found: dict[Path, Mapping[str, Any]] = {}
    for state in held.states_with(tree, "quant_stats"):
        _add(found, states_in(state.quant_stats))
    for path, stat in quant_stats_in(tree):
        _add(found, {path: dict(stat.get_value())})
    return found


def put_states(args: Any, out: Any, states: States) -> Any:
    """Puts statistics where a step keeps its statistics.

    Args:
      args: the arguments of the step. NNX models among them are changed in place.
      out: the results of the step.
      states: the statistics, by path.

    Returns:
      The results, with the statistics in the train states among them.

    Raises:
      ValueError: if there is no place for them.
    """

    def updated(old):
        return nested({path: states[path] for path in states_in(old)})

    places = [*held.states_with(out, "quant_stats"), *quant_stats_in((args, out))]
    for path, stat in quant_stats_in((args, out)):
        stat.set_value(dict(states[path]))
    if not places:
        raise ValueError(
            "The step updates static ranges, but returns no state that has "
            "quant_stats, so they would be lost. Return the state, or wrap the "
            "step with update_quant_stats=False."
        )
    return held.with_field(out, "quant_stats", updated)


def step_count(tree: Any) -> Any:
    """The number of updates that the state among a step's arguments has had.

    Raises:
      ValueError: if there is none, or more than one.
    """
    optimizers = held.nodes_of(tree, nnx.Optimizer)
    counts = [optimizer.step.get_value() for optimizer in optimizers]
    counts += [state.step for state in held.states_with(tree, "step")]
    if len(counts) == 1:
        return counts[0]
    who = f"{len(counts)} arguments of the step are" if counts else "no argument is"
    raise ValueError(
        "A schedule, and what is frozen after some steps, needs the number of steps so "
        f"far, and {who} a train state or an nnx.Optimizer. Give wrap_train_step a "
        "function of the step's arguments that returns that number, such as "
        "schedule_step=lambda state, batch: state.step."
    )


def held_states(target: Any) -> Mapping[Path, Mapping[str, Any]]:
    """The statistics that a train state, an NNX model or variables hold, by path."""
    if is_tree(target):
        whole = has_collections(target)
        return states_in(target.get("quant_stats", {})) if whole else {}
    return states_of(target)


def with_states(target: Any, states: States) -> Any:
    """A state, a model or variables with these statistics instead of its own.

    Args:
      target: an NNX model, or an `nnx.ModelAndOptimizer`, which are changed in place; a
        dataclass with a method `replace`; or the variables of a Linen model. If a class
        has no field `quant_stats`, the result is of a subclass that has one.
      states: the statistics, by path. If the mapping is empty, the result is of the
        original class, not of the subclass.

    Raises:
      TypeError: if `target` has no place for them.
    """
    model = nnx_model(target)
    if model is not None:
        before = {path for path, _ in quant_stats_in(model)}
        nnx_objects.remove_params(model, before - set(states))
        for path, value in states.items():
            nnx_objects.put(model, path, QuantStat(value))
        return target
    if has_collections(target):
        variables = {k: x for k, x in target.items() if k != "quant_stats"}
        stats = {"quant_stats": as_quant_stats(states)} if states else {}
        return frozen_like(target, {**variables, **stats})
    if is_tree(target) and not states:
        return target
    if is_tree(target):
        raise TypeError(
            f"Statistics of ranges have no place in {shortened(target)}: they are a "
            "field of a TrainState or of another flax.struct.dataclass, or a "
            "collection beside the params of a Linen model, attach({'params': params}, "
            "rules, *inputs, model=model)."
        )
    has_room = hasattr(target, "quant_stats")
    without = vars(type(target)).get("_without_quant_stats")
    if has_room and (states or without is None):
        return target.replace(quant_stats=nested(states))  # type: ignore[attr-defined]
    if not states and not has_room:
        return target
    cls: Any = _with_field(type(target)) if states else without
    fields = {
        field.name: getattr(target, field.name)
        for field in dataclasses.fields(target)
        if field.name != "quant_stats"
    }
    return cls(**fields, **({"quant_stats": nested(states)} if states else {}))


@functools.cache
def _with_field(cls: type) -> type:
    """A subclass of a dataclass with a field for statistics; the same each time."""
    fields = {
        "__annotations__": {"quant_stats": Any},
        "quant_stats": struct.field(default_factory=dict),
        "_without_quant_stats": cls,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    subclass = type(f"{cls.__name__}WithQuantStats", (cls,), fields)
    return (
        subclass if "_flax_dataclass" in vars(subclass) else struct.dataclass(subclass)
    )


def _add(found: dict[Path, Mapping[str, Any]], more: States) -> None:
    for path, state in more.items():
        if path in found:
            raise ValueError(
                f"Two arguments of the step have quant_stats for {'/'.join(path)!r}, "
                "and it is not known which model call is whose. Wrap a step for each."
            )
        found[path] = state

"""The statistics of static ranges: what is measured, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import traverse_util
from jax import numpy as jnp

from qwix_train.core.errors import located
from qwix_train.core.how import HowToQuantize
from qwix_train.observers.statistics import (
    Statistics,
    in_layout_of_qwix,
    make_statistics,
)
from qwix_train.planning.leaves import GRADIENT, OperandName, Path
from qwix_train.planning.rules import QuantizationRule, rule_of_range
from qwix_train.trace.function import by_path

# The statistics of each range, by its path.
States = Mapping[Path, Mapping[str, Any]]


class CollectedRange(NamedTuple):
    """The range of an array that a plan wants collected.

    Attributes:
      path: the path of the range.
      statistics: what is measured, and how batches combine.
      shape: the shape of the array, in one layer.
      dtype: its dtype.
      layers: the lengths of the scans over layers around it, outermost first.
    """

    path: Path
    statistics: Statistics
    shape: tuple[int, ...]
    dtype: Any
    layers: tuple[int, ...] = ()


def initial_states(ranges: Iterable[CollectedRange]) -> dict[Path, dict[str, Any]]:
    """The statistics before any batch, with an axis for each scan over layers.

    Args:
      ranges: what is collected.
    """
    return {
        x.path: jax.tree.map(
            lambda leaf, layers=x.layers: jnp.broadcast_to(leaf, layers + leaf.shape),
            x.statistics.init(x.shape, x.dtype),
        )
        for x in ranges
    }


def is_of_gradient(path: Path) -> bool:
    """Whether the range at a path is that of a gradient."""
    return OperandName.parse(path).side == GRADIENT


def statistics_by(rule: QuantizationRule, how: HowToQuantize, path: Path) -> Statistics:
    """What is collected for a range.

    Args:
      rule: the rule that asks for it.
      how: how its activation is quantized.
      path: its path.

    Raises:
      ValueError: if the rule does not fit the activation.
    """
    with located("/".join(path)):
        return make_statistics(
            rule.range_observer or how.calibration_method,
            rule.act_averaging,
            how=how,
            batch_axes=rule.act_batch_axes,
            finite_only=rule.act_finite_only,
        )


def statistics_at(rules: Sequence[QuantizationRule], path: Path) -> Statistics:
    """What is collected for a range, as the rule of its op says.

    Args:
      rules: the rules.
      path: the path of the range.

    Raises:
      ValueError: if no rule gives the op a static range.
    """
    rule = rule_of_range(rules, path)
    if is_of_gradient(path) and rule is not None:
        if rule.gradient_statistics is not None:
            return rule.gradient_statistics
    elif rule is not None and rule.static_act_ranges:
        return make_statistics(
            rule.range_observer or rule.act_method,
            rule.act_averaging,
            how=HowToQuantize(qtype=rule.act_qtype, calibration_method=rule.act_method),
        )
    raise ValueError(
        f"There are quant_stats for {'/'.join(path)!r}, and no rule gives that a "
        "static range. Pass the rules that the statistics were made with."
    )


def states_in(quant_stats: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The statistics in a nested dictionary, by the path of their range.

    Args:
      quant_stats: the nested dictionary; at each path, a dictionary of arrays.
    """
    states: dict[Path, dict[str, Any]] = {}
    for path, value in by_path(quant_stats).items():
        states.setdefault(path[:-1], {})[path[-1]] = value
    return states


def nested(states: States) -> dict[str, Any]:
    """The nested dictionary of statistics, from those by path."""
    return traverse_util.unflatten_dict(dict(states))


def as_quant_stats(states: States) -> dict[str, Any]:
    """Statistics as a Linen model holds them, in the layout of `qwix`."""
    return nested({path: in_layout_of_qwix(state) for path, state in states.items()})

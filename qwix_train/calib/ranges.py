"""The ranges that statistics in a train state give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwix_train.calib.observe import Tagged, quant_stats_of
from qwix_train.core.how import HowToQuantize
from qwix_train.observers.statistics import make_statistics
from qwix_train.planning.leaves import Path
from qwix_train.planning.rules import QuantizationRule, rule_of_range
from qwix_train.trace.function import by_path


def collected_ranges(
    states: Mapping[Path, Mapping[str, Any]], rules: Sequence[QuantizationRule]
) -> dict[str, Any]:
    """The ranges that statistics give, as `quantize_params` takes them.

    Args:
      states: the statistics in a train state or a model, by the path of their range.
      rules: the rules that they were made with.

    Returns:
      A nested dictionary with a `count`, and `sum_of_absmax`, or `sum_of_min` and
      `sum_of_max`, for each range.

    Raises:
      ValueError: if a range has no batch, or no rule is for it.

    Warns:
      UserWarning: if ranges are far below what was seen, or batches differ much.
    """
    found = []
    for path in states:
        rule = rule_of_range(rules, path)
        if rule is None or not rule.static_act_ranges:
            raise ValueError(
                f"There are quant_stats for {'/'.join(path)!r}, and no rule gives that "
                "a static range. Pass the rules that the statistics were made with."
            )
        how = HowToQuantize(qtype=rule.act_qtype, calibration_method=rule.act_method)
        statistics = make_statistics(
            rule.range_observer or rule.act_method, rule.act_averaging, how=how
        )
        found.append(Tagged(path, statistics, None, None))
    named = {"/".join(path): state for path, state in states.items()}
    return quant_stats_of({range_.name: range_ for range_ in found}, named)


def states_in(quant_stats: Mapping[str, Any]) -> dict[Path, dict[str, Any]]:
    """The statistics in a nested dictionary, by the path of their range.

    Args:
      quant_stats: the nested dictionary; at each path, a dictionary of arrays.
    """
    states: dict[Path, dict[str, Any]] = {}
    for path, value in by_path(quant_stats).items():
        states.setdefault(path[:-1], {})[path[-1]] = value
    return states

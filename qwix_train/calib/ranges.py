"""The ranges that statistics in a train state give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qwix_train.calib.observe import Tagged, quant_stats_of
from qwix_train.planning.leaves import Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.quant_stats import is_of_gradient, statistics_at
from qwix_train.planning.rules import QuantizationRule


def collected_ranges(
    states: Mapping[Path, Mapping[str, Any]],
    rules: Sequence[QuantizationRule] | Plan,
) -> dict[str, Any]:
    """The ranges that statistics give, as `quantize_params` takes them.

    Args:
      states: the statistics in a train state or a model, by the path of their range.
      rules: the rules that the statistics were made with, or the plan of the model. The
        plan of an `OdmlQatProvider` has ranges that rules alone do not tell.

    Returns:
      A nested dictionary with a `count`, and `sum_of_absmax`, or `sum_of_min` and
      `sum_of_max`, for each range.

    Raises:
      ValueError: if a range has no batch, or no rule matches it.

    Warns:
      UserWarning: if ranges are far below what was seen, or batches differ much.
    """
    at = (
        rules.statistics_at
        if isinstance(rules, Plan)
        else partial(statistics_at, rules)
    )
    # Gradients have ranges only in training.
    states = {path: x for path, x in states.items() if not is_of_gradient(path)}
    found = [Tagged(path, at(path), None, None) for path in states]
    named = {"/".join(path): state for path, state in states.items()}
    return quant_stats_of({range_.name: range_ for range_ in found}, named)

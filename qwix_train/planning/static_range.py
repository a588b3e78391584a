"""Activations with a range that was collected beforehand.

The scale of an activation is kept next to the params of the module that runs the op,
named after the op and the operand: `params["Dense_0"]["dot_general0_lhs_scale"]`, and
`..._zero_point` where the range is not centered at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.core.calibration import compute_scale_zero_point
from qwix_train.core.how import HowToQuantize, needs_zero_point
from qwix_train.core.numerics import storage_dtype
from qwix_train.core.operands import is_concrete
from qwix_train.core.qarray import (
    WithAux,
)
from qwix_train.core.shortened import shortened
from qwix_train.files import processes
from qwix_train.planning.leaves import Leaf, Path, scale_path, zero_point_path
from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.stages.fake_quantize import Range
from qwix_train.trace.analyze import Operand
from qwix_train.values import stored


class StaticOperand(NamedTuple):
    """An activation that has a static range, collected or learned.

    Attributes:
      op: what happens to the op that reads it.
      side: 0 for the left operand of the op, 1 for the right one.
      how: how it is quantized.
    """

    op: OpPlan
    side: int
    how: HowToQuantize

    @property
    def path(self) -> Path:
        """The path of its range."""
        return self.op.range_path(self.side)

    @property
    def owner(self) -> Path:
        """The path of the range that it is quantized with in training."""
        return self.op.range_owner(self.side)

    @property
    def operand(self) -> Operand:
        """What the op reads there."""
        return self.op.op.operands[self.side]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape of its scale: layers that are scanned over have a range each."""
        return (*self.op.op.layers, *self.how.scale_shape(self.operand.shape))

    def with_how(self, scale: Any) -> WithAux:
        """A scale of its range, or the shape of one, as it stands among params."""
        is_other = self.op.learned and self.owner != self.path
        return WithAux(scale, self.how, self.owner if is_other else ())


def static_operands(plan: Plan) -> Iterator[StaticOperand]:
    """The activations that have static ranges in a plan."""
    for op in plan.quantized_ops:
        for side, how in enumerate(op.activations):
            if op.static and how is not None:
                yield StaticOperand(op, side, how)


def initial(plan: Plan) -> dict[Path, Any]:
    """The scales and zero points that a plan asks for, before any range is known.

    The scales are NaN: a model that runs before it has ranges says so in its output.
    """
    params: dict[Path, Any] = {}
    for static in static_operands(plan):
        how, shape = static.how, static.scale_shape
        scale = static.op.as_stored(jnp.full(shape, jnp.nan, static.operand.dtype))
        params[scale_path(static.path)] = static.with_how(scale)
        if needs_zero_point(how.calibration_method):
            zero_point = jnp.zeros(shape, storage_dtype(how.qtype))
            params[zero_point_path(static.path)] = static.op.as_stored(zero_point)
    return params


def from_statistics(
    path: Path, statistics: Mapping[str, Any], how: HowToQuantize
) -> dict[Path, Any]:
    """The scale and zero point of a range that was collected.

    Args:
      path: the path of the range.
      statistics: `count`, and a sum over that many batches for each number that a
        calibration gives: `sum_of_absmax`, or `sum_of_min` and `sum_of_max`. Or the
        numbers themselves, as other averages keep them: `ema_of_absmax`.
      how: how the activation is quantized.

    Raises:
      ValueError: if nothing was collected.
    """
    calibration = _calibration(path, statistics)
    scale, zero_point = compute_scale_zero_point(calibration, how.qtype)
    params: dict[Path, Any] = {scale_path(path): WithAux(scale, how)}
    if zero_point is not None:
        params[zero_point_path(path)] = zero_point
    return params


def _calibration(path: Path, statistics: Mapping[str, Any]) -> dict[str, jax.Array]:
    where = "/".join(path)
    if "count" not in statistics:
        raise ValueError(
            f"The quant_stats of {where!r} have no 'count'. Pass those of a "
            "Calibrator, or what ranges(state, rules) gives."
        )
    count = statistics["count"]
    if is_concrete(count) and not np.all(processes.whole(count) > 0):
        raise ValueError(
            f"The quant_stats of {where!r} are empty: its op was not reached while "
            "ranges were collected. Collect them on batches that reach it, or put a "
            "rule without act_static_scale for it before the others."
        )
    found = {
        end: _mean(jnp.asarray(value), count) if kind == "sum" else jnp.asarray(value)
        for (kind, end), value in ends_in(statistics).items()
    }
    if found.keys() not in ({"absmax"}, {"min", "max"}):
        raise ValueError(
            f"The quant_stats of {where!r} give no range: beside 'count' they have "
            f"{sorted(set(statistics) - {'count'})}, where sum_of_absmax is expected, "
            "or sum_of_min and sum_of_max. Pass those of a Calibrator, or what "
            "ranges(state, rules) gives."
        )
    return found


def calibration_of(path: Path, quant_stats: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The range that was collected under a path.

    Args:
      path: the path of the range.
      quant_stats: the statistics, as `quantize_params` takes them.

    Raises:
      ValueError: if it is missing, or empty.
    """
    return _calibration(path, _statistics_at(path, quant_stats))


def _statistics_at(path: Path, quant_stats: Mapping[str, Any]) -> Mapping[str, Any]:
    statistics: Any = quant_stats
    for name in path:
        statistics = statistics.get(name, {})
    if not statistics:
        raise ValueError(
            f"There are no quant_stats for {'/'.join(path)!r}, whose range the "
            "rules ask for, as it is static or a learned scale begins with it. "
            "Collect them with calib.Calibrator and pass "
            "quant_stats=calibrator.quant_stats, or keep them in the state of a train "
            "step: attach(state, rules, *inputs)."
        )
    return statistics


def check_quant_stats(quant_stats: Any) -> None:
    """Checks what is given as the ranges of activations.

    Raises:
      TypeError: if it is not a nested dictionary.
      ValueError: if it is what a collector keeps, whose keys are whole paths.
    """
    if quant_stats is None:
        return
    if not isinstance(quant_stats, Mapping):
        raise TypeError(
            f"quant_stats={shortened(quant_stats)}: expected the ranges of activations "
            "in a nested dictionary, such as calibrator.quant_stats, not a "
            f"{type(quant_stats).__name__}."
        )
    for key, value in quant_stats.items():
        if "/" in str(key) and isinstance(value, Mapping) and "count" in value:
            raise ValueError(
                f"The quant_stats have the key {key!r}, the whole path of a range: "
                "these are the statistics that a Calibrator or calib.observe keeps. "
                "The ranges that they give are calibrator.quant_stats, or "
                "observed.quant_stats(stats)."
            )


def ends_in(statistics: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """The ends of the range in statistics, by what is kept of them and their name.

    Args:
      statistics: such as `{"count": ..., "sum_of_min": ..., "sum_of_max": ...}`.
    """
    ends = {}
    for key, value in statistics.items():
        kind, found, end = key.partition("_of_")
        if found and kind in ("sum", "ema", "extreme", "last", "window"):
            ends[kind, end] = value
    return ends


def collected(plan: Plan, quant_stats: Mapping[str, Any]) -> dict[Path, Any]:
    """The scales and zero points of ranges that were collected, as a plan asks for.

    Args:
      plan: the plan.
      quant_stats: the statistics, as `quantize_params` takes them.

    Raises:
      ValueError: if a range is missing, or empty.
    """
    params: dict[Path, Any] = {}
    for static in static_operands(plan):
        if static.op.collected:
            statistics = _statistics_at(static.path, quant_stats)
            found = from_statistics(static.path, statistics, static.how)
            shape = found[scale_path(static.path)].shape
            _check_shape(shape, static)
            if len(shape) == len(static.scale_shape):
                found = static.op.as_stored(found)
            params |= found
    return params


def _check_shape(shape: tuple[int, ...], static: StaticOperand) -> None:
    wanted, layers = static.scale_shape, static.op.op.layers
    # One range may serve for all layers, and for all channels.
    finest = wanted[-len(shape) :]
    if len(shape) not in (len(wanted) - len(layers), len(wanted)) or any(
        has not in (1, most) for has, most in zip(shape, finest, strict=True)
    ):
        raise ValueError(
            f"The quant_stats of {'/'.join(static.path)!r} give a range of shape "
            f"{shape}, and an activation of shape {static.operand.shape} takes "
            f"{wanted}: they are of another model or of other rules. Collect them anew."
        )


def ranges_of(
    plan: OpPlan, named: Mapping[Path, Any], unknown: Mapping[Path, Any] | None = None
) -> list[Range | None]:
    """The ranges of the operands of an op; see `find`."""
    return [
        find(plan, side, named, unknown) if plan.static and how is not None else None
        for side, how in enumerate(plan.activations)
    ]


def find(
    plan: OpPlan,
    side: int,
    named: Mapping[Path, Any],
    unknown: Mapping[Path, Any] | None = None,
) -> Range:
    """The range of an operand, from among the params.

    Args:
      plan: what happens to the op.
      side: 0 for its left operand, 1 for its right one.
      named: the inputs of the traced call, by path.
      unknown: what stands for ranges where none are known yet, by path.

    Raises:
      ValueError: if there is no such range, or nothing was collected for it yet.
    """
    path = plan.range_path(side)
    values = named if unknown is None else unknown
    scale = Leaf(path, "scale").among(values)
    zero_point = Leaf(path, "zero_point").among(values)
    if scale is None:
        raise missing(path, plan, f"Give quantize_params {_source(plan)}.")
    scale = scale.array if stored.is_quantized(scale) else scale
    if unknown is None and is_concrete(scale) and np.isnan(scale).any():
        raise ValueError(
            f"The static range of {'/'.join(path)!r} is not known: its scale is NaN, "
            "as it is initialized. Give quantize_params, or ptq.quantize, "
            f"{_source(plan)}."
        )
    layers, ndim = plan.op.layers, len(plan.op.operands[side].shape)
    if layers and scale.ndim == ndim:  # one range for all layers
        scale = jnp.broadcast_to(scale, (*layers, *scale.shape))
        if zero_point is not None:
            zero_point = jnp.broadcast_to(zero_point, (*layers, *zero_point.shape))
        return Range(scale, zero_point)
    return Range(plan.layers_first(scale), plan.layers_first(zero_point))


def missing(path: Path, plan: OpPlan, remedy: str) -> ValueError:
    """The error that says that a range is not among the params; see `Leaf.missing`.

    Args:
      path: the path of the range.
      plan: what happens to the op.
      remedy: sentences that say what to do.
    """
    asked_by = "a rule with act_static_scale=True"
    if plan.learned:
        asked_by = f"a rule with act_calibration_method={plan.learned!r}"
    return Leaf(path, "scale").missing("static range", asked_by, remedy)


def _source(plan: OpPlan) -> str:
    return "the params with learned scales" if plan.learned else "the quant_stats"


def _mean(total: jax.Array, count: Any) -> jax.Array:
    # Of stacked layers, each has a count.
    count = jnp.asarray(count, total.dtype)
    return total / count.reshape(count.shape + (1,) * (total.ndim - count.ndim))

"""The first values of learned scales."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.calib.observe import RangeTagging, empty_states, updated_states
from qwix_train.core import numerics
from qwix_train.core.calibration import (
    calibrate,
    compute_scale_zero_point,
    range_ends,
)
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import is_concrete
from qwix_train.files import processes
from qwix_train.observers.averaging import Calibration
from qwix_train.planning import learned_scale, static_range
from qwix_train.planning.learned_scale import Leaves
from qwix_train.planning.leaves import Leaf, Path, scale_path
from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.planning.static_range import StaticOperand
from qwix_train.trace import function
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


def initial_leaves(
    traced: TracedCall,
    plan: Plan,
    quant_stats: Mapping[str, Any] | None = None,
) -> dict[Path, Any]:
    """The learned scales that a plan asks for, and that a call does not have yet.

    They are in float32 or wider, so that small updates are not lost. If a weight is in
    a box of Linen or NNX, its scale is in such a box, too.

    Args:
      traced: a call of the model. Activations are measured with its inputs.
      plan: what the rules do to it.
      quant_stats: ranges of activations, instead of measuring them.

    Returns:
      The leaves, by path.

    Raises:
      TypeError: if activations are to be measured, and the inputs are shapes.
      ValueError: if an activation has no range, or PACT would clip one that has
        negative elements; if a param is quantized already; or if the model has its own
        param in the place of a scale.
    """
    named = traced.named
    leaves: dict[Path, Any] = {}
    for param in traced.params:
        decision = None if param is None else plan.params[param.path]
        if param is None or decision is None or decision.how is None:
            continue
        if not learned_scale.has_learned_scale(decision):
            continue
        if stored.is_quantized(param.value):
            raise ValueError(
                f"Param {'/'.join(param.path)!r} is quantized already, and a learned "
                "scale is trained together with float params: give those."
            )
        path = scale_path(param.path)
        if traced.is_own(path):
            raise ValueError(
                f"The model has a param {'/'.join(path)!r}, where the learned scale "
                f"of {'/'.join(param.path)!r} would stand. Give that param another "
                "name, or its op a rule of another weight_calibration_method."
            )
        if path not in named:
            scale = _weight_scale(param.value, decision.how)
            box = traced.boxes.get(param.path)
            leaves[path] = scale if box is None else stored.box_part(scale, box)
    missing = [
        static
        for static in static_range.static_operands(plan)
        if static.op.learned
        and static.path == static.owner
        and not _has_leaves(static, named)
    ]
    if missing:
        calibration_of = _given(quant_stats) if quant_stats else _measured(traced, plan)
    for static in missing:
        begun = _act_leaves(static, calibration_of(static.path))
        for leaf, value in learned_scale.each(static.path, begun).items():
            leaves[leaf.path] = static.op.as_stored(value)
    return leaves


def learned_paths(traced: TracedCall, plan: Plan) -> set[Path]:
    """The paths of the trained scales that a plan asks for, and that a call has.

    A param of the model's own is not one of them, whatever its name.

    Args:
      traced: a call of the model.
      plan: what the rules do to it.
    """
    of_params = {
        scale_path(path)
        for path, decision in plan.params.items()
        if decision is not None and learned_scale.has_learned_scale(decision)
    }
    of_activations = {
        Leaf(static.path, part).path
        for static in static_range.static_operands(plan)
        if static.op.learned
        for part in learned_scale.PARTS[static.op.learned]
    }
    found = (of_params | of_activations) & set(traced.named)
    return {path for path in found if not traced.is_own(path)}


def _has_leaves(static: StaticOperand, named: Mapping[Path, Any]) -> bool:
    parts = learned_scale.PARTS[static.op.learned]
    return all(Leaf(static.path, part).path in named for part in parts)


def _weight_scale(array: Any, how: HowToQuantize) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.eval_shape(functools.partial(_compiled_scale, how), array)
    return _compiled_scale(how, array)


@functools.partial(jax.jit, static_argnums=0)
def _compiled_scale(how: HowToQuantize, array: jax.Array) -> jax.Array:
    wide = array.astype(numerics.compute_dtype(array.dtype))
    return compute_scale_zero_point(calibrate(wide, how), how.qtype)[0]


def _given(quant_stats: Mapping[str, Any]) -> Callable[[Path], Calibration]:
    return lambda path: static_range.calibration_of(path, quant_stats)


class _LearnedTagging(RangeTagging):
    """Tags the activations that have learned scales."""

    def tags(self, op: OpPlan) -> bool:
        return bool(op.learned)


def _measured(traced: TracedCall, plan: Plan) -> Callable[[Path], Calibration]:
    """The ranges that activations of the float model have in a call."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in traced.inputs):
        raise TypeError(
            "Learned scales of activations begin with the ranges of a batch, and "
            "shapes were given for it: give arrays, or the ranges as quant_stats."
        )
    tagging = _LearnedTagging(plan.rules)

    def call(inputs):
        return tagging.transform(traced.with_inputs(inputs), plan)

    outer = function.trace(call, (list(traced.inputs),), lambda key_path: None)
    states = empty_states(outer.body, tagging.ranges)

    @jax.jit
    def calibrations(inputs):
        _, after = updated_states(outer.body, inputs, tagging.ranges, states)
        found = {}
        for name, state in after.items():
            calibration = tagging.ranges[name].statistics.calibration
            for _ in range(np.ndim(state["count"])):  # layers
                calibration = jax.vmap(calibration)
            found[name] = calibration(state)
        return found

    found = calibrations(list(outer.inputs))
    return lambda path: found["/".join(path)]


def _act_leaves(static: StaticOperand, calibration: Calibration) -> Leaves:
    """The leaves of an activation that begin with a range."""
    path, how, method = static.path, static.how, static.op.learned
    _check_range(path, calibration)
    low, high = range_ends(calibration)
    if method == "lsq":
        largest = {"absmax": jnp.maximum(-low, high)}
        return Leaves(scale=compute_scale_zero_point(largest, how.qtype)[0])
    first, last = numerics.code_range(how.qtype)
    if method == "lsq+":
        whole = {"min": low, "max": high}
        return Leaves(compute_scale_zero_point(whole, how.qtype)[0], offset=low)
    if "min" in calibration and is_concrete(low) and np.any(processes.whole(low) < 0):
        raise ValueError(
            f"{'/'.join(path)}: act_calibration_method='pact' clips an activation to "
            f"[0, alpha], and this one has elements as low as {np.min(low):.4g}: it is "
            "not what a ReLU gives. Give its op a rule with 'lsq+' or 'lsq'."
        )
    whole = {"min": jnp.zeros_like(high), "max": high}
    scale = compute_scale_zero_point(whole, how.qtype)[0]
    return Leaves(alpha=scale * (last - first))


def _check_range(path: Path, calibration: Calibration) -> None:
    for value in calibration.values():
        if is_concrete(value) and not np.isfinite(processes.whole(value)).all():
            raise ValueError(
                f"{'/'.join(path)}: its learned scale begins with the range of a "
                "batch, and it has none: its op was not reached, or the batch was "
                "empty or not finite."
            )

"""Scales that are trained, among the params.

They are leaves of the tree of params. That of a weight stands next to it:
`params["Dense_0"]["kernel_scale"]`, in the layout of a scale. Those of an activation
stand in the dictionary of the module, named after the op and the operand:
`params["Dense_0"]["dot_general0_lhs_scale"]`; with LSQ+ there is
`dot_general0_lhs_offset`, too, the value of the lowest code, and with PACT
`dot_general0_lhs_alpha` alone, the clipping level. An array that several ops read alike
has them under the name of the first.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import core
from jax import numpy as jnp

from qwix_train.core import learned_quant, numerics
from qwix_train.core.how import HowToQuantize, is_learned, needs_zero_point
from qwix_train.files import processes
from qwix_train.planning.leaves import (
    Leaf,
    OperandPart,
    Path,
    scale_path,
    zero_point_path,
)
from qwix_train.planning.plan import OpPlan, ParamPlan
from qwix_train.planning.static_range import Range
from qwix_train.stages.learned import PARTS, Leaves
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored

_PARTS: tuple[OperandPart, ...] = ("scale", "offset", "alpha")


def leaves_at(path: Path, named: Mapping[Path, Any]) -> Leaves:
    """The leaves of an activation that are among the params.

    Args:
      path: the path of its range.
      named: the params, by path.
    """
    found = {part: Leaf(path, part).among(named) for part in _PARTS}
    # A model that is quantized has a range under the name of one.
    return Leaves(**{p: x for p, x in found.items() if not stored.is_quantized(x)})


def each(path: Path, leaves: Leaves) -> dict[Leaf, Any]:
    """The leaves of an activation that there are, each with its value.

    Args:
      path: the path of its range.
      leaves: the leaves.
    """
    values = {Leaf(path, part): getattr(leaves, part) for part in _PARTS}
    return {leaf: value for leaf, value in values.items() if value is not None}


def trained_leaf(path: Path, params: Collection[Path] = ()) -> Leaf | None:
    """The trained leaf that has a path, by its name; see `Leaf.parse`."""
    leaf = Leaf.parse(path, params)
    return leaf if leaf is not None and leaf.part in _PARTS else None


def has_learned_scale(plan: ParamPlan) -> bool:
    """Whether the scale of a param is trained."""
    return plan.how is not None and is_learned(plan.how.calibration_method)


def weight_scale(plan: ParamPlan, named: Mapping[Path, Any]) -> jax.Array:
    """The trained scale of a param.

    Args:
      plan: how it is quantized.
      named: the inputs of the traced call, by path.

    Raises:
      ValueError: if there is none, or it is of another shape.
    """
    assert plan.how is not None
    leaf = Leaf(plan.path, "scale")
    scale = stored.unbox(leaf.among(named))
    if scale is None:
        raise _missing(
            leaf, f"weight_calibration_method={plan.how.calibration_method!r}"
        )
    leaf.check_shape(scale, plan.how.scale_shape(plan.shape))
    return scale


def leaves_path(plan: OpPlan, side: int, named: Mapping[Path, Any]) -> Path:
    """The path that the trained leaves of an operand have.

    An array that several ops read alike has leaves under the name of the first. Those
    of an op itself take precedence: in another call it may read an array of its own.

    Args:
      plan: what happens to the op.
      side: 0 for its left operand, 1 for its right one.
      named: the params, by path.
    """
    path = plan.range_path(side)
    return path if leaves_at(path, named).method else plan.range_owner(side)


def act_leaves(plan: OpPlan, side: int, named: Mapping[Path, Any]) -> Leaves:
    """The trained leaves of an operand of an op.

    Args:
      plan: what happens to the op.
      side: 0 for its left operand, 1 for its right one.
      named: the inputs of the traced call, by path.

    Raises:
      ValueError: if one is missing, or of another shape.
    """
    how, path = plan.activations[side], leaves_path(plan, side, named)
    assert how is not None
    shape = (*plan.op.layers, *how.scale_shape(plan.op.operands[side].shape))
    found = {}
    for part in PARTS[plan.learned]:
        leaf = Leaf(path, part)
        if (value := leaf.among(named)) is None:
            raise _missing(leaf, f"act_calibration_method={plan.learned!r}")
        value = stored.unbox(value)
        if value.ndim == len(shape):
            value = plan.layers_first(value)
        found[part] = fitted(leaf, value, shape)
    return Leaves(**found)


def given_parts(path: Path, traced: TracedCall) -> tuple[Any, Any] | None:
    """The scale and zero point that stand beside a param, from whatever training.

    A param of the model's own is no scale, whatever its name: one that it computes
    with, that a Linen module declares, or that has not the axes of the param. An NNX
    model and a function do not say what other methods read. There, only what
    `attach` has put into the NNX model is known to be a scale; of any
    other the user is told.

    Args:
      path: the path of the param.
      traced: the call that takes it.

    Returns:
      The scale, and the zero point or None; None if there is no scale.
    """
    named = traced.named
    if not path or scale_path(path) not in named:
        return None
    scale, is_own = named[scale_path(path)], traced.is_own(scale_path(path))
    if is_own is None:
        is_own = jnp.ndim(scale) != jnp.ndim(named[path])
        if not is_own:
            _tell(path)
    return None if is_own else (scale, named.get(zero_point_path(path)))


def _tell(path: Path) -> None:
    """Warns that a param is taken for the scale of another, which is not sure."""
    param, scale = "/".join(path), "/".join(scale_path(path))
    warnings.warn(
        f"{scale!r} is taken for the scale of {param!r}, which it stands beside: the "
        "call does not compute with it. If it is a param of the model, which other "
        "calls read, give it another name. If it is a scale, all is well; in an NNX "
        "model nnx.Param(scale, attached=True) says so.",
        stacklevel=2,
    )


def given_range(
    path: Path,
    parts: tuple[Any, Any],
    how: HowToQuantize,
    shape: Sequence[int],
    dtype: Any,
) -> Range:
    """The range of a param that a scale and a zero point beside it say.

    Args:
      path: the path of the param.
      parts: the scale and the zero point, which may be None.
      how: how the param is quantized.
      shape: its shape.
      dtype: its dtype.

    Raises:
      ValueError: if a part does not fit the param or its rule, or is not finite.
    """
    expected = how.scale_shape(tuple(shape))
    leaves = Leaf(path, "scale"), Leaf(path, "zero_point")
    for leaf, value in zip(leaves, parts, strict=True):
        if value is not None:
            leaf.check_shape(value, expected)
            check_finite(leaf, value)
    scale, zero_point = parts
    scale = learned_quant.positive_scale(jnp.asarray(scale), dtype)
    scale = numerics.scale_in_dtype(scale, dtype)
    if needs_zero_point(how.calibration_method):
        zero = jnp.zeros(scale.shape) if zero_point is None else zero_point
        zero_point = numerics.round_to_qtype(jnp.asarray(zero, float), how.qtype)
    elif zero_point is not None:
        raise ValueError(
            f"Param {'/'.join(path)!r} has a zero point next to it, and its rule "
            f"(weight_calibration_method={how.calibration_method!r}) takes none. Use "
            "the rules that it was trained with."
        )
    return Range(scale, zero_point)


def stored_range(leaves: Leaves, qtype: Any, dtype: Any) -> Range:
    """The scale and zero point that a quantized model has for trained leaves.

    Args:
      leaves: the leaves.
      qtype: the type of the codes.
      dtype: the dtype of the activation.
    """
    if leaves.alpha is not None:
        alpha = learned_quant.positive_scale(leaves.alpha, dtype)
        scale = learned_quant.pact_scale(alpha, qtype)
        scale = numerics.scale_in_dtype(scale, dtype)
        low, _ = numerics.code_range(qtype)
        return Range(scale, jnp.full(scale.shape, low, numerics.storage_dtype(qtype)))
    assert leaves.scale is not None
    scale = learned_quant.positive_scale(leaves.scale, dtype)
    scale = numerics.scale_in_dtype(scale, dtype)
    if leaves.offset is None:
        return Range(scale, None)
    return Range(scale, learned_quant.offset_zero_point(scale, leaves.offset, qtype))


def check_finite(leaf: Leaf, value: Any) -> None:
    """Complains of a leaf that has diverged.

    Raises:
      ValueError: if it holds NaN or an infinity.
    """
    if isinstance(value, core.Tracer | jax.ShapeDtypeStruct):
        return
    if not np.isfinite(np.asarray(processes.whole(value), np.float32)).all():
        raise ValueError(
            f"Param {'/'.join(leaf.path)!r}, a learned scale, is not finite: training "
            "has diverged. Train it with a smaller learning rate than the weights."
        )


def _missing(leaf: Leaf, method: str) -> ValueError:
    remedy = (
        "Make it with attach(state, rules, *inputs), or for params attach(params, "
        "rules, *inputs, model=model); a model of quantize_model(model, "
        "QtProvider(rules)) has it from init."
    )
    return leaf.missing("learned scale", f"a rule with {method}", remedy)


def fitted(leaf: Leaf, value: Any, shape: tuple[int, ...]) -> Any:
    """The value of a leaf of an activation, in the layout of the leaf.

    A leaf for whole activations also fits those with fewer axes, such as within a
    `vmap` over examples.

    Args:
      leaf: the leaf.
      value: its value among the params.
      shape: its shape.

    Raises:
      ValueError: if it has another number of elements.
    """
    if math.prod(value.shape) != math.prod(shape):
        leaf.check_shape(value, shape)
    return value if value.shape == shape else value.reshape(shape)

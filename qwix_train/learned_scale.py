"""Scales that are trained, among the params.

They are leaves of the tree of params. That of a weight stands next to it:
`params["Dense_0"]["kernel_scale"]`, in the layout of a scale. Those of an activation
stand in the dictionary of the module, named after the op and the operand:
`params["Dense_0"]["dot_general0_lhs_scale"]`; with LSQ+ there is
`dot_general0_lhs_offset`, too, the value of the lowest code, and with PACT
`dot_general0_lhs_alpha` alone, the clipping level.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import core
from jax import numpy as jnp

from qwix_train import stored
from qwix_train.core import learned_quant, numerics
from qwix_train.core.how import HowToQuantize, is_learned, needs_zero_point
from qwix_train.planning import OpPlan, ParamPlan, Path, Plan
from qwix_train.static_range import Range, scale_path, zero_point_path
from qwix_train.trace.analyze import Key
from qwix_train.trace.function import TracedCall

# The leaves of an activation, by the method that trains them.
PARTS = {"lsq": ("scale",), "lsq+": ("scale", "offset"), "pact": ("alpha",)}

_ACT_LEAF = re.compile(r"(.*\d_(?:lhs|rhs))_(?:scale|offset|alpha)")


class Leaves(NamedTuple):
    """The trained leaves of an activation; None for those its method does not have.

    All have the layout of a scale, with an axis in front for layers under `scan`.
    """

    scale: jax.Array | None = None
    offset: jax.Array | None = None
    alpha: jax.Array | None = None

    @property
    def method(self) -> str:
        """The method that trains them; empty if they are of none."""
        names = tuple(
            n for n, x in zip(self._fields, self, strict=True) if x is not None
        )
        return next((method for method, parts in PARTS.items() if parts == names), "")


def part_path(path: Path, part: str) -> Path:
    """The path of a leaf of an activation, from that of its range."""
    return (*path[:-1], f"{path[-1]}_{part}")


def range_path(path: Path) -> Path | None:
    """The path of the range that a leaf of an activation is of; None if it is none."""
    match = _ACT_LEAF.fullmatch(path[-1])
    return None if match is None else (*path[:-1], match[1])


def weight_scale_path(path: Path) -> Path:
    """The path of the scale of a param.

    Raises:
      ValueError: if there is no place for one.
    """
    if not path:
        raise ValueError(
            "The params are one array, so that a learned scale has no place beside it: "
            "put it in a dictionary."
        )
    return scale_path(path)


def leaves_at(path: Path, named: Mapping[Path, Any]) -> Leaves:
    """The leaves of an activation that are among the params.

    Args:
      path: the path of its range.
      named: the params, by path.
    """
    found = [named.get(part_path(path, part)) for part in Leaves._fields]
    # A model that is quantized has a range under the name of one.
    return Leaves(*(None if stored.is_quantized(leaf) else leaf for leaf in found))


def by_path(path: Path, leaves: Leaves) -> dict[Path, Any]:
    """The leaves of an activation that there are, each by its path.

    Args:
      path: the path of its range.
      leaves: the leaves.
    """
    parts = leaves._asdict().items()
    return {part_path(path, part): leaf for part, leaf in parts if leaf is not None}


def is_leaf(path: Path, paths: Any) -> bool:
    """Whether a path is that of a trained leaf.

    Args:
      path: the path.
      paths: the paths of all params.
    """
    if not path:
        return False
    name = path[-1]
    beside = name.endswith("_scale") and (*path[:-1], name[:-6]) in paths
    return beside or range_path(path) is not None


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
    path = weight_scale_path(plan.path)
    scale = stored.unbox(named.get(path))
    if scale is None:
        method = f"weight_calibration_method={plan.how.calibration_method!r}"
        raise ValueError(_missing(path, plan.path, method))
    _check_shape(path, scale, plan.how.scale_shape(plan.shape))
    return scale


def act_leaves(plan: OpPlan, side: int, named: Mapping[Path, Any]) -> Leaves:
    """The trained leaves of an operand of an op.

    Args:
      plan: what happens to the op.
      side: 0 for its left operand, 1 for its right one.
      named: the inputs of the traced call, by path.

    Raises:
      ValueError: if one is missing, or of another shape.
    """
    how, path = plan.activations[side], plan.range_path(side)
    assert how is not None
    shape = (*plan.op.layers, *how.scale_shape(plan.op.operands[side].shape))
    found = {}
    for part in PARTS[plan.learned]:
        leaf = part_path(path, part)
        if leaf not in named:
            method = f"act_calibration_method={plan.learned!r}"
            raise ValueError(_missing(leaf, path, method))
        found[part] = fitted(leaf, stored.unbox(named[leaf]), shape)
    return Leaves(**found)


def given_parts(path: Path, traced: TracedCall) -> tuple[Any, Any] | None:
    """The scale and zero point that stand beside a param, from whatever training.

    A leaf that the model computes with is its own, whatever its name.

    Args:
      path: the path of the param.
      traced: the call that takes it.

    Returns:
      None if there is no scale; the zero point is None if there is none.
    """
    named = traced.named
    if not path or scale_path(path) not in named or scale_path(path) in traced.read:
        return None
    return named[scale_path(path)], named.get(zero_point_path(path))


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
    for name, part in zip(
        (scale_path(path), zero_point_path(path)), parts, strict=True
    ):
        if part is None:
            continue
        if tuple(part.shape) != expected:
            raise ValueError(
                f"Param {'/'.join(name)!r} has shape {tuple(part.shape)}, and the rule "
                f"of {'/'.join(path)!r} gives that scales of shape {expected}."
            )
        check_finite(name, part)
    scale, zero_point = parts
    scale = learned_quant.positive_scale(jnp.asarray(scale), dtype)
    scale = numerics.scale_in_dtype(scale, dtype)
    if needs_zero_point(how.calibration_method):
        zero = jnp.zeros(scale.shape) if zero_point is None else zero_point
        zero_point = numerics.round_to_qtype(jnp.asarray(zero, float), how.qtype)
    elif zero_point is not None:
        raise ValueError(
            f"Param {'/'.join(path)!r} has a zero point next to it, and its rule "
            f"(weight_calibration_method={how.calibration_method!r}) none."
        )
    return Range(scale, zero_point)


def with_leaves(
    given: Mapping[Key, Sequence[Any]], plan: Plan, named: Mapping[Path, Any]
) -> dict[Key, Sequence[Any]]:
    """What ops are given, with the trained leaves of their activations.

    Args:
      given: what ops without such leaves are given.
      plan: the plan.
      named: the inputs of the traced call, by path.
    """
    learned = {
        op.op.key: [
            None if how is None else act_leaves(op, side, named)
            for side, how in enumerate(op.activations)
        ]
        for op in plan.quantized_ops
        if op.learned
    }
    return {**given, **learned}


def fake_quantize_weight(
    array: jax.Array, scale: jax.Array, *, how: HowToQuantize
) -> jax.Array:
    """The values of a weight on the grid of its trained scale.

    Args:
      array: the weight.
      scale: its scale.
      how: how it is quantized.
    """
    _, levels = numerics.code_range(how.qtype)
    shared = array.size / max(scale.size, 1)
    factor = learned_quant.gradient_scale(shared, levels)
    return learned_quant.lsq(array, how.qtype, scale, gradient_scale=factor)


def weight_transform(how: HowToQuantize) -> Any:
    """A function of a weight and its scale; see `fake_quantize_weight`."""
    return functools.partial(fake_quantize_weight, how=how)


def fake_quantize_activation(
    array: jax.Array, how: HowToQuantize, leaves: Leaves
) -> jax.Array:
    """The values of an activation on the grid of its trained leaves.

    The features that LSQ scales gradients by are those of one example, where the first
    axis is that of the batch.

    Args:
      array: the activation.
      how: how it is quantized.
      leaves: its leaves, in one layer.
    """
    if leaves.alpha is not None:
        return learned_quant.pact(array, how.qtype, leaves.alpha)
    assert leaves.scale is not None
    low, high = numerics.code_range(how.qtype)
    of_example = array.shape[1:] if array.ndim > 1 else array.shape
    features = math.prod(of_example) / max(leaves.scale.size, 1)
    if leaves.offset is None:
        factor = learned_quant.gradient_scale(features, high)
        return learned_quant.lsq(array, how.qtype, leaves.scale, gradient_scale=factor)
    factor = learned_quant.gradient_scale(features, high - low)
    return learned_quant.lsq_plus(
        array, how.qtype, leaves.scale, leaves.offset, gradient_scale=factor
    )


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


def check_finite(path: Path, leaf: Any) -> None:
    """Complains of a leaf that has diverged.

    Raises:
      ValueError: if it holds NaN or an infinity.
    """
    if isinstance(leaf, core.Tracer | jax.ShapeDtypeStruct):
        return
    if not np.isfinite(np.asarray(leaf, np.float32)).all():
        raise ValueError(
            f"Param {'/'.join(path)!r}, a learned scale, is not finite: training has "
            "diverged. Train it with a smaller learning rate than the weights."
        )


def _missing(path: Path, owner: Path, method: str) -> str:
    return (
        f"There is no learned scale for {'/'.join(owner)!r}, and a rule with "
        f"{method} asks for one: {'/'.join(path)!r} is not among the params. Make it "
        "with qat.attach_learned_scales(model, params, rules, *inputs), or for a train "
        "state qat.with_learned_scales(state, rules, *inputs); a model of "
        "quantize_model(model, QtProvider(rules)) has it from init."
    )


def fitted(path: Path, leaf: Any, shape: tuple[int, ...]) -> Any:
    """A leaf of an activation in the layout of one.

    A leaf for whole activations also fits those with fewer axes, such as within a
    `vmap` over examples.

    Args:
      path: the path of the leaf.
      leaf: the leaf.
      shape: its shape.

    Raises:
      ValueError: if it is of another shape.
    """
    if math.prod(leaf.shape) == math.prod(shape):
        return leaf if leaf.shape == shape else leaf.reshape(shape)
    _check_shape(path, leaf, shape)
    return leaf


def _check_shape(path: Path, leaf: Any, shape: tuple[int, ...]) -> None:
    if tuple(leaf.shape) != tuple(shape):
        raise ValueError(
            f"Param {'/'.join(path)!r}, a learned scale, has shape "
            f"{tuple(leaf.shape)}, and its rule gives it {tuple(shape)}: it was made "
            "with other rules, or for another model."
        )

"""Scales that stand among the params, and are not computed from them.

Training may find the scales of a quantized model. A learned scale is a leaf among the
params (see `learned_scale`), and an optimizer that ends on a grid puts the scale of the
grid there, under the same name. Wherever float params are quantized, here and in
training (`qat.fake_quantized`), a weight `kernel` with a `kernel_scale` next to it is
quantized with exactly this scale, and with a `kernel_zero_point` if there is one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from qwix_train.core.calibration import check_quantizable
from qwix_train.core.errors import located
from qwix_train.core.how import HowToQuantize, is_learned, needs_zero_point
from qwix_train.core.qarray import WithAux
from qwix_train.planning import learned_scale, static_range
from qwix_train.planning.leaves import Path, range_of, scale_path, zero_point_path
from qwix_train.planning.plan import Plan
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


@dataclasses.dataclass(frozen=True)
class GivenScales:
    """The scales that are among params.

    Attributes:
      weights: the scale and the zero point (or None) of params, by path.
      ranges: the scales and zero points of activations in the quantized model, by path.
      used: the paths of the leaves that these come from.
    """

    weights: Mapping[Path, tuple[Any, Any]]
    ranges: Mapping[Path, Any]
    used: frozenset[Path]

    def quantized(self, path: Path, param: Any, how: HowToQuantize) -> WithAux | None:
        """A param that is quantized with the scale that is given for it.

        Args:
          path: its path.
          param: a float array, or the shape of one.
          how: how it is quantized.

        Returns:
          The quantized param; None if no scale is given.

        Raises:
          ValueError: if the param cannot be quantized, or the scale does not fit it,
            or is not finite.
        """
        if path not in self.weights:
            return None
        with located(f"Param {'/'.join(path)!r}"):
            check_quantizable(param)
        shape, dtype = param.shape, param.dtype
        find = functools.partial(
            learned_scale.given_range, path, how=how, shape=shape, dtype=dtype
        )
        if isinstance(param, jax.ShapeDtypeStruct):
            jax.eval_shape(find, self.weights[path])
            return stored.quantize_param(param, how)
        scale, zero_point = find(self.weights[path])
        return stored.quantize_param(param, how, scale, zero_point)


def among_params(
    params: Mapping[Path, Any], quantized: Mapping[Path, Any]
) -> GivenScales:
    """The scales that are among params which are to be quantized.

    Args:
      params: the params, by path.
      quantized: those of the quantized model, by path.

    Raises:
      ValueError: if a range does not fit the model, or a scale is not finite.
    """
    weights, ranges, used = {}, {}, set()
    for path, target in quantized.items():
        if not stored.is_quantized(target) or not path:
            continue
        if isinstance(target.array, stored.QUANTIZED_ARRAYS):
            beside = _beside(path)
            if {path, beside[0]} <= params.keys() and beside[0] not in quantized:
                weights[path] = tuple(params.get(p) for p in beside)
                used |= {p for p in beside if p in params}
            continue
        path, other = range_of(path), target.learned_as
        # The params may stand in a collection, or in those of a larger model.
        others = [path[:count] + other for count in range(len(path)) if other]
        for owner in (path, *others):
            leaves = learned_scale.leaves_at(owner, params)
            if leaves.method:
                known = WithAux(target.array, target.how)
                ranges |= _range(path, owner, leaves, known)
                used |= {leaf.path for leaf in learned_scale.each(owner, leaves)}
                break
    return GivenScales(weights, ranges, frozenset(used))


def among_inputs(traced: TracedCall, plan: Plan) -> GivenScales:
    """The scales that are among the inputs of a call with float params.

    Args:
      traced: the call.
      plan: what the rules do to it.

    Raises:
      ValueError: see `among_params`.
    """
    named = traced.named
    weights, ranges, used = {}, {}, set()
    for path, param in plan.params.items():
        parts = learned_scale.given_parts(path, traced)
        if param.how is not None and parts is not None:
            weights[path] = parts
            used |= {p for p in _beside(path) if p in named}
    for static in static_range.static_operands(plan):
        owner = learned_scale.leaves_path(static.op, static.side, named)
        leaves = learned_scale.leaves_at(owner, named)
        if static.op.learned and leaves.method:
            shape = jax.ShapeDtypeStruct(static.scale_shape, static.operand.dtype)
            shape = jax.eval_shape(static.op.as_stored, shape)
            ranges |= _range(static.path, owner, leaves, static.with_how(shape))
            used |= {leaf.path for leaf in learned_scale.each(owner, leaves)}
    return GivenScales(weights, ranges, frozenset(used))


def check_learned(path: Path, how: HowToQuantize) -> None:
    """Complains of a param that lacks the scale that its rule trains.

    Raises:
      ValueError: if its rule trains a scale.
    """
    if is_learned(how.calibration_method):
        raise ValueError(
            f"Param {'/'.join(path)!r} has no scale: its rule has "
            f"weight_calibration_method={how.calibration_method!r}, which trains one, "
            "and there is none next to it. Give params with those "
            "of attach(state, rules, *inputs), or quantize with rules of another "
            "method."
        )


def _beside(path: Path) -> tuple[Path, Path]:
    return scale_path(path), zero_point_path(path)


def _range(
    path: Path, owner: Path, leaves: learned_scale.Leaves, target: WithAux
) -> dict[Path, Any]:
    """The scale and zero point that a range is in a quantized model, by path.

    Args:
      path: the path of the range there.
      owner: the path of the range that its leaves are named after.
      leaves: the leaves.
      target: the scale in the quantized model, or its shape.
    """
    how, dtype = target.how, target.dtype
    for leaf, value in learned_scale.each(owner, leaves).items():
        learned_scale.check_finite(leaf, value)

    def stored_range(leaves):
        fitted = {
            leaf.part: learned_scale.fitted(leaf, value, target.shape)
            for leaf, value in learned_scale.each(owner, leaves).items()
        }
        return learned_scale.stored_range(
            learned_scale.Leaves(**fitted), how.qtype, dtype
        )

    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    found = jax.eval_shape(stored_range, leaves) if abstract else stored_range(leaves)
    if needs_zero_point(how.calibration_method) != (found.zero_point is not None):
        raise ValueError(
            f"{'/'.join(owner)!r} has the learned leaves of {leaves.method!r}, and its "
            f"rule in the quantized model another act_calibration_method: give both "
            "the same rules."
        )
    values: dict[Path, Any] = {}
    values[scale_path(path)] = dataclasses.replace(target, array=found.scale)
    if found.zero_point is not None:
        values[zero_point_path(path)] = found.zero_point
    return values

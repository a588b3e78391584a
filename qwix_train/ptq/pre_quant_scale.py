"""Scales of the input channels of a product, applied before anything is rounded.

A product is the same with its input channels scaled and its weight scaled back:

    y = x @ w = (x * p) @ (w / p)

The weight is stored as the codes of ``w / p``. The scale ``p`` is kept next to the
params of the module that runs the op. Like a static range, it is named after the op and
the operand: ``params["Dense_0"]["dot_general0_lhs_pre_quant_scale"]``. Its shape
broadcasts against the activation. For layers that are scanned over it has an axis in
front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.planning import weights
from qwix_train.planning.leaves import Leaf, Path, pre_quant_scale_path
from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.trace.analyze import Op


def weight_side(op: Op) -> int | None:
    """Which operand of a product is the weight; None unless exactly one is."""
    sides = {side for side, _ in weights.weights_of(op)}
    return sides.pop() if len(sides) == 1 and ops.is_product(op.primitive) else None


def scale_shape(op: Op, side: int) -> tuple[int, ...]:
    """The shape of the scale of an operand: its contracted and its batched axes.

    Args:
      op: the product.
      side: 0 for its left operand, 1 for its right one.
    """
    shape = op.operands[side].shape
    scaled = ops.kind_of(op).scaled_axes(op.params, side, len(shape))
    own = (size if axis in scaled else 1 for axis, size in enumerate(shape))
    return (*op.layers, *own)


def initial(plan: Plan) -> dict[Path, jax.Array]:
    """Scales of 1 for the input of every product that reads one quantized weight."""
    scales = {}
    for op in plan.quantized_ops:
        side = weight_side(op.op)
        if side is None or not op.weights:
            continue
        kind, operand = ops.kind_of(op.op), op.op.operands[1 - side]
        if not kind.scaled_axes(op.op.params, 1 - side, len(operand.shape)):
            continue
        scale = jnp.ones(scale_shape(op.op, 1 - side), operand.dtype)
        path = pre_quant_scale_path(op.range_path(1 - side))
        scales[path] = op.as_stored(scale)
    return scales


def scales_of(plan: OpPlan, named: Mapping[Path, Any]) -> list[jax.Array | None]:
    """The scales of the operands of an op, from among the params.

    Args:
      plan: what happens to the op.
      named: the inputs of the traced call, by path.

    Raises:
      ValueError: if a scale does not have the shape that its operand needs.
    """
    scales: list[jax.Array | None] = [None] * len(plan.op.operands)
    for side in range(ops.kind_of(plan.op).sides):
        leaf = Leaf(plan.range_path(side), "pre_quant_scale")
        scale = leaf.among(named)
        if scale is not None:
            shape = scale_shape(plan.op, side)
            wanted = plan.as_stored(jnp.empty(shape))
            leaf.check_shape(scale, wanted.shape)
            scales[side] = plan.layers_first(scale)
    return scales

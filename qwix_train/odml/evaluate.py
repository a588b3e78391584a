"""Runs a planned graph with its tensors quantized, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train.core.how import HowToQuantize
from qwix_train.odml import ops
from qwix_train.odml.fusion import Fusion, weight_axes, weight_channels
from qwix_train.odml.graph import Node, Read
from qwix_train.odml.ops import Kind
from qwix_train.odml.plan import NodePlan, OdmlPlan, TensorPlan


class Quantizer:
    """What is done to the arrays of a graph: nothing, unless a subclass says so.

    Attributes:
      folds: whether weights with one scale have what follows multiplied in.
    """

    folds = False

    def tensor(self, plan: TensorPlan, x: jax.Array, observed: Any) -> jax.Array:
        """A tensor with a range of its own.

        Args:
          plan: what happens to it.
          x: its value.
          observed: what its range is to be measured of.
        """
        del plan, observed
        return x

    def rounded(self, plan: TensorPlan, x: jax.Array, rounding: str) -> jax.Array:
        """A tensor with a range that it shares, and values in between."""
        del plan, rounding
        return x

    def operand(self, plan: NodePlan, side: int, x: jax.Array) -> jax.Array:
        """An operand that an operation quantizes: one of `NodePlan.quantized_sides`."""
        del plan, side
        return x


def run_plan(plan: OdmlPlan, values: Sequence[Any], quantizer: Quantizer) -> list[Any]:
    """The results of a planned graph.

    Args:
      plan: the plan.
      values: an array for each input of the traced call.
      quantizer: what to do to the tensors.
    """
    inputs = []
    for value, x in zip(plan.graph.inputs, values, strict=True):
        tensor = plan.tensor(value)
        if tensor is not None:
            x = quantizer.tensor(tensor, x, tensor.observed(x))
        inputs.append(x)

    def evaluate(node: Node, read: Read) -> list[Any]:
        node_plan = plan.of(node)
        if node_plan is None:
            return node.run(*map(read, node.inputs))
        first = plan.first_of(node_plan)
        if (
            first.folds
            and quantizer.folds
            and first.fusion is not None
            and node is first.fusion.affine[-1]
        ):
            results = [_folded(first, read, quantizer)]
        elif node_plan.name == "silu" and node_plan.in_integers:
            results = [_silu(node_plan, read(node.inputs[0]), quantizer)]
        else:
            operands = list(map(read, node.inputs))
            for side in node_plan.quantized_sides:
                if not (side == node_plan.weight and node_plan.folds):
                    operands[side] = quantizer.operand(node_plan, side, operands[side])
            results = node.run(*operands)
        return [
            _output(plan, node_plan, value, x, quantizer)
            for value, x in zip(node.outputs, results, strict=True)
        ]

    return plan.graph.run(inputs, evaluate)


def _output(plan, node_plan, value, x, quantizer) -> Any:
    tensor = plan.tensor(value)
    if tensor is None:
        if node_plan.in_integers and node_plan.kind in (Kind.ROUNDED, Kind.CLIP):
            shared = plan.range_of(value)
            if isinstance(shared, TensorPlan):
                return quantizer.rounded(shared, x, node_plan.spec.rounding)
        return x
    return quantizer.tensor(tensor, x, tensor.observed(x))


def _silu(node_plan, x, quantizer) -> Any:
    sigmoid = jax.nn.sigmoid(x)
    return x * quantizer.tensor(sigmoid_in(node_plan), sigmoid, sigmoid)


def sigmoid_in(plan: NodePlan) -> TensorPlan:
    """The sigmoid in a SiLU, a tensor of its own in LiteRT."""
    assert plan.rule is not None
    spec = ops.OPS["sigmoid"]
    return TensorPlan(
        plan.node.out,
        (),
        HowToQuantize(qtype="int8", calibration_method="minmax"),
        plan.rule,
        plan.act_qtype,
        scale=spec.scale,
        zero_point=spec.zero_point,
    )


def fold(fusion: Fusion, read: Read) -> tuple[Any, Any]:
    """The factor and the addend, for each channel, of what follows a product.

    Args:
      fusion: the product, and what follows.
      read: gives the array of a constant.

    Returns:
      `factor` and `addend` in `product * factor + addend`, in shapes that broadcast to
      that of the product; None for a factor of 1 or an addend of 0.
    """
    factor, addend = None, None
    value = fusion.anchor.out
    for node in fusion.affine:
        name = ops.op_name(node.name)
        side = next(i for i, x in enumerate(node.inputs) if x is value)
        other = read(node.inputs[1 - side])
        if name == "multiply":
            factor = other if factor is None else factor * other
            addend = None if addend is None else addend * other
        elif name == "add":
            addend = other if addend is None else addend + other
        elif side == 0:
            addend = -other if addend is None else addend - other
        else:
            factor = -1.0 if factor is None else -factor
            addend = other if addend is None else other - addend
        value = node.out
    return factor, addend


def scaled_weight(node: Node, side: int, w: Any, factor: Any) -> Any:
    """A weight with a factor for each channel of the output multiplied in.

    Args:
      node: the product.
      side: the side of the weight.
      w: the weight.
      factor: broadcasts to the output.
    """
    if factor is None:
        return w
    axes = weight_axes(node, side)
    # The axes of the output that the weight decides on, in the order of its own.
    shape = [n if axis in axes else 1 for axis, n in enumerate(w.shape)]
    return w * per_channel(node, jnp.asarray(factor, w.dtype)).reshape(shape)


def per_channel(node: Node, x: Any) -> jax.Array:
    """What broadcasts to the output of a product, for each of the weight's channels."""
    channels = weight_channels(node)
    assert channels is not None
    lengths = [n if a in channels else 1 for a, n in enumerate(node.out.shape)]
    return jnp.broadcast_to(x, lengths)


def _folded(plan: NodePlan, read: Read, quantizer: Quantizer) -> Any:
    """A product with what follows folded into its weight (arXiv 1806.08342, 3.2.2)."""
    fusion, node, side = plan.fusion, plan.node, plan.weight
    assert fusion is not None and side is not None
    factor, addend = fold(fusion, read)
    operands = list(map(read, node.inputs))
    w = scaled_weight(node, side, operands[side], factor)
    operands[side] = quantizer.operand(plan, side, w)
    (out,) = node.run(*operands)
    return out if addend is None else out + addend

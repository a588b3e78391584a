"""Runs a planned graph with its tensors quantized, or measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import numpy as jnp

from qwix_train.core.how import HowToQuantize
from qwix_train.odml import ops
from qwix_train.odml.fusion import Fusion, weight_channels
from qwix_train.odml.graph import Node, Value
from qwix_train.odml.ops import Kind
from qwix_train.odml.plan import NodePlan, OdmlPlan, TensorPlan
from qwix_train.ops import by_name

Read = Callable[[Value], Any]


class Quantizer(Protocol):
    """What is done to the arrays of a graph."""

    per_tensor_weights: bool

    def tensor(self, plan: TensorPlan, x: jax.Array, observed: Any) -> jax.Array:
        """A tensor with a range of its own.

        Args:
          plan: what happens to it.
          x: its value.
          observed: what its range is to be measured of.
        """
        ...

    def rounded(self, plan: TensorPlan, x: jax.Array, rounding: str) -> jax.Array:
        """A tensor with a range that it shares, and values in between."""
        ...

    def weight(
        self, plan: NodePlan, w: jax.Array, channels: Sequence[int]
    ) -> jax.Array:
        """A weight, with a scale for each index along some axes."""
        ...

    def constant(self, plan: NodePlan, x: jax.Array) -> jax.Array:
        """Another constant operand."""
        ...

    def dynamic(self, plan: NodePlan, x: jax.Array) -> jax.Array:
        """An activation that is quantized when it runs."""
        ...


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
        first = node_plan.fused_into
        if (
            first is not None
            and quantizer.per_tensor_weights
            and node is _last_affine(first.fusion)
            and first.weight is not None
        ):
            results = [_folded(first, read, quantizer)]
        elif node_plan.name == "silu" and node_plan.quantized:
            results = [_silu(node_plan, read(node.inputs[0]), quantizer)]
        else:
            operands = _operands(plan, node_plan, read, quantizer)
            results = node.run(*operands)
        return [
            _output(plan, node_plan, value, x, quantizer)
            for value, x in zip(node.outputs, results, strict=True)
        ]

    return plan.graph.run(inputs, evaluate)


def weight_axes(node: Node, side: int) -> tuple[int, ...]:
    """The axes of a weight that have a scale for each index."""
    if weight_channels(node) is None:
        return ()
    return _channelwise(node, side)


def _channelwise(node: Node, side: int) -> tuple[int, ...]:
    kind = by_name(node.name)
    assert kind is not None
    return kind.channelwise(node.params, side, len(node.inputs[side].shape))


def _operands(plan, node_plan, read, quantizer) -> list[Any]:
    node = node_plan.node
    operands = list(map(read, node.inputs))
    side = node_plan.weight
    if node_plan.fused_into is not None:
        return operands
    if side is not None:
        if node_plan.name == "take":
            operands[side] = quantizer.constant(node_plan, operands[side])
        else:
            fusion = node_plan.fusion
            if fusion is None or not fusion.affine or not quantizer.per_tensor_weights:
                channels = weight_axes(node, side)
                if quantizer.per_tensor_weights:
                    channels = ()
                operands[side] = quantizer.weight(node_plan, operands[side], channels)
        if node_plan.dynamic:
            operands[1 - side] = quantizer.dynamic(node_plan, operands[1 - side])
        return operands
    for side in node_plan.constants:
        operands[side] = quantizer.constant(node_plan, operands[side])
    return operands


def _output(plan, node_plan, value, x, quantizer) -> Any:
    tensor = plan.tensor(value)
    if tensor is None:
        spec = node_plan.spec
        if spec is not None and spec.kind in (Kind.ROUNDED, Kind.CLIP):
            shared = plan.range_of(value)
            if node_plan.quantized and isinstance(shared, TensorPlan):
                return quantizer.rounded(shared, x, spec.rounding)
        return x
    return quantizer.tensor(tensor, x, tensor.observed(x))


def _silu(node_plan, x, quantizer) -> Any:
    sigmoid = jax.nn.sigmoid(x)
    return x * quantizer.tensor(sigmoid_in(node_plan), sigmoid, sigmoid)


def sigmoid_in(plan: NodePlan) -> TensorPlan:
    """The sigmoid in a SiLU, a tensor of its own in LiteRT."""
    assert plan.rule_index is not None
    spec = ops.OPS["sigmoid"]
    return TensorPlan(
        plan.node.out,
        (),
        HowToQuantize(qtype="int8", calibration_method="minmax"),
        plan.rule_index,
        plan.act_qtype,
        scale=spec.scale,
        zero_point=spec.zero_point,
    )


def _last_affine(fusion: Fusion | None) -> Node | None:
    return fusion.affine[-1] if fusion is not None and fusion.affine else None


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
    factor = jnp.asarray(factor, w.dtype)
    ndim = len(node.out.shape)
    factor = factor.reshape((1,) * (ndim - factor.ndim) + factor.shape)
    channels = weight_channels(node)
    assert channels is not None
    factor = jnp.broadcast_to(
        factor, [n if a in channels else 1 for a, n in enumerate(node.out.shape)]
    )
    axes = weight_axes(node, side)
    # The axes of the output that the weight decides on, in the order of its own.
    shape = [n if axis in axes else 1 for axis, n in enumerate(w.shape)]
    return w * factor.reshape(shape)


def _folded(plan: NodePlan, read: Read, quantizer: Quantizer) -> Any:
    """A product with what follows folded into its weight (arXiv 1806.08342, 3.2.2)."""
    fusion, node, side = plan.fusion, plan.node, plan.weight
    assert fusion is not None and side is not None
    factor, addend = fold(fusion, read)
    operands = list(map(read, node.inputs))
    w = scaled_weight(node, side, operands[side], factor)
    operands[side] = quantizer.weight(plan, w, ())
    (out,) = node.run(*operands)
    return out if addend is None else out + addend


def dynamic_axes(plan: NodePlan) -> tuple[int, ...]:
    """The axes of an activation along which each index has a range when it runs.

    They are those that LiteRT has: the rows of a matrix, the images of a batch.
    """
    return _channelwise(plan.node, 1 - (plan.weight or 0))

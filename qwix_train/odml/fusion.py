"""Which operations LiteRT runs as one: a product with its bias, norm and activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from qwix_train.odml import ops
from qwix_train.odml.graph import Node, Value
from qwix_train.odml.ops import Kind
from qwix_train.ops import CONV, DOT, by_name


@dataclasses.dataclass(eq=False)
class Fusion:
    """Operations that run as one, without a tensor in between.

    Attributes:
      anchor: the first: a product with a weight, or a sum.
      affine: sums and products with constants, for each channel, that follow.
      activation: the activation function in the end, or None.
    """

    anchor: Node
    affine: tuple[Node, ...]
    activation: Node | None

    @property
    def rest(self) -> tuple[Node, ...]:
        """All but the anchor."""
        last = () if self.activation is None else (self.activation,)
        return (*self.affine, *last)

    @property
    def end(self) -> Node:
        """The last."""
        return self.rest[-1]


def find_fusions(nodes: Sequence[Node], ignored: Collection[int]) -> list[Fusion]:
    """The operations that LiteRT runs as one.

    Args:
      nodes: the operations that compute activations, in order.
      ignored: the ids of operations that a converted model does not have.
    """
    found = []
    for node in nodes:
        name = ops.op_name(node.name)
        spec = ops.OPS.get(name)
        if spec is None or not spec.fuses or not node.out.is_float:
            continue
        channels = weight_channels(node) if name in ops.PRODUCTS else None
        if name in ops.PRODUCTS and channels is None:
            continue
        affine: list[Node] = []
        value = node.out
        while channels and (follower := _only_reader(value, ignored)) is not None:
            if not _is_affine(follower, value, channels):
                break
            affine.append(follower)
            value = follower.out
        last = _only_reader(value, ignored)
        if last is not None:
            spec = ops.OPS.get(ops.op_name(last.name))
            if spec is None or spec.kind is not Kind.ACTIVATION:
                last = None
        if affine or last is not None:
            found.append(Fusion(node, tuple(affine), last))
    # A sum that a product does is no first operation of its own.
    inner = {id(n) for fusion in found for n in fusion.affine}
    return [fusion for fusion in found if id(fusion.anchor) not in inner]


def weight_channels(node: Node) -> tuple[int, ...] | None:
    """The axes of the output of a product that only its weight decides on.

    Returns:
      None if neither operand, or both, are weights, or the weight has batch axes, so
      that LiteRT multiplies two tensors.
    """
    side = weight_side(node)
    if side is None:
        return None
    if node.name in CONV.names:
        return (node.params["dimension_numbers"].out_spec[1],) if side == 1 else None
    axes = DOT.axes(node.params, 0, len(node.inputs[0].shape))
    if axes.batch:
        return None
    first = len(axes.kept)
    return tuple(range(first) if side == 0 else range(first, len(node.out.shape)))


def weight_side(node: Node) -> int | None:
    """The side of the only operand of a product that is a constant, if one is."""
    static = [value.static for value in node.inputs[:2]]
    return static.index(True) if sum(static) == 1 else None


def weight_axes(node: Node, side: int) -> tuple[int, ...]:
    """The axes of the weight of a product that have a scale for each index."""
    return () if weight_channels(node) is None else channelwise(node, side)


def channelwise(node: Node, side: int) -> tuple[int, ...]:
    """The axes of an operand of a product that it does not contract."""
    kind = by_name(node.name)
    assert kind is not None
    return kind.channelwise(node.params, side, len(node.inputs[side].shape))


def _only_reader(value: Value, ignored: Collection[int]) -> Node | None:
    if value.is_output:
        return None
    readers = {id(node): node for node in value.consumers if id(node) not in ignored}
    readers = {
        key: node
        for key, node in readers.items()
        if not (node.place.in_batch_norm and not node.is_activation)
    }
    return next(iter(readers.values())) if len(readers) == 1 else None


def _is_affine(node: Node, value: Value, channels: Collection[int]) -> bool:
    """Whether a node adds or multiplies a constant for each channel."""
    if ops.op_name(node.name) not in ops.AFFINE or node.out.shape != value.shape:
        return False
    others = [x for x in node.inputs if x is not value]
    if len(others) != 1 or not others[0].static:
        return False
    return varying_axes(others[0], len(value.shape)) <= set(channels)


# Functions of each element, of which a constant varies where its operands do.
_ELEMENTWISE = frozenset(
    """abs add convert_element_type copy div exp integer_pow max min mul neg rsqrt sqrt
    square stop_gradient sub""".split()
)
_MOVES = frozenset(["reshape", "expand_dims", "squeeze"])


def varying_axes(value: Value, ndim: int) -> set[int]:
    """The axes along which the elements of a constant may differ.

    Whether an axis has length 1 does not decide: it may be that of the batch.

    Args:
      value: the constant.
      ndim: the number of axes of what it is combined with.
    """
    node = value.producer
    axes = {axis for axis, size in enumerate(value.shape) if size != 1}
    if node is None or node.name in _MOVES:
        pass
    elif node.name == "broadcast_in_dim":
        source = node.inputs[0]
        places = node.params["broadcast_dimensions"]
        inner = varying_axes(source, len(source.shape))
        axes = {place for axis, place in enumerate(places) if axis in inner}
    elif node.name in _ELEMENTWISE:
        axes = set()
        for source in node.inputs:
            axes |= varying_axes(source, len(value.shape))
    else:
        axes = set(range(len(value.shape)))
    return {axis + ndim - len(value.shape) for axis in axes}

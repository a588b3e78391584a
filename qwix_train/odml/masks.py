"""Elements that stand for minus infinity, as attention masks have them.

They are no part of a range: of a mask of -1e4 that is added to scores, the scores would
keep one code. Constants in a choice say what they are; what is added to scores on their
way to a softmax, such as a mask that is an input of the model, may hold such elements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax import numpy as jnp

from qwix_train.odml import ops
from qwix_train.odml.graph import Graph, Node, Value, known_value
from qwix_train.odml.ops import MASKED

_PASSES = (*ops.LAYOUT, *ops.AFFINE, "where", "truediv")

# All in terms of what a softmax reads. How far below all others an element counts as no
# part of it: what is left of it, exp(-8), is less than a tenth of a step of the output.
_MARGIN = 8.0
# How far from zero an element of a mask is put that is added to scores. LiteRT adds
# in 16 bits, counted in steps of the sum, whose range is at least that margin.
_FAR = 900.0
# The same where a mask holds other numbers than zeros, which need small steps, too:
# more than the scores differ among themselves.
_NEAR = 64.0


@dataclasses.dataclass(frozen=True)
class Mask:
    """What stands for minus infinity in a tensor.

    Attributes:
      factor: what elements are multiplied by on their way to a softmax; None if they
        lead elsewhere.
      below: elements that are not above it stand for minus infinity.
      added: whether the tensor is added to scores.
      certain: whether there may be such elements in a batch to come, even if there are
        none in this one.
    """

    factor: float | None
    below: float
    added: bool = False
    certain: bool = False

    def observed(self, x: Any) -> Any:
        """A tensor with something below all others in the place of minus infinity."""
        factor = self.factor or 1.0
        masked = x <= self.below
        kept = jnp.where(masked, 0, x)
        margin = _MARGIN / factor
        if self.added:
            # Zero has a code of its own in any range.
            margin = jnp.where((kept != 0).any(), _NEAR, _FAR) / factor
        low = jnp.min(kept, initial=0) - margin
        if self.certain:
            least = jnp.min(jnp.where(masked, jnp.inf, x), initial=jnp.inf)
            masked = masked | (x <= least)
        return jnp.where(masked, low.astype(x.dtype), x)


def _mask(factor: float | None, below: float, **options: bool) -> Mask:
    """A mask; on the way to a softmax, of what is nothing after it."""
    if factor is not None:
        below = -_FAR / 2 / factor
    return Mask(factor, below, **options)


def find_masks(graph: Graph) -> dict[int, Mask]:
    """What stands for minus infinity in the values of a graph, by their ids."""
    found: dict[int, Mask] = {}
    factors = _factors(graph)
    # What is made of inputs of the model alone, by nothing but sums and choices.
    raw = {id(v) for v in graph.inputs if v.is_activation}
    for node in graph.nodes:
        name = ops.op_name(node.name)
        floats = [v for v in node.inputs if v.is_float and v.is_activation]
        if not node.is_activation:
            continue
        if not floats or (name in _PASSES and all(id(v) in raw for v in floats)):
            raw.update(map(id, node.outputs))
        factor = factors.get(id(node.out))
        mask = None
        if name in _PASSES:
            mask = next((found[id(v)] for v in floats if id(v) in found), None)
        if mask is not None:
            certain = mask.certain and name in ops.LAYOUT
            mask = _mask(factor, mask.below * (_scale(node) or 1.0), certain=certain)
        elif name == "where" and any(map(_is_masked, node.inputs[1:])):
            mask = _mask(factor, MASKED, certain=True)
        elif name == "multiply" and any(map(_is_masked, node.inputs)):
            # Such as `(1 - kept) * -1e4`, if it is added to scores.
            mask = None if factor is None else _mask(factor, MASKED, certain=True)
        if name == "add" and len(floats) == 2 and factor is not None:
            for value in floats:
                if id(value) in raw and id(value) in factors:
                    given = found.get(id(value))
                    certain = given is not None and given.certain
                    mask = _mask(factor, MASKED, certain=certain)
                    added = dataclasses.replace(mask, added=True)
                    _mark(found, value, added, factors)
        if mask is not None:
            found.update((id(value), mask) for value in node.outputs)
    return found


def _mark(
    found: dict[int, Mask], value: Value, mask: Mask, factors: Mapping[int, float]
) -> None:
    """Marks a value that is added to scores, and what it is a view of."""
    found[id(value)] = mask
    node = value.producer
    if node is not None and ops.op_name(node.name) in ops.LAYOUT:
        if id(node.inputs[0]) in factors:
            _mark(found, node.inputs[0], mask, factors)


def _is_masked(value: Value) -> bool:
    return value.number is not None and value.number <= MASKED


def _scale(node: Node) -> float | None:
    """The positive number that a node multiplies by, if that is what it does."""
    name = ops.op_name(node.name)
    if name not in ("multiply", "truediv"):
        return None
    for value in node.inputs[1:] if name == "truediv" else node.inputs:
        known = known_value(value)
        if known is not None and known.size and (known == known.flat[0]).all():
            number = float(known.flat[0])
            if number > 0:
                return number if name == "multiply" else 1 / number
    return None


def _factors(graph: Graph) -> dict[int, float]:
    """What the values that only a softmax depends on are multiplied by before it."""
    found: dict[int, float] = {}
    for node in reversed(graph.nodes):
        for value in {id(v): v for v in node.inputs}.values():
            if value.is_output or not value.is_float or id(value) in found:
                continue
            ways = [_factor(found, reader, value) for reader in value.consumers]
            known = [way for way in ways if way is not None]
            if len(known) == len(ways):
                found[id(value)] = min(known)
    return found


def _factor(found: dict[int, float], node: Node, value: Value) -> float | None:
    """The factor of a value along one way to a softmax; None if it leads elsewhere."""
    name = ops.op_name(node.name)
    if name in ("softmax", "log_softmax"):
        return 1.0
    after = found.get(id(node.out))
    if after is None:
        return None
    if name in (*ops.LAYOUT, "add", "where"):
        return after
    if name == "subtract" and node.inputs[0] is value:
        return after
    scale = _scale(node)
    return None if scale is None else after * scale

"""Fake-quantizes with scales that are trained."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import flax.struct
import jax

from qwix_train.core import learned_quant, numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.stages.stage import At, Stage

# The leaves of an activation, by the method that trains them.
PARTS: dict[str, tuple[Literal["scale", "offset", "alpha"], ...]] = {
    "lsq": ("scale",),
    "lsq+": ("scale", "offset"),
    "pact": ("alpha",),
}


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


@flax.struct.dataclass
class LearnedWeight(Stage):
    """Gives the values of a weight on the grid of its trained scale.

    Attributes:
      how: how the weight is quantized.
      scale: its scale.
    """

    how: HowToQuantize = flax.struct.field(pytree_node=False)
    scale: jax.Array

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        _, levels = numerics.code_range(self.how.qtype)
        shared = x.size / max(self.scale.size, 1)
        factor = learned_quant.gradient_scale(shared, levels)
        return learned_quant.lsq(x, self.how.qtype, self.scale, gradient_scale=factor)

    def of_slice(self) -> LearnedWeight | None:
        """See `Stage.of_slice`."""
        how = self.how.of_slice()
        return how and LearnedWeight(how, self.scale)


@flax.struct.dataclass
class LearnedActivation(Stage):
    """Gives the values of an activation on the grid of its trained leaves.

    The features that LSQ scales gradients by are those of one example, where the first
    axis is that of the batch.

    Attributes:
      how: how the activation is quantized.
      leaves: its leaves.
    """

    how: HowToQuantize = flax.struct.field(pytree_node=False)
    leaves: Leaves

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        leaves, qtype = self.leaves, self.how.qtype
        if leaves.alpha is not None:
            return learned_quant.pact(x, qtype, leaves.alpha)
        assert leaves.scale is not None
        low, high = numerics.code_range(qtype)
        of_example = x.shape[1:] if x.ndim > 1 else x.shape
        features = math.prod(of_example) / max(leaves.scale.size, 1)
        if leaves.offset is None:
            factor = learned_quant.gradient_scale(features, high)
            return learned_quant.lsq(x, qtype, leaves.scale, gradient_scale=factor)
        factor = learned_quant.gradient_scale(features, high - low)
        return learned_quant.lsq_plus(
            x, qtype, leaves.scale, leaves.offset, gradient_scale=factor
        )

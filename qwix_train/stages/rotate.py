"""Rotates the operands of a product along what it contracts.

The input is rotated when it is read. A weight is rotated before it is quantized, and
its product takes it in that basis; everything else finds it in its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct

from qwix_train.core.how import HowToQuantize
from qwix_train.core.rotation import Rotation
from qwix_train.stages.stage import At, ParamStage, Stage
from qwix_train.trace import carried
from qwix_train.values.rotated import RotatedWeight


@flax.struct.dataclass
class Rotate(Stage):
    """Gives an array in a rotated basis."""

    rotation: Rotation = flax.struct.field(pytree_node=False)

    exact: ClassVar[bool] = True

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        return self.rotation.apply(x)

    def of_slice(self) -> Rotate | None:
        """See `Stage.of_slice`."""
        axis = self.rotation.axis
        return None if axis == 0 else Rotate(self.rotation.at(axis - 1))


@flax.struct.dataclass
class RotateWeight(Stage):
    """Gives a weight in a rotated basis, in which it may be already."""

    rotation: Rotation = flax.struct.field(pytree_node=False)

    exact: ClassVar[bool] = True
    takes_carried: ClassVar[bool] = True

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        if isinstance(x, RotatedWeight) and x.rotation == self.rotation:
            return x.base
        assert at is not None
        # It tells who listens: a quantized weight is dequantized here.
        return self.rotation.apply(carried.read(x, at.op.primitive))


@dataclasses.dataclass(frozen=True)
class InBasis(ParamStage):
    """Says that a param is in a rotated basis from here on."""

    rotation: Rotation

    exact: ClassVar[bool] = True

    def on_param(self, value: Any) -> RotatedWeight:
        """See `ParamStage.on_param`."""
        return RotatedWeight(value, self.rotation)


def in_basis(
    how: HowToQuantize, *stages: Stage | ParamStage
) -> tuple[Stage | ParamStage, ...]:
    """The stages of a param that is quantized in the basis that it is to have.

    Args:
      how: how it is quantized.
      *stages: what quantizes it.
    """
    if how.rotation is None:
        return stages
    return (Rotate(how.rotation), *stages, InBasis(how.rotation))

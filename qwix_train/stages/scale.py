"""Scales an operand."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

from qwix_train.stages.stage import At, Stage


@flax.struct.dataclass
class Scale(Stage):
    """Multiplies an array.

    Attributes:
      scale: what by, in a shape that broadcasts against the array.
    """

    scale: jax.Array

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        return x * self.scale.astype(x.dtype)

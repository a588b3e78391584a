"""Blends what stages make of an operand into the operand."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.stages.stage import At, Constant, Stage, applied, of_slice


def blend(x: jax.Array, quantized: jax.Array, amount: jax.Array) -> jax.Array:
    """``x + amount * (quantized - x)``, computed in float32 or wider.

    Args:
      x: any shape.
      quantized: in the shape and dtype of `x`.
      amount: a scalar from 0 to 1.

    Returns:
      The sum, in the dtype of `x`. The gradient goes through both terms.

    Example:
      >>> blend(jnp.array([0.4, 1.8]), jnp.array([0.0, 2.0]), 0.5)
      Array([0.2, 1.9], dtype=float32)
    """
    wide = numerics.compute_dtype(x.dtype)
    start = x.astype(wide)
    step = jnp.asarray(amount, wide) * (quantized.astype(wide) - start)
    return (start + step).astype(x.dtype)


@flax.struct.dataclass
class Blend(Stage):
    """Blends the result of stages into what they are applied to.

    Attributes:
      stages: the stages. They are applied even if nothing of them is blended in: they
        may collect a range.
      amount: how much of their result there is, a scalar from 0 to 1; nothing if None.
    """

    stages: tuple[Stage, ...]
    amount: Constant | None = flax.struct.field(pytree_node=False)

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        result = applied(self.stages, x, at)
        return x if self.amount is None else blend(x, result, self.amount.value)

    def of_slice(self) -> Blend | None:
        """See `Stage.of_slice`."""
        slices = of_slice(self.stages)
        return None if slices is None else Blend(slices, self.amount)

"""The values that codes stand for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core import numerics


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point"],
    meta_fields=["qtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The values that the codes of an array stand for: ``(code - zero_point) * scale``.

    Attributes:
        scale: The distance of two neighboring values: in a layout for the array, or in
            a shape that broadcasts to it.
        zero_point: The code of 0, in the shape of the scale; None where it is 0.
        qtype: The type of the codes; also int16.
    """

    scale: Any
    zero_point: Any
    qtype: Any = "int8"

    @property
    def codes(self) -> tuple[float, float]:
        """The lowest and the highest code; integers for integer types."""
        if numerics.is_int16(self.qtype):
            low, high = -(2**15), 2**15 - 1
        elif numerics.is_integer_qtype(self.qtype):
            low, high = numerics.code_range(self.qtype)
        else:
            high = numerics.symmetric_bound(self.qtype)
            low = -high
        return low, high

    @property
    def ends(self) -> tuple[Any, Any]:
        """The values of the lowest and the highest code, in the shape of the scale."""
        low, high = self.codes
        zero = 0 if self.zero_point is None else self.zero_point
        zero = jnp.asarray(zero, self.scale.dtype)
        return (low - zero) * self.scale, (high - zero) * self.scale

"""A weight in a rotated basis, on its way through a traced function.

What a model does to a weight before a product (transposes, casts, slices it) is done to
what stands for it in the rotated basis, where the axis of the rotation stays whole. A
product whose input is rotated, too, takes that; all else finds the weight as it was.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train.core import structural
from qwix_train.core.qarray import QArray
from qwix_train.core.rotation import Rotation
from qwix_train.trace import carried
from qwix_train.trace.carried import Carried, results_of, value_of

# They leave the order of the elements along an axis that stays whole as it is.
_IN_ORDER = frozenset(
    """broadcast_in_dim copy copy_p dynamic_slice expand_dims neg reshape slice split
    squeeze stop_gradient transpose unstack""".split()
)


@dataclasses.dataclass(frozen=True, eq=False)
class RotatedWeight(Carried):
    """A weight in a rotated basis, or a view of one.

    Attributes:
      base: what stands for it in that basis: an array, or what is carried for one.
      rotation: the rotation that it had.
      whole: whether this is the param as it is stored.
    """

    base: Any
    rotation: Rotation
    whole: bool = True

    follows = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.base.shape)

    @functools.cached_property
    def value(self) -> jax.Array:
        """The weight in its own basis."""
        return self.rotation.undo(value_of(self.base))

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return value_of(self.base).dtype

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the base holds."""
        return carried.arrays_of(self.base)

    def inside(self, arrays: Sequence[Any]) -> RotatedWeight:
        """See `Carried.inside`."""
        return self._view(carried.inside(self.base, arrays))

    @property
    def returned(self) -> Any:
        """The base as it is stored, or the array of a view."""
        if self.whole and isinstance(self.base, Carried):
            return self.base.returned
        return self.value

    def sliced(self) -> tuple[Sequence[Any], Callable[..., Carried]] | None:
        """See `Carried.sliced`: slices along another axis than the rotation's."""
        if self.rotation.axis == 0:
            return None
        rotation = self.rotation.at(self.rotation.axis - 1)
        arrays, one = carried.slices(self.base)
        return arrays, lambda *x: RotatedWeight(one(*x), rotation, whole=False)

    def apply(
        self,
        primitive: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        run: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """See `Carried.apply`."""
        others = operands[1:]
        if operands[0] is not self or any(isinstance(x, Carried) for x in others):
            return None
        axes: list[int | None]
        if primitive == "convert_element_type":
            is_float = jnp.issubdtype(params["new_dtype"], jnp.floating)
            axes = [self.rotation.axis if is_float else None]
        elif primitive in _IN_ORDER:
            axes = self._axes_after(primitive, params, others)
        else:
            return None
        if None in axes:
            return None
        bases = results_of(primitive, params, [self.base, *others], run)
        return [
            RotatedWeight(base, self.rotation.at(axis), whole=False)
            for base, axis in zip(bases, axes, strict=True)
            if axis is not None
        ]

    def read_by(self, primitive: str) -> None:
        """Tells the base that it is read."""
        if isinstance(self.base, Carried):
            self.base.read_by(primitive)

    def constrained(self, sharding: Any) -> RotatedWeight:
        """The weight with the sharding of its base constrained."""
        return self._view(carried.constrained(self.base, sharding))

    def _view(self, base: Any) -> RotatedWeight:
        return RotatedWeight(base, self.rotation, whole=False)

    def _axes_after(self, primitive, params, others) -> list[int | None]:
        """Where the axis of the rotation is in each result; None if it is cut."""
        length = self.shape[self.rotation.axis]
        marks = [1] * len(self.shape)
        marks[self.rotation.axis] = length

        def change(codes, mark):
            results = structural.CHANGES[primitive](params, QArray(codes, mark), others)
            return [] if results is None else [x.scale for x in results]

        codes = jax.ShapeDtypeStruct(self.shape, jnp.int8)
        found = jax.eval_shape(change, codes, jax.ShapeDtypeStruct(marks, jnp.float32))

        def axis_of(shape):
            long = [axis for axis, size in enumerate(shape) if size != 1]
            return long[0] if [shape[axis] for axis in long] == [length] else None

        return [axis_of(mark.shape) for mark in found] or [None]

"""Quantizes an operand: to the values that its codes stand for, or with its codes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
from jax import lax

from qwix_train.core import joined_range
from qwix_train.core.errors import located
from qwix_train.core.fake_quant import fake_quant, fake_quant_with_scale
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import (
    QArray,
    quantize_array,
    quantize_with_scale_zero_point,
)
from qwix_train.stages.stage import At, Stage
from qwix_train.trace.carried import Carried


class Range(NamedTuple):
    """The scale and zero point of an array."""

    scale: jax.Array
    zero_point: jax.Array | None

    def of(self, x: jax.Array) -> Range:
        """The range of an array, which is this one."""
        del x
        return self


class RangeOf(Protocol):
    """What gives the range of an array; a pytree, as a stage is."""

    def of(self, x: jax.Array) -> Range:
        """The range of an array."""
        ...


@flax.struct.dataclass
class FakeQuantize(Stage):
    """Gives the values that codes stand for, with the gradients of QAT.

    Attributes:
      how: how the array is quantized.
      range: its range; that of its elements if None.
    """

    how: HowToQuantize = flax.struct.field(pytree_node=False)
    range: RangeOf | None = None

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        return WithCodes.of(x, self.how, self.range, at).value

    def of_slice(self) -> FakeQuantize | None:
        """See `Stage.of_slice`."""
        how = self.how.of_slice()
        return how and FakeQuantize(how, self.range)


@flax.struct.dataclass
class Quantize(Stage):
    """Gives an array with its codes, for a product of codes.

    Attributes:
      how: how the array is quantized.
      range: its range; that of its elements if None.
    """

    how: HowToQuantize = flax.struct.field(pytree_node=False)
    range: RangeOf | None = None

    def apply(self, x: Any, at: At | None = None) -> WithCodes:
        """See `Stage.apply`."""
        return WithCodes.of(x, self.how, self.range, at)


class WithCodes(Carried):
    """An activation that is quantized: what is made of it is made when it is read.

    Attributes:
      array: the activation.
      how: how it is quantized.
      range: its range; that of its elements if None.
    """

    def __init__(self, array: Any, how: HowToQuantize, range_: Range | None):
        self.array = array
        self.how = how
        self.range = range_

    @classmethod
    def of(
        cls, x: Any, how: HowToQuantize, range_of: RangeOf | None, at: At | None = None
    ) -> WithCodes:
        """An array with the codes of the range that it has.

        Raises:
          ValueError: if that is to be joined over an axis that is not around.
        """
        if range_of is None and at is not None:
            with located(at.op.where):
                joined_range.check_bound(how.axis_names)
        return cls(x, how, None if range_of is None else range_of.of(x))

    @property
    def dtype(self) -> Any:
        """The dtype of the activation."""
        return self.array.dtype

    @functools.cached_property
    def value(self) -> jax.Array:
        """The values that the codes stand for."""
        if self.range is None:
            return fake_quant(self.array, self.how)
        return fake_quant_with_scale(self.array, self.how.qtype, *self.range)

    @functools.cached_property
    def codes(self) -> QArray:
        """The codes."""
        if self.range is None:
            return quantize_array(self.array, self.how)
        return quantize_with_scale_zero_point(self.array, self.how.qtype, *self.range)

    @functools.cached_property
    def constant(self) -> WithCodes:
        """The same, without gradients."""
        array, found = lax.stop_gradient((self.array, self.range))
        return WithCodes(array, self.how, found)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The activation, and its range."""
        return tuple(jax.tree.leaves((self.array, self.range)))

    def inside(self, arrays: Sequence[Any]) -> WithCodes:
        """See `Carried.inside`."""
        structure = jax.tree.structure((self.array, self.range))
        array, range_ = jax.tree.unflatten(structure, arrays)
        return WithCodes(array, self.how, range_)

    @property
    def returned(self) -> Any:
        """See `Carried.returned`."""
        return self.value

    def sliced(self) -> None:
        """See `Carried.sliced`."""
        return

"""What the library knows of one kind of operation, in one object.

Every mode asks the kind: which operands can be quantized, what the operation does with
each of their axes, how it is computed from codes, how a term of low rank goes through
it, and how the method that looks at its input sees vectors. A mode names no operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qwix_train.core.qarray import MaybeQArray, QArray
from qwix_train.ops.low_rank import Factors, LowRankTerm
from qwix_train.ops.vectors import Vectors
from qwix_train.trace.analyze import Findable
from qwix_train.trace.analyze import OperandAxes as OperandAxes

Params = Mapping[str, Any]
"""The parameters of an equation."""


class OpKind(Findable):
    """A kind of operation.

    Beside what finds it, it has:

    Attributes:
      plural: what several of them are called in messages.
      sides: how many of its operands, from the first, can be quantized.
      by_name_only: whether a rule matches it only where its `op_names` names it.
      has_tiles: whether its operands can have sub-channel scales.
    """

    plural: str
    sides: int = 2
    by_name_only: bool = False
    has_tiles: bool = True

    def channelwise(self, params: Params, side: int, ndim: int) -> tuple[int, ...]:
        """The axes of an operand along which each index can have a scale.

        The result can be scaled along all axes that are not summed over.

        Args:
          params: see `axes`.
          side: see `axes`.
          ndim: see `axes`.
        """
        axes = self.axes(params, side, ndim)
        return tuple(sorted((*axes.batch, *axes.kept)))

    def scaled_axes(self, params: Params, side: int, ndim: int) -> tuple[int, ...]:
        """The axes of an input that can be scaled if the weight is scaled back.

        Args:
          params: see `axes`.
          side: the side of the input.
          ndim: see `axes`.

        Returns:
          The axes; none if there is no such weight.
        """
        axes = self.axes(params, side, ndim)
        return (*axes.contracted, *axes.batch)

    def meeting_axes(
        self, params: Params, ndims: Sequence[int]
    ) -> Sequence[tuple[int, ...]]:
        """The axes of both factors along which each index meets the same index.

        A product is the same if both factors are rotated along such axes.

        Args:
          params: the parameters of its equation.
          ndims: how many axes each factor has.
        """
        contracted = [
            self.axes(params, side, ndim).contracted for side, ndim in enumerate(ndims)
        ]
        return list(zip(*contracted, strict=True))

    def product(
        self, params: Params, operands: Sequence[MaybeQArray], dtype: Any
    ) -> jax.Array:
        """The result of a product of arrays and quantized arrays, in any mix.

        Args:
          params: the parameters of its equation.
          operands: its operands.
          dtype: the dtype of the result.

        Raises:
          TypeError: if this is no product.
        """
        raise TypeError(f"{self.plural} multiply nothing")

    def on_result(
        self, params: Params, side: int, part: jax.Array, operands: Sequence[Any]
    ) -> jax.Array | None:
        """The scale of an operand, on the axes of the result.

        Args:
          params: the parameters of the equation.
          side: the operand that has the scale.
          part: the scale; its axes are those of the operand, or 1.
          operands: the operands, for their shapes.

        Returns:
          The scale in a shape that broadcasts against the result; None if scaling the
          result is not the same as scaling the operand.
        """
        del params, side, part, operands
        return None

    def low_rank(
        self, params: Params, side: int, weight: Factors, operands: Sequence[Any]
    ) -> LowRankTerm | None:
        """How the product of an input and the factors of an adapter is computed.

        Args:
          params: the parameters of the equation.
          side: the side of the weight.
          weight: the factors, on the axes of the weight.
          operands: the operands, arrays but for the weight.

        Returns:
          None if the factors have to be multiplied to a whole weight first.
        """
        del params, side, weight, operands
        return None

    def looked_up(
        self,
        params: Params,
        shape: Sequence[int],
        factor: jax.Array,
        indices: Sequence[Any],
    ) -> jax.Array | None:
        """The factor of an adapter for the rows that are looked up in a table.

        Args:
          params: the parameters of the equation.
          shape: the shape of the table.
          factor: has the axes of the table, each of its size or 1, and the rank.
          indices: the other operands.

        Returns:
          None where the factor has entries of its own for each row.
        """
        del params, shape, factor, indices
        return None

    def vectors(
        self, op: Any, side: int, order: Sequence[int], own_batch: Sequence[bool]
    ) -> Vectors:
        """How the input that meets a weight is seen as vectors of channels.

        Args:
          op: the operation.
          side: the side of the weight.
          order: the contracted axes of `axes`, in the order in which the weight stores
            them.
          own_batch: for each batch axis, whether the weight has a matrix for each
            index of it.

        Raises:
          ValueError: if it cannot be; the message says why.
        """
        raise ValueError(f"{self.plural} have no matrix of inputs")

    def seen(self, params: Params, side: int, operands: Sequence[Any]) -> Any:
        """The input of a weight as `vectors` takes it; the operand, unless said.

        Args:
          params: the parameters of the equation.
          side: the side of the input.
          operands: the operands.
        """
        del params
        return operands[side]

    def flattens(self, name: str) -> bool:
        """Whether an adapter has its contracted axes as one, and its kept ones.

        Args:
          name: the name of the operation.
        """
        del name
        return False

    def particulars(self, params: Params, side: int) -> list[str]:
        """What it does with a weight that a plain layer does not, in words.

        Args:
          params: the parameters of the equation.
          side: the side of the weight.
        """
        del params, side
        return []


def scale_entries_match(scale: jax.Array, array: QArray) -> bool:
    """Whether a scale has one entry, or one an index, along every axis."""
    sizes = zip(scale.shape, array.shape, strict=True)
    return all(count in (1, size) for count, size in sizes)

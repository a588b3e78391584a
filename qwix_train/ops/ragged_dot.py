"""Ragged products: the rows of a matrix, in groups, each with a matrix of its own.

A mixture of experts sorts its tokens by expert and multiplies them by the experts'
matrices in one operation: row ``i`` of ``x``, which belongs to group ``e(i)``, becomes
``x[i] @ w[e(i)]``. The gradient of the matrices is the other form, in which the rows of
each group are contracted: ``dw[e] = x[rows of e].T @ g[rows of e]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.core import operands as core_operands
from qwix_train.core.qarray import MaybeQArray, QArray, validate_qarray
from qwix_train.ops.kind import OperandAxes, OpKind, Params
from qwix_train.ops.low_rank import Factors, LowRankTerm, in_order, varies
from qwix_train.ops.vectors import Vectors

_PLAIN = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (1,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
)


def ragged_dot(
    lhs: MaybeQArray,
    rhs: MaybeQArray,
    group_sizes: jax.Array,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` for arrays and quantized arrays.

    Args:
      lhs: the rows, shape (rows, channels).
      rhs: the matrices, shape (groups, channels, outputs).
      group_sizes: the number of rows of each group, shape (groups,), integers.
      precision: as in `jax.lax.ragged_dot`.
      preferred_element_type: the dtype of the result; that of the dequantized operands,
        promoted, if None.
      group_offset: as in `jax.lax.ragged_dot`.

    Returns:
      Shape (rows, outputs); zero for rows behind the last group.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import quantize, ragged_dot
      >>> w = quantize(jnp.ones((2, 4, 3)), "int8", channelwise_axes=(0, 2))
      >>> ragged_dot(jnp.ones((5, 4)), w, jnp.array([2, 2]))[:, 0].round().tolist()
      [4.0, 4.0, 4.0, 4.0, 0.0]
    """
    return ragged_dot_general(
        lhs, rhs, group_sizes, _PLAIN, precision, preferred_element_type, group_offset
    )


def ragged_dot_general(
    lhs: MaybeQArray,
    rhs: MaybeQArray,
    group_sizes: jax.Array,
    dimension_numbers: lax.RaggedDotDimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot_general` for arrays and quantized arrays.

    Codes are multiplied where both operands have codes without zero points, scales
    follow kept axes, batch axes and groups, or tiles of the one contracted axis, and
    an int32 sum cannot overflow. Elsewhere quantized operands are dequantized first.

    Args:
      lhs: the left operand.
      rhs: the right operand.
      group_sizes: as in `jax.lax.ragged_dot_general`, as all that follow.
      dimension_numbers: what is contracted, batched, ragged, and grouped.
      precision: the precision of float arithmetic.
      preferred_element_type: the dtype of the result; that of the dequantized operands,
        promoted, if None.
      group_offset: the offset.

    Raises:
      ValueError: if a `QArray` is malformed.
    """
    for operand in (lhs, rhs):
        if isinstance(operand, QArray):
            validate_qarray(operand)
    numbers, group_sizes = _Numbers.of(dimension_numbers), jnp.asarray(group_sizes)
    result = core_operands.result_dtype(lhs, rhs, preferred=preferred_element_type)
    settings = dict(precision=precision, group_offset=group_offset)
    if not _stays_quantized(lhs, rhs, group_sizes, numbers, group_offset):
        return lax.ragged_dot_general(
            core_operands.as_float(lhs),
            core_operands.as_float(rhs),
            group_sizes,
            dimension_numbers,
            preferred_element_type=result,
            **settings,
        )
    left, right = core_operands.common_codes(lhs, rhs)
    axes = (numbers.contracted[0][0], numbers.contracted[1][0])
    tiles = max(_entries(lhs, axes[0]), _entries(rhs, axes[1]))
    if tiles > 1:
        left, right = _cut(left, axes[0], tiles), _cut(right, axes[1], tiles)
        numbers = numbers.with_tiles(axes)
        if group_sizes.ndim > 1:  # those of each batch are those of its tiles
            sizes = (*group_sizes.shape[:-1], tiles, group_sizes.shape[-1])
            group_sizes = jnp.broadcast_to(group_sizes[..., None, :], sizes)
    sums = lax.ragged_dot_general(
        left,
        right,
        group_sizes,
        numbers.as_given,
        preferred_element_type=core_operands.accumulator_dtype(lhs, rhs, result),
        **settings,
    )
    wide = core_operands.scale_dtype(lhs, rhs, result=result)
    out = sums.astype(wide)
    for side, operand in enumerate((lhs, rhs)):
        if isinstance(operand, QArray):
            scale = operand.float_scale.astype(wide)
            if tiles > 1:
                scale = jnp.expand_dims(scale, axes[side] + 1)
            shapes = left.shape, right.shape
            out = out * numbers.aligned(scale, side, group_sizes, shapes)
    if tiles > 1:
        out = out.sum(numbers.tile_axis)
    return out.astype(result)


class RaggedDot(OpKind):
    """A product of groups of rows with a matrix for each group."""

    primitive: str = "ragged_dot_general"
    names: tuple[str, ...] = ("ragged_dot",)
    plural = "ragged products"

    def axes(self, params: Params, side: int, ndim: int) -> OperandAxes:
        """See `OpKind.axes`: groups are a batch of matrices."""
        numbers = _Numbers.of(params["ragged_dot_dimension_numbers"])
        groups = numbers.groups if side == 1 else ()
        batch = (*groups, *numbers.batch[side])
        return OperandAxes.of(ndim, numbers.contracted[side], batch)

    def meeting_axes(
        self, params: Params, ndims: Sequence[int]
    ) -> Sequence[tuple[int, ...]]:
        """See `OpKind.meeting_axes`: rows meet those of their group alone."""
        numbers = _Numbers.of(params["ragged_dot_dimension_numbers"])
        pairs = super().meeting_axes(params, ndims)
        return [axes for axes in pairs if axes[0] not in numbers.ragged]

    def scaled_axes(self, params: Params, side: int, ndim: int) -> tuple[int, ...]:
        """See `OpKind.scaled_axes`: none, since all groups have one input."""
        return ()

    def product(
        self, params: Params, operands: Sequence[MaybeQArray], dtype: Any
    ) -> jax.Array:
        """See `OpKind.product`."""
        lhs, rhs, group_sizes = operands
        assert not isinstance(group_sizes, QArray)
        return ragged_dot_general(
            lhs,
            rhs,
            group_sizes,
            params["ragged_dot_dimension_numbers"],
            precision=params["precision"],
            preferred_element_type=dtype,
            group_offset=params["group_offset"],
        )

    def on_result(
        self, params: Params, side: int, part: jax.Array, operands: Sequence[Any]
    ) -> jax.Array | None:
        """See `OpKind.on_result`."""
        lhs, rhs, group_sizes = operands
        numbers = _Numbers.of(params["ragged_dot_dimension_numbers"])
        sizes = zip(part.shape, (lhs, rhs)[side].shape, strict=True)
        if (
            params["group_offset"] is not None
            or any(count not in (1, size) for count, size in sizes)
            or varies(part, numbers.contracted[side])
            or not numbers.has_rows_of(group_sizes)
        ):
            return None
        return numbers.aligned(part, side, group_sizes, (lhs.shape, rhs.shape))

    def low_rank(
        self, params: Params, side: int, weight: Factors, operands: Sequence[Any]
    ) -> LowRankTerm | None:
        """See `OpKind.low_rank`: each row meets the factors of its group."""
        numbers = _Numbers.of(params["ragged_dot_dimension_numbers"])
        contracted = numbers.contracted[1]
        kept = [
            axis
            for axis in range(len(weight.shape))
            if axis not in (*contracted, *numbers.groups)
        ]
        inner, outer = in_order(weight, contracted)
        x, group_sizes = operands[0], operands[2]
        if (
            side != 1
            or params["group_offset"] is not None
            or not numbers.is_plain(jnp.ndim(x))
            or inner is None
            or varies(inner, kept)
            or varies(weight.gain, contracted)
        ):
            return None
        (group,), rank = numbers.groups, weight.a.shape[-1]
        count, sizes = weight.shape[group], [weight.shape[axis] for axis in kept]

        def stacked(factor, *shape):
            order = (group, *contracted, *kept, factor.ndim - 1)
            factor = factor.transpose(order)
            factor = factor.reshape(factor.shape[0], *shape)
            return jnp.broadcast_to(factor, (count, *factor.shape[1:]))

        def apply(x):
            precision = params["precision"]
            rows = jnp.moveaxis(x, numbers.contracted[0][0], -1)
            a = stacked(inner, -1, rank).astype(x.dtype)
            half = lax.ragged_dot(rows, a, group_sizes, precision=precision)
            b = stacked(outer, -1, rank).swapaxes(1, 2).astype(half.dtype)
            b = jnp.broadcast_to(b, (*b.shape[:2], math.prod(sizes)))
            whole = lax.ragged_dot(half, b, group_sizes, precision=precision)
            return whole.reshape(x.shape[numbers.ragged[0]], *sizes)

        gain = None
        if weight.gain is not None:
            shapes = jnp.shape(x), weight.shape
            gain = numbers.aligned(weight.gain, 1, group_sizes, shapes)
        return LowRankTerm(apply, gain)

    def flattens(self, name: str) -> bool:
        """See `OpKind.flattens`: each group has an adapter of its own."""
        return True

    def seen(self, params: Params, side: int, operands: Sequence[Any]) -> Any:
        """See `OpKind.seen`: the rows, and for each group which of them it has."""
        numbers = _Numbers.of(params["ragged_dot_dimension_numbers"])
        x, _, group_sizes = operands
        if side != 0 or not numbers.is_plain(jnp.ndim(x)):
            return operands[side]
        rows = jnp.moveaxis(x, numbers.contracted[0][0], -1)
        group_of = numbers.group_of_rows(group_sizes, rows.shape[0])
        member = group_of[:, None] == jnp.arange(group_sizes.shape[0])
        rows = jnp.where(member.any(1, keepdims=True), rows, 0)
        return jnp.concatenate([rows, member.astype(rows.dtype)], 1)

    def vectors(
        self, op: Any, side: int, order: Sequence[int], own_batch: Sequence[bool]
    ) -> Vectors:
        """See `OpKind.vectors`: those of each group."""
        numbers = _Numbers.of(op.params["ragged_dot_dimension_numbers"])
        if side != 1 or not numbers.is_plain(len(op.operands[0].shape)):
            raise ValueError("it is not the matrices that rows are multiplied by")
        (groups,) = op.operands[2].shape
        return GroupedRows(groups, own_matrices=own_batch[0])


@dataclasses.dataclass(frozen=True)
class GroupedRows(Vectors):
    """The rows of each group, as vectors, from what `RaggedDot.seen` gives.

    Attributes:
      groups: the number of groups.
      own_matrices: whether each group meets a matrix of its own.
    """

    unscaled = "all of its groups have one input"

    groups: int
    own_matrices: bool

    def samples(self, x: jax.Array) -> jax.Array:
        """See `Vectors.samples`; all rows are in one group."""
        return x[None, :, : -self.groups]

    def members(self, x: jax.Array) -> jax.Array | None:
        """See `Vectors.members`."""
        return x[:, -self.groups :].T > 0 if self.own_matrices else None


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Dimension numbers, and what follows from them.

    Attributes:
      contracted: the contracted axes of each operand.
      batch: the batch axes of each operand.
      ragged: the axis of the left operand along which groups lie.
      groups: the axis of the right operand that has a matrix for each group; empty
        where it has none.
    """

    contracted: tuple[tuple[int, ...], ...]
    batch: tuple[tuple[int, ...], ...]
    ragged: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, given: Any) -> _Numbers:
        """Those of `jax.lax`, which may be NumPy integers."""
        contracted, batch = (
            tuple(tuple(map(int, axes)) for axes in pair)
            for pair in given.dot_dimension_numbers
        )
        ragged = tuple(map(int, given.lhs_ragged_dimensions))
        return cls(
            contracted, batch, ragged, tuple(map(int, given.rhs_group_dimensions))
        )

    @property
    def as_given(self) -> lax.RaggedDotDimensionNumbers:
        """The same for `jax.lax`."""
        return lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(self.contracted, self.batch),
            lhs_ragged_dimensions=self.ragged,
            rhs_group_dimensions=self.groups,
        )

    @property
    def of_rows(self) -> bool:
        """Whether each row meets the matrix of its group."""
        return bool(self.groups)

    @property
    def sums_rows(self) -> bool:
        """Whether the rows of each group are contracted."""
        return self.ragged[0] in self.contracted[0]

    @property
    def tile_axis(self) -> int:
        """The axis of the result along which tiles lie, see `with_tiles`."""
        return len(self.batch[0]) - 1

    def is_plain(self, ndim: int) -> bool:
        """Whether these are those of `jax.lax.ragged_dot`, but for the order of axes.

        Args:
          ndim: how many axes the left operand has.
        """
        contracted = self.contracted[0]
        return self.of_rows and not self.batch[0] and ndim == 2 == len(contracted) + 1

    def has_rows_of(self, group_sizes: Any) -> bool:
        """Whether it is known to which group a row belongs, or does not matter."""
        if self.of_rows:
            return jnp.ndim(group_sizes) in (1, len(self.batch[0]) + 1)
        return self.sums_rows

    def with_tiles(self, axes: tuple[int, int]) -> _Numbers:
        """The numbers once an axis of each operand is cut; tiles are a batch axis."""

        def moved(side: int, values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis + (axis > axes[side]) for axis in values)

        return _Numbers(
            tuple((axis + 1,) for axis in axes),
            tuple((*moved(side, self.batch[side]), axes[side]) for side in (0, 1)),
            moved(0, self.ragged),
            moved(1, self.groups),
        )

    def group_of_rows(self, group_sizes: jax.Array, rows: int) -> jax.Array:
        """The group of each row, shape (*batch, rows); the last for those of none."""
        ends = jnp.cumsum(group_sizes, -1)[..., None, :]
        return jnp.sum(jnp.arange(rows)[:, None] >= ends, -1)

    def aligned(
        self, part: jax.Array, side: int, group_sizes: jax.Array, shapes: Any
    ) -> jax.Array:
        """A scale on the axes of the result.

        Scales of rows behind the last group are 0, since what these hold, which may be
        NaN, is not a part of the product.

        Args:
          part: has the axes of the operand, each of its size or 1; contracted ones 1.
          side: the operand.
          group_sizes: the sizes of groups.
          shapes: the shapes of both operands.
        """
        groups, count = self.groups if side == 1 else (), len(self.batch[side])
        free = self._free(0, len(shapes[0])), self._free(1, len(shapes[1]))
        order = (*self.batch[side], *groups, *free[side], *self.contracted[side])
        part = part.transpose(order)
        part = part.reshape(part.shape[: part.ndim - len(self.contracted[side])])
        of_rows = [1] * len(free[0])
        if side == 0 and self.of_rows:
            axis = count + free[0].index(self.ragged[0])
            part = self._of_groups(part, axis, group_sizes)
        if groups:
            part = self._of_each_row(part, count, group_sizes, shapes[0])
            of_rows[free[0].index(self.ragged[0])] = part.shape[count]
        if side == 0:
            part = part.reshape(*part.shape, *(1,) * len(free[1]))
        else:
            kept = part.shape[count + len(groups) :]
            part = part.reshape(*part.shape[:count], *of_rows, *kept)
        return part[None] if self.sums_rows else part

    def _free(self, side: int, ndim: int) -> list[int]:
        """The axes of an operand that are axes of the result, in its order."""
        used = {*self.batch[side], *self.contracted[side]}
        used |= {*self.groups} if side == 1 else set()
        return [axis for axis in range(ndim) if axis not in used]

    def _of_groups(self, part, axis, group_sizes):
        """What belongs to each row along an axis; 0 behind the last group."""
        if part.shape[axis] == 1:
            return part
        ends = jnp.sum(group_sizes, -1, keepdims=True)
        inside = jnp.arange(part.shape[axis]) < ends
        shape = [*inside.shape[:-1], *(1,) * (part.ndim - inside.ndim + 1)]
        shape[axis] = part.shape[axis]
        return jnp.where(inside.reshape(shape), part, 0)

    def _of_each_row(self, part, axis, group_sizes, lhs_shape):
        """What belongs to each row, from what belongs to each group along an axis."""
        if part.shape[axis] == 1:
            return part
        rows = self.group_of_rows(group_sizes, lhs_shape[self.ragged[0]])
        rows = jnp.minimum(rows, part.shape[axis] - 1)
        # Groups may be the same along the batch.
        rows = rows.reshape(*(1,) * (axis + 1 - rows.ndim), *rows.shape)
        rows = rows.reshape(*rows.shape, *(1,) * (part.ndim - rows.ndim))
        return jnp.take_along_axis(part, rows, axis)


def _stays_quantized(lhs, rhs, group_sizes, numbers, group_offset) -> bool:
    """Whether the codes are multiplied, rather than dequantized values."""
    operands = (lhs, rhs)
    if not all(map(core_operands.multiplies_codes, operands)):
        return False
    if any(core_operands.zero_point_of(x) is not None for x in operands):
        return False
    if group_offset is not None or len(numbers.contracted[0]) != 1:
        return False
    if not numbers.has_rows_of(group_sizes):
        return False
    axes = (numbers.contracted[0][0], numbers.contracted[1][0])
    tiles = {_entries(x, axis) for x, axis in zip(operands, axes, strict=True)} - {1}
    size = lhs.shape[axes[0]]
    if len(tiles) > 1 or (tiles and (numbers.sums_rows or size % max(tiles))):
        return False
    if all(map(core_operands.is_integer, operands)):
        if size > core_operands.max_terms(*operands):
            return False
    return all(
        _entries(x, axis) in (1, x.shape[axis])
        for x, contracted in zip(operands, axes, strict=True)
        for axis in range(x.ndim)
        if axis != contracted
    )


def _entries(operand: MaybeQArray, axis: int) -> int:
    """How many scales an operand has along an axis."""
    return operand.scale.shape[axis] if isinstance(operand, QArray) else 1


def _cut(codes: jax.Array, axis: int, count: int) -> jax.Array:
    """Codes with an axis split into tiles and the elements of a tile."""
    shape = codes.shape
    sizes = count, shape[axis] // count
    return codes.reshape(*shape[:axis], *sizes, *shape[axis + 1 :])

"""Lookups of the rows of a table, such as that of embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.ops.kind import OperandAxes, OpKind, Params
from qwix_train.trace import provenance


class Gather(OpKind):
    """A lookup in a table, which is its left operand."""

    primitive: str = lax.gather_p.name
    names: tuple[str, ...] = ("gather",)
    plural = "lookups"
    sides = 1
    is_product = False
    by_name_only = True

    def is_found(
        self,
        operands: Sequence[provenance.Provenance],
        shapes: Sequence[tuple[int, ...]],
    ) -> bool:
        """See `OpKind.is_found`: a lookup, not the choice of a loss's labels.

        The rows may be constants, as the positions of a sequence are where a model
        makes them itself; but one constant row, such as that of a layer, is just a part
        of the param.
        """
        table, indices = operands
        if not isinstance(table, provenance.Weight):
            return False
        return provenance.is_activation(indices) or math.prod(shapes[1][:-1]) > 1

    def axes(self, params: Params, side: int, ndim: int) -> OperandAxes:
        """See `OpKind.axes`: a lookup is a product with one-hot rows."""
        numbers = params["dimension_numbers"]
        rows = {*numbers.start_index_map, *numbers.operand_batching_dims}
        return OperandAxes.of(ndim, sorted(rows))

    def channelwise(self, params: Params, side: int, ndim: int) -> tuple[int, ...]:
        """See `OpKind.channelwise`: each row has a scale of its own, or some."""
        return self.axes(params, side, ndim).contracted

    def scaled_axes(self, params: Params, side: int, ndim: int) -> tuple[int, ...]:
        """See `OpKind.scaled_axes`: none."""
        return ()

    def looked_up(
        self,
        params: Params,
        shape: Sequence[int],
        factor: jax.Array,
        indices: Sequence[Any],
    ) -> jax.Array | None:
        """See `OpKind.looked_up`: for factors that every row of the table shares."""
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        if any(factor.shape[axis] != 1 for axis in indexed) or indexed != dropped:
            return None
        kept = [axis for axis in range(len(shape)) if axis not in indexed]
        if any(sizes[axis] != shape[axis] for axis in kept):
            return None
        (rows,) = indices
        result = [1] * (len(numbers.offset_dims) + jnp.ndim(rows) - 1)
        for place, axis in zip(numbers.offset_dims, kept, strict=True):
            result[place] = factor.shape[axis]
        return factor.reshape(*result, factor.shape[-1])

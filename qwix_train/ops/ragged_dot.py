"""Ragged products, of rows that are grouped by the expert that they go to."""

from __future__ import annotations

from qwix_train.ops.kind import OperandAxes, OpKind


class RaggedDot(OpKind):
    """A product of the groups of rows of a matrix with a matrix each."""

    primitive = "ragged_dot_general"
    names = ("ragged_dot",)
    plural = "ragged products"
    obstacle = "ragged_dot has no quantized form"

    def axes(self, params, side, ndim):
        """See `OpKind.axes`."""
        contracted, batch = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        return OperandAxes.of(ndim, contracted[side], batch[side])

"""Convolutions, in any layout, with groups, strides and dilations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.core.conv import aligned, conv_general_dilated
from qwix_train.core.qarray import MaybeQArray
from qwix_train.ops.kind import OperandAxes, OpKind, Params
from qwix_train.ops.low_rank import Factors, LowRankTerm, in_order, varies
from qwix_train.ops.vectors import Patches, Vectors

_GROUPS = ("feature_group_count", "batch_group_count")
_WINDOW = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")


class Conv(OpKind):
    """A convolution of images (its left operand) with a kernel."""

    primitive: str = lax.conv_general_dilated_p.name
    names: tuple[str, ...] = ("conv_general_dilated",)
    plural = "convolutions"
    has_tiles = False

    def axes(self, params: Params, side: int, ndim: int) -> OperandAxes:
        """See `OpKind.axes`: what is not an axis of the result is summed over."""
        numbers = params["dimension_numbers"]
        _, *contracted = (numbers.lhs_spec, numbers.rhs_spec)[side]
        return OperandAxes.of(ndim, contracted)

    def scaled_axes(self, params: Params, side: int, ndim: int) -> tuple[int, ...]:
        """See `OpKind.scaled_axes`: none."""
        return ()

    def meeting_axes(
        self, params: Params, ndims: Sequence[int]
    ) -> Sequence[tuple[int, ...]]:
        """See `OpKind.meeting_axes`: the input features, unless there are groups."""
        features = super().meeting_axes(params, ndims)[:1]
        return features if all(params[name] == 1 for name in _GROUPS) else []

    def product(
        self, params: Params, operands: Sequence[MaybeQArray], dtype: Any
    ) -> jax.Array:
        """See `OpKind.product`."""
        lhs, rhs = operands
        names = (*_WINDOW, "dimension_numbers", *_GROUPS, "precision")
        settings = {name: params[name] for name in names}
        return conv_general_dilated(lhs, rhs, **settings, preferred_element_type=dtype)

    def on_result(
        self, params: Params, side: int, part: jax.Array, operands: Sequence[Any]
    ) -> jax.Array | None:
        """See `OpKind.on_result`: scales of images, or of output features."""
        numbers = params["dimension_numbers"]
        kept = (numbers.lhs_spec, numbers.rhs_spec)[side][0]
        of_batch_groups = side == 0 and params["batch_group_count"] > 1
        size = 1 if of_batch_groups else operands[side].shape[kept]
        if any(n != 1 and (a != kept or n != size) for a, n in enumerate(part.shape)):
            return None
        return aligned(part, numbers, ("lhs", "rhs")[side], part.dtype)

    def low_rank(
        self, params: Params, side: int, weight: Factors, operands: Sequence[Any]
    ) -> LowRankTerm | None:
        """See `OpKind.low_rank`."""
        if side != 1 or params["batch_group_count"] != 1:
            return None
        numbers = params["dimension_numbers"]
        feature, *others = numbers.rhs_spec
        inner, outer = in_order(weight, others)
        if inner is None or inner.shape[feature] != 1 or varies(weight.gain, others):
            return None
        groups, place = params["feature_group_count"], numbers.out_spec[1]
        shape = list(weight.shape)

        def apply(x):
            # Each group of inputs meets the whole of A, and has columns of B of its
            # own.
            rank = inner.shape[-1]
            kernel = jnp.moveaxis(inner.squeeze(feature), -1, feature)
            of_rank = [*shape[:feature], rank, *shape[feature + 1 :]]
            kernel = jnp.broadcast_to(kernel, of_rank)
            kernel = jnp.concatenate([kernel] * groups, axis=feature)
            half = lax.conv_general_dilated(
                x,
                kernel.astype(x.dtype),
                **{name: params[name] for name in _WINDOW},
                dimension_numbers=numbers,
                feature_group_count=groups,
                precision=params["precision"],
            )
            half = jnp.moveaxis(half, place, -1)
            half = half.reshape(*half.shape[:-1], groups, rank)
            columns = outer.reshape(outer.shape[feature], rank)
            columns = jnp.broadcast_to(columns, (shape[feature], rank))
            columns = columns.reshape(groups, -1, rank).astype(half.dtype)
            whole = jnp.einsum(
                "...gr,gor->...go", half, columns, precision=params["precision"]
            )
            whole = whole.reshape(*whole.shape[:-2], math.prod(whole.shape[-2:]))
            return jnp.moveaxis(whole, -1, place)

        gain = None
        if weight.gain is not None:
            sizes = [1] * jnp.ndim(operands[0])
            sizes[place] = -1
            gain = weight.gain.reshape(sizes)
        return LowRankTerm(apply, gain)

    def vectors(
        self, op: Any, side: int, order: Sequence[int], own_batch: Sequence[bool]
    ) -> Vectors:
        """See `OpKind.vectors`: what the kernel sees at each place."""
        if side != 1:
            raise ValueError("its weight is not the kernel")
        if op.params["feature_group_count"] != 1 or op.params["batch_group_count"] != 1:
            raise ValueError("a convolution in groups has no one matrix of inputs")
        names = (*_WINDOW, "dimension_numbers")
        params = tuple((name, op.params[name]) for name in names)
        return Patches(op.operands[side].shape, tuple(order), params)

    def particulars(self, params: Params, side: int) -> list[str]:
        """See `OpKind.particulars`: groups, dilations, and an input as the weight."""
        notes = [f"has {name}={params[name]}" for name in _GROUPS if params[name] != 1]
        notes += [
            f"has {name}={tuple(params[name])}"
            for name in ("lhs_dilation", "rhs_dilation")
            if any(step != 1 for step in params[name])
        ]
        if side != 1:
            notes.append("has it as its input, not as its kernel")
        return notes

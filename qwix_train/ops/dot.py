"""Matrix products: `dot_general`, and `einsum`, which JAX makes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.core.dot_general import aligned, dot_general
from qwix_train.core.qarray import MaybeQArray, QArray
from qwix_train.ops.kind import OperandAxes, OpKind, Params, scale_entries_match
from qwix_train.ops.low_rank import Factors, LowRankTerm, in_order, varies
from qwix_train.ops.vectors import Channels, Vectors

# The scope that `jnp.einsum` opens is named by its subscripts: "bi,io->bo", with
# ellipses and spaces as they were written. A transformation stands around it.
_EINSUM_SCOPE = re.compile(r"(?:\w+\()*[\w. ]*(?:,[\w. ]*)*(?:,|->)[\w. ]*\)*")


class Dot(OpKind):
    """A matrix product, with contracted and batch axes anywhere."""

    primitive: str = lax.dot_general_p.name
    names: tuple[str, ...] = ("dot_general", "einsum")
    plural = "matrix products"

    def name_in(self, scope: str) -> str:
        """See `OpKind.name_in`: within the scope of an einsum it is one."""
        is_einsum = _EINSUM_SCOPE.fullmatch(scope.rpartition("/")[2])
        return self.names[1 if is_einsum else 0]

    def axes(self, params: Params, side: int, ndim: int) -> OperandAxes:
        """See `OpKind.axes`."""
        contracted, batch = params["dimension_numbers"]
        return OperandAxes.of(ndim, contracted[side], batch[side])

    def product(
        self, params: Params, operands: Sequence[MaybeQArray], dtype: Any
    ) -> jax.Array:
        """See `OpKind.product`."""
        lhs, rhs = operands
        return dot_general(
            lhs,
            rhs,
            params["dimension_numbers"],
            precision=params["precision"],
            preferred_element_type=dtype,
            out_sharding=params["out_sharding"],
        )

    def on_result(
        self, params: Params, side: int, part: jax.Array, operands: Sequence[Any]
    ) -> jax.Array | None:
        """See `OpKind.on_result`: all scales that are constant along what is summed."""
        numbers = params["dimension_numbers"]
        if varies(part, numbers[0][side]):
            return None
        array = operands[side]
        if isinstance(array, QArray) and not scale_entries_match(part, array):
            return None
        return aligned(part, numbers, (operands[0].ndim, operands[1].ndim), side)

    def low_rank(
        self, params: Params, side: int, weight: Factors, operands: Sequence[Any]
    ) -> LowRankTerm | None:
        """See `OpKind.low_rank`."""
        contracting, batch = params["dimension_numbers"]
        axes, x_axes = contracting[side], contracting[1 - side]
        inner, outer = in_order(weight, axes)
        if inner is None or varies(weight.gain, axes):
            return None
        # The axes of the weight are named by their numbers, and those of the input by
        # what they meet there, or by higher numbers.
        rank, precision = len(weight.shape), params["precision"]
        names = list(range(rank))
        met = dict(zip(x_axes, axes, strict=True))
        met |= dict(zip(batch[1 - side], batch[side], strict=True))
        x_names = [
            met.get(i, rank + 1 + i) for i in range(jnp.ndim(operands[1 - side]))
        ]
        free = [name for name in x_names if name > rank]
        kept = [name for name in names if name not in met.values()]
        out = [*batch[side], *(kept + free if side == 0 else free + kept)]

        def apply(x):
            held, own = _squeezed(inner, [*names, rank], rank)
            middle = [n for n in out if n in x_names or n in own]
            factors = x, x_names, held.astype(x.dtype), own
            half = jnp.einsum(*factors, [*middle, rank], precision=precision)
            held, own = _squeezed(outer, [*names, rank], rank)
            found = [n for n in out if n in middle or n in own]
            factors = half, [*middle, rank], held.astype(half.dtype), own
            return _with_axes(
                jnp.einsum(*factors, found, precision=precision), found, out
            )

        gain = None
        if weight.gain is not None:
            held, gain_names = _squeezed(weight.gain, names)
            order = [gain_names.index(n) for n in out if n in gain_names]
            gain_names = [n for n in out if n in gain_names]
            gain = _with_axes(held.transpose(order), gain_names, out)
        return LowRankTerm(apply, gain)

    def vectors(
        self, op: Any, side: int, order: Sequence[int], own_batch: Sequence[bool]
    ) -> Vectors:
        """See `OpKind.vectors`."""
        contracting, batch = op.params["dimension_numbers"]
        contracted = tuple(contracting[1 - side][i] for i in order)
        own = zip(batch[1 - side], own_batch, strict=True)
        return Channels(contracted, tuple(axis for axis, is_own in own if is_own))

    def flattens(self, name: str) -> bool:
        """See `OpKind.flattens`: as in `qwix`, an einsum keeps its axes."""
        return name == self.names[0]


def _squeezed(factor, names, *kept):
    """A factor without axes of size 1 (but those kept), and the names of the others."""
    dropped = [
        axis
        for axis, name in enumerate(names)
        if factor.shape[axis] == 1 and name not in kept
    ]
    return factor.squeeze(dropped), [n for a, n in enumerate(names) if a not in dropped]


def _with_axes(array: jax.Array, names, out) -> jax.Array:
    return jnp.expand_dims(
        array, [i for i, name in enumerate(out) if name not in names]
    )

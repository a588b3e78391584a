"""A param with an adapter, on its way through a traced function.

What a model does to a weight before a product (transposes, casts, slices it, scans over
it) is done to the base and to both factors of the adapter. A product then takes three
small ones, ``x @ W + scaling * (x @ A) @ B``. Anything else that reads the weight finds
``W + scaling * A @ B`` as one array.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import numerics, structural
from qwix_train.core.qarray import QArray
from qwix_train.ops.low_rank import contract
from qwix_train.trace import carried
from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import Carried, results_of, value_of

# The results of an equation, from arrays for its operands.
Run = Callable[..., list[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedWeight(Carried):
    """A weight with an adapter, or a view of one.

    Attributes:
      base: the weight without it: an array, or what an evaluation carries for one.
      a: the factor ``A``: the axes of the weight, each of its size or 1, and the rank.
      b: the factor ``B``, in the same way; the scaling is in it.
      gain: what the sum of base and adapter is multiplied by, along axes as those of
        the factors, without the rank; None if by nothing.
      whole: whether this is the param as it is stored.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None
    whole: bool = True

    follows = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return tuple(self.base.shape)

    @functools.cached_property
    def value(self) -> jax.Array:
        """The weight with the adapter in it, as one array."""
        base = value_of(self.base)
        delta = contract(self.a, self.b, base.shape)
        wide = numerics.promote_types(base.dtype, delta.dtype)
        weight = base.astype(wide) + delta.astype(wide)
        if self.gain is not None:
            weight = weight * self.gain
        return weight.astype(base.dtype)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the base holds, the factors, and the gain if there is one."""
        gain = () if self.gain is None else (self.gain,)
        return (*carried.arrays_of(self.base), self.a, self.b, *gain)

    def inside(self, arrays: Sequence[Any]) -> AdaptedWeight:
        """The same weight, within a body."""
        arrays = list(arrays)
        gain = None if self.gain is None else arrays.pop()
        *parts, a, b = arrays
        base = carried.inside(self.base, parts)
        return AdaptedWeight(base, a, b, gain, whole=False)

    @property
    def returned(self) -> Any:
        """The base as it is stored, or the array of a view."""
        if not self.whole:
            return self.value
        return self.base.returned if isinstance(self.base, Carried) else self.base

    def sliced(self) -> tuple[Sequence[Any], Callable[..., Carried]] | None:
        """The base and the factors of each slice along axis 0."""
        bases, of_slice = carried.slices(self.base)
        size = self.shape[0]
        others = [self.a, self.b] + ([] if self.gain is None else [self.gain])
        others = [_full(x, 0, size) for x in others]

        def one(*parts):
            own, rest = parts[: len(bases)], parts[len(bases) :]
            return AdaptedWeight(of_slice(*own), *rest, whole=False)

        return (*bases, *others), one

    def apply(
        self,
        primitive: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        run: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """See `Carried.apply`."""
        if ops.is_product(primitive):
            base = functools.partial(results_of, primitive, params, run=run)
            return [product(primitive, params, operands, lambda *x: base(x)[0])]
        if primitive == "convert_element_type":
            (base,) = results_of(primitive, params, [self.base], run)
            dtype = params["new_dtype"]
            if not jnp.issubdtype(dtype, jnp.floating):
                return None
            gain = None if self.gain is None else self.gain.astype(dtype)
            a, b = self.a.astype(dtype), self.b.astype(dtype)
            return [AdaptedWeight(base, a, b, gain, whole=False)]
        if primitive == "neg":
            (base,) = results_of(primitive, params, [self.base], run)
            return [dataclasses.replace(self, base=base, a=-self.a, whole=False)]
        if primitive in ("mul", "div"):
            return self._scaled(primitive, params, operands, run)
        if primitive not in structural.CHANGES or operands[0] is not self:
            return None
        if any(isinstance(x, Carried) for x in operands[1:]):
            return None
        parts = [self.a, self.b] + ([] if self.gain is None else [self.gain[..., None]])
        try:
            changed = [
                _changed(primitive, params, self.shape, part, operands[1:])
                for part in parts
            ]
        except _CannotChange:
            return None
        bases = results_of(primitive, params, [self.base, *operands[1:]], run)
        gains = [None] * len(bases)
        if self.gain is not None:
            gains = [gain[..., 0] for gain in changed[2]]
        return [
            AdaptedWeight(base, a, b, gain, whole=False)
            for base, a, b, gain in zip(bases, *changed[:2], gains, strict=True)
        ]

    def read_by(self, primitive: str) -> None:
        """Tells the base that it is read."""
        if isinstance(self.base, Carried):
            self.base.read_by(primitive)

    def constrained(self, sharding: Any) -> AdaptedWeight:
        """The weight with the sharding of its base constrained."""
        base = carried.constrained(self.base, sharding)
        return dataclasses.replace(self, base=base)

    def _scaled(self, primitive, params, operands, run):
        """A product with one number is one with the base and with a factor."""
        left, right = operands
        if left is not self:
            left, right = right, left
        if isinstance(right, Carried) or jnp.shape(right) != ():
            return None
        if primitive == "div" and operands[0] is not self:
            return None
        bases = [self.base if x is self else x for x in operands]
        (base,) = results_of(primitive, params, bases, run)
        a = self.a * right if primitive == "mul" else self.a / right
        return [dataclasses.replace(self, base=base, a=a, whole=False)]


def product(
    name: str,
    params: Mapping[str, Any],
    operands: Sequence[Any],
    base_product: Callable[..., Any],
    dropped_out: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """A product with an operand that has an adapter.

    Args:
      name: the name of its primitive.
      params: the parameters of its equation.
      operands: the operands; at least one is an `AdaptedWeight`.
      base_product: the product of operands without adapters.
      dropped_out: applied to what is multiplied by the adapter.
    """
    kind = ops.product_of(name)
    # Of a weight times a weight, the first is an input like any other.
    adapted = [isinstance(x, AdaptedWeight) for x in operands]
    side = max(i for i, is_adapted in enumerate(adapted) if is_adapted)
    weight, bases = operands[side], list(operands)
    if sum(adapted) > 1:
        bases[1 - side] = value_of(bases[1 - side])
    values = [weight if i == side else value_of(x) for i, x in enumerate(bases)]
    term = kind.low_rank(params, side, weight, values)
    if term is None:
        bases[side] = weight.value
        return base_product(*bases)
    bases[side] = weight.base
    base = base_product(*bases)
    result = base + term.apply(dropped_out(values[1 - side])).astype(base.dtype)
    return result if term.gain is None else result * term.gain.astype(base.dtype)


def computed(
    op: Op,
    operands: Sequence[Any],
    base: Callable[..., Any],
    dropped_out: Callable[[jax.Array], jax.Array],
) -> Any:
    """The result of an operation that reads a weight with an adapter.

    Args:
      op: the operation.
      operands: its operands; at least one is an `AdaptedWeight`.
      base: computes the operation from operands without adapters.
      dropped_out: applied to what is multiplied by the adapter.
    """
    if ops.is_product(op.primitive):
        return product(op.primitive, op.params, operands, base, dropped_out)
    # Rows of a table: those of the base, and those of the adapter.
    table, *others = operands
    rows = table.apply(op.primitive, op.params, operands, lambda *x: [base(*x)])
    return base(value_of(table), *others) if rows is None else value_of(rows[0])


class _CannotChange(Exception):
    """An equation does not turn a factor into a factor."""


def _changed(primitive, params, shape, factor, others) -> list[jax.Array]:
    """What an equation that moves the elements of a weight makes of a factor.

    A factor has an entry for what shares it, as a scale of a quantized array does, for
    each index of the rank.
    """
    kind = ops.by_primitive(primitive)
    rows = None if kind is None else kind.looked_up(params, shape, factor, others)
    if rows is not None:
        return [rows]
    codes = jnp.zeros(shape, jnp.int8)

    def change(part):
        results = structural.CHANGES[primitive](params, QArray(codes, part), others)
        if results is None:
            raise _CannotChange
        for axis in range(results[0].ndim):
            results = [
                structural.spread(x, axis) if x.scale.shape[axis] != 1 else x
                for x in results
            ]
        return [x.scale for x in results]

    return jax.vmap(change, in_axes=-1, out_axes=-1)(factor)


def _full(factor: jax.Array, axis: int, size: int) -> jax.Array:
    """A factor with an entry for every index along an axis."""
    shape = (*factor.shape[:axis], size, *factor.shape[axis + 1 :])
    return factor if factor.shape[axis] == size else jnp.broadcast_to(factor, shape)

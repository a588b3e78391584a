"""Products with a weight and the two factors of its adapter.

    x @ (W + A @ B) * gain = (x @ W + (x @ A) @ B) * gain

The factors have the axes of the weight, of its size or of 1, and the rank behind them.
Where a product contracts axes of both factors there is no such form, and the weight is
multiplied as one array.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.trace.carried import Carried

PRODUCTS = ("dot_general", "conv_general_dilated")
"""The primitives of products."""


def product(
    name: str,
    params: Mapping[str, Any],
    operands: Sequence[Any],
    base_product: Callable[..., Any],
    dropped_out: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """A product of which an operand has an adapter.

    Args:
      name: the name of its primitive.
      params: the parameters of its equation.
      operands: the operands; at least one is an `AdaptedWeight`.
      base_product: the product of operands without adapters.
      dropped_out: applied to what is multiplied by the adapter.
    """
    sides = [side for side in (0, 1) if hasattr(operands[side], "gain")]
    if len(sides) == 2:
        # A weight times a weight: one of them is an input like any other.
        operands = [_value(operands[0]), operands[1]]
    side = sides[-1]
    weight, x = operands[side], operands[1 - side]
    delta = _DELTAS[name](params, side, weight, _value(x))
    bases = list(operands)
    if delta is None:
        bases[side] = weight.value
        return base_product(*bases)
    apply, gain = delta
    bases[side] = weight.base
    base = base_product(*bases)
    adapted = base + apply(dropped_out(_value(x))).astype(base.dtype)
    return adapted if gain is None else adapted * gain.astype(base.dtype)


def _dot_delta(params, side, weight, x):
    """What the adapter adds to a matrix product, and the gain of the product."""
    contracting, batch = params["dimension_numbers"]
    axes, x_axes = contracting[side], contracting[1 - side]
    inner, outer = _in_order(weight, axes)
    if inner is None or _varies(weight.gain, axes):
        return None
    ndim = len(weight.a.shape) - 1
    letters = iter(string.ascii_letters)
    names = [next(letters) for _ in range(ndim)]
    rank = next(letters)
    x_names = [""] * jnp.ndim(x)
    pairs = [*zip(axes, x_axes, strict=True)]
    pairs += zip(batch[side], batch[1 - side], strict=True)
    for axis, x_axis in pairs:
        x_names[x_axis] = names[axis]
    x_names = [name or next(letters) for name in x_names]
    batched = [names[axis] for axis in batch[side]]
    kept = [n for axis, n in enumerate(names) if axis not in (*axes, *batch[side])]
    free = [
        name
        for axis, name in enumerate(x_names)
        if axis not in (*x_axes, *batch[1 - side])
    ]
    out = [*batched, *(kept + free if side == 0 else free + kept)]

    def apply(x):
        held, inner_names = _squeezed(inner, [*names, rank], rank)
        middle = [n for n in out if n in x_names or n in inner_names]
        half = _einsum([x_names, inner_names], [*middle, rank], x, held, params)
        held, outer_names = _squeezed(outer, [*names, rank], rank)
        found = [n for n in out if n in middle or n in outer_names]
        whole = _einsum([[*middle, rank], outer_names], found, half, held, params)
        return _with_axes(whole, found, out)

    gain = None
    if weight.gain is not None:
        held, gain_names = _squeezed(weight.gain, names)
        order = [gain_names.index(n) for n in out if n in gain_names]
        gain_names = [n for n in out if n in gain_names]
        gain = _with_axes(held.transpose(order), gain_names, out)
    return apply, gain


def _einsum(names, out, x, factor, params):
    subscripts = f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}"
    return jnp.einsum(
        subscripts, x, factor.astype(x.dtype), precision=params["precision"]
    )


def _conv_delta(params, side, weight, x):
    """What the adapter adds to a convolution, and the gain of its features."""
    if side != 1 or params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    feature, *others = numbers.rhs_spec
    inner, outer = _in_order(weight, others)
    if inner is None or inner.shape[feature] != 1 or _varies(weight.gain, others):
        return None
    groups, place = params["feature_group_count"], numbers.out_spec[1]
    shape = list(weight.shape)

    def apply(x):
        # Each group of inputs meets the whole of A, and has columns of B of its own.
        rank = inner.shape[-1]
        kernel = jnp.moveaxis(inner.squeeze(feature), -1, feature)
        kernel = jnp.broadcast_to(kernel, _but(shape, feature, rank))
        kernel = jnp.concatenate([kernel] * groups, axis=feature)
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        half = lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            **{name: params[name] for name in names},
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
        sizes = [1] * jnp.ndim(x)
        sizes[place] = -1
        gain = weight.gain.reshape(sizes)
    return apply, gain


_DELTAS = {"dot_general": _dot_delta, "conv_general_dilated": _conv_delta}


def _in_order(weight: Any, contracted: Sequence[int]) -> tuple[Any, Any]:
    """The factor that has the contracted axes, and the one that has none of them."""
    for inner, outer in ((weight.a, weight.b), (weight.b, weight.a)):
        if not _varies(outer, contracted):
            return inner, outer
    return None, None


def _varies(factor: Any, axes: Sequence[int]) -> bool:
    return factor is not None and any(factor.shape[axis] != 1 for axis in axes)


def _squeezed(
    factor: jax.Array, names: Sequence[str], *kept: str
) -> tuple[jax.Array, list[str]]:
    """A factor without axes of size 1 (but those kept), and the names of the others."""
    dropped = [
        axis
        for axis, name in enumerate(names)
        if factor.shape[axis] == 1 and name not in kept
    ]
    return factor.squeeze(dropped), [n for a, n in enumerate(names) if a not in dropped]


def _with_axes(array: jax.Array, names: Sequence[str], out: Sequence[str]) -> jax.Array:
    return jnp.expand_dims(
        array, [i for i, name in enumerate(out) if name not in names]
    )


def _but(shape: Sequence[int], axis: int, size: int) -> list[int]:
    return [*shape[:axis], size, *shape[axis + 1 :]]


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Carried) else value

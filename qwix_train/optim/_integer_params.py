"""Params that are kept in integer codes and scales, and are rounded stochastically."""

import functools
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from qwix_train.core import numerics, qarray, tiling
from qwix_train.core.qarray import QArray, WithAux
from qwix_train.optim import _noise, _param_grids


def is_one(param: Any) -> TypeGuard[QArray | WithAux]:
    """Whether a node of a tree of params is such a param."""
    return isinstance(param, QArray | WithAux)


def check(name: str, param: QArray | WithAux) -> None:
    """Raises a ValueError if the codes of a param cannot be rounded stochastically."""
    array = param.array if isinstance(param, WithAux) else param
    if not isinstance(array, QArray):
        reason = f"is a {type(array).__name__}"
    elif array.zero_point is not None:
        reason = "has zero points"
    elif not numerics.is_integer_qtype(array.qtype) or array.qtype == "int1":
        reason = f"is of type {numerics.qtype_name(array.qtype)}"
    elif isinstance(param, WithAux) and param.how.rotation is not None:
        reason = "is quantized in a rotated basis"
    else:
        return
    raise ValueError(
        f"stochastic_rounding: the param {name!r} {reason}, and it rounds QArrays of "
        "int2 to int8 without zero points: quantize it with absmax, rms or a range "
        "that is centered at zero."
    )


def dequantized(param: QArray | WithAux) -> jax.Array:
    """Returns the values of a param, in float32 (float64 for float64)."""
    array = param.array if isinstance(param, WithAux) else param
    return qarray.dequantize(array.astype(numerics.compute_dtype(array.dtype)))


def rounding_update(
    update: jax.Array, param: QArray | WithAux, key: jax.Array
) -> QArray | WithAux:
    """Returns the difference between a param and its rounded sum with an update.

    Args:
        update: The update of the dequantized param.
        param: The param, of any shape.
        key: The data of a random key.

    Returns:
        The differences of codes, and of scales, in the structure and the dtypes of the
        param. Differences of codes wrap around in their dtype, and so do their sums
        with codes. An element whose update is not finite keeps its value: no code
        stands for NaN or infinity, and such a scale would spoil all elements that share
        it.
    """
    if isinstance(param, WithAux):
        return param.replace(  # pyright: ignore[reportAttributeAccessIssue]
            array=_rounding_update(update, param.array, key)
        )
    return _rounding_update(update, param, key)


# Compiled as a whole: eager calls would compile each operation for each shape.
@jax.jit
def _rounding_update(update: jax.Array, param: QArray, key: jax.Array) -> QArray:
    dtype, wide = param.dtype, numerics.compute_dtype(param.dtype)
    low, high = numerics.code_range(param.qtype)
    scale = param.scale.astype(wide)
    update = jnp.where(jnp.isfinite(update), update, 0)
    exact = param.qvalue.astype(wide) + update.astype(wide) / _param_grids.spread(
        scale, update
    )
    excess = tiling.reduced(
        functools.partial(jnp.max, initial=0),
        jnp.maximum(exact / high, exact / low),
        scale.shape,
    )
    # Rounded up. A scale that does not grow stays as it is, and so do its codes.
    grown = scale * excess * (1 + jnp.finfo(dtype).eps)
    growth = jnp.where(excess <= 1, 0, grown - scale).astype(dtype)
    reached = (param.scale + growth).astype(wide)
    exact = jnp.clip(exact * _param_grids.spread(scale / reached, update), low, high)
    below = jnp.floor(exact)
    # The fraction is compared with the noise, and not added to it: a float sum could be
    # rounded up to an integer.
    noise = (_noise.bits(key, exact.shape) >> 8).astype(wide) * 2.0**-24
    codes = (below + (noise < exact - below)).astype(jnp.int8)
    change = (codes - param.qvalue.astype(jnp.int8)).astype(param.qvalue.dtype)
    return QArray(change, growth, None, param.qtype)

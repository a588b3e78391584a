"""From values to scaled values, which are rounded to codes, and back.

The scaled values are

    x * (1 / scale) + zero_point

with the reciprocal in float32. That is what XLA makes of a division by a scale that is
broadcast, eager or compiled; written out, it has the same bits in every execution, and
costs less. Where each element has its own scale nothing is broadcast, and it is a true
division. A scaled value of a bfloat16 array is rounded to bfloat16 before the zero
point is added, and again before the rounding to codes, as eager bfloat16 would.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core import numerics, tiling


def scaled_values(
    array: jax.Array, scale: jax.Array, zero_point: jax.Array | None
) -> jax.Array:
    """Returns what is rounded to codes, in float32 (float64 for float64)."""
    dtype, wide = array.dtype, numerics.compute_dtype(array.dtype)
    own_scales = array.shape == scale.shape
    factor = scale.astype(wide) if own_scales else 1 / scale.astype(wide)

    def scaled(x: jax.Array, factor: jax.Array, zero: jax.Array | None) -> jax.Array:
        x = x.astype(wide)
        y = numerics.true_divide(x, factor) if own_scales else x * factor
        if dtype == jnp.bfloat16:
            y = numerics.round_to_dtype(y, dtype)
        if zero is None:
            return y
        # Clipping far outside any type's range keeps LLVM from fusing the product
        # with the sum, which would then round once instead of twice.
        y = jnp.clip(y, -1024, 1024) + zero.astype(wide)
        return numerics.round_to_dtype(y, dtype) if dtype == jnp.bfloat16 else y

    return tiling.elementwise(scaled, array, factor, zero_point)


def rescaled_values(
    levels: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    dtype: Any = None,
) -> jax.Array:
    """Returns ``(levels - zero_point) * scale``.

    Args:
        levels: What codes stand for.
        scale: In a layout for them, a float dtype.
        zero_point: The same, or None.
        dtype: The dtype of the result; that of the scale if None.
    """
    dtype = scale.dtype if dtype is None else dtype
    wide = numerics.compute_dtype(dtype)

    def rescaled(x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        x = x.astype(wide)
        if zero is not None:
            x = x - zero.astype(wide)
        return numerics.round_to_dtype(x * scale.astype(wide), dtype).astype(dtype)

    return tiling.elementwise(rescaled, levels, scale, zero_point)


def round_trip(
    array: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    qtype: numerics.QType,
    noise_fn: numerics.NoiseFn | None = None,
) -> jax.Array:
    """Returns what codes of the array stand for, without making codes; NaN stays.

    Args:
        array: Any shape, a float dtype.
        scale: In a layout for the array, in its dtype or a wider one.
        zero_point: The same, or None.
        qtype: The type.
        noise_fn: Noise for stochastic rounding.
    """
    y = scaled_values(array, scale, zero_point)
    levels = numerics.round_to_level(y, qtype, array.dtype, noise_fn)
    return rescaled_values(levels, scale, zero_point, array.dtype)

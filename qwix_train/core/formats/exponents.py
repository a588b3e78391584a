"""The exponents of floats, from their bits."""

import jax
import jax.numpy as jnp


def frexp(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns ``m`` and ``e``: ``x = m * 2**e`` and ``1/2 <= |m| < 1``, as C has it.

    `jax.numpy.frexp` forgets how its exponents are sharded on an explicit mesh (JAX
    0.12), so that all of them are gathered on each device.

    Args:
        x: float32 or float64. What is subnormal may count as zero, as XLA computes.

    Returns:
        ``m`` in the dtype of ``x``, and ``e`` as int32. Zeros, infinities and NaN are
        their own ``m``, with ``e = 0``.

    >>> part, exponent = frexp(jnp.array([6.0, -0.5, 0.0]))
    >>> part.tolist(), exponent.tolist()
    ([0.75, -0.5, 0.0], [3, 0, 0])
    """
    info = jnp.finfo(x.dtype)
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    # The bits of the exponent, and those that numbers from 1/2 to below 1 have.
    ones = (1 << (info.bits - info.nmant - 1)) - 1
    half = ones // 2 - 1
    small = jnp.abs(x) < info.tiny
    normal = jnp.where(small, x * 2.0**info.nmant, x)
    bits = jax.lax.bitcast_convert_type(normal, integer)
    exponent = ((bits >> info.nmant) & ones) - half
    exponent = exponent - jnp.where(small, info.nmant, 0)
    part = (bits & ~(ones << info.nmant)) | (half << info.nmant)
    part = jax.lax.bitcast_convert_type(part, x.dtype)
    other = (x == 0) | ~jnp.isfinite(x)
    return jnp.where(other, x, part), jnp.where(other, 0, exponent).astype(jnp.int32)

"""Floats of 8 bits and fewer: their grid, rounding to it, and the bits of a code.

A small float has the values ``m * 2**(e - mantissa)`` for whole ``m`` from
``2**mantissa`` to ``2**(mantissa + 1) - 1`` and exponents ``e`` from the lowest one;
and below ``2**lowest`` the multiples of ``2**(lowest - mantissa)``. What the top
exponent means differs between the types; the largest value says it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwix_train.core.formats.exponents import frexp


class SmallFloat(NamedTuple):
    """A type of small floats.

    Attributes:
        mantissa: The bits of the mantissa that are stored.
        lowest: The exponent of the smallest normal number.
        largest: The largest value.
        has_nan: Whether a code stands for NaN.
        signed_zero: Whether a code stands for -0.
    """

    mantissa: int
    lowest: int
    largest: float
    has_nan: bool
    signed_zero: bool = True

    @classmethod
    def of_dtype(cls, dtype: Any) -> "SmallFloat":
        """The type of small floats that a dtype is.

        >>> SmallFloat.of_dtype(jnp.float4_e2m1fn)
        SmallFloat(mantissa=1, lowest=0, largest=6.0, has_nan=False, signed_zero=True)
        """
        info = jnp.finfo(dtype)
        has_nan, signed_zero = info.bits == 8, not str(info.dtype).endswith("fnuz")
        return cls(info.nmant, int(info.minexp), float(info.max), has_nan, signed_zero)

    def rounded(self, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Returns the nearest values, in float32 or float64; beyond the ends, the ends.

        Ties go to the value whose last bit is 0. NaN stays where the type has it, and
        is 0 elsewhere.

        Args:
            x: Any shape, float32 or float64.
            noise: Noise for stochastic rounding, in units of the distance between the
                two values around each; broadcastable to ``x``.

        >>> SmallFloat.of_dtype(jnp.float4_e2m1fn).rounded(
        ...     jnp.array([0.2, 2.5, -5.1, 9.0])).tolist()
        [0.0, 2.0, -6.0, 6.0]
        """
        if not self.has_nan:
            x = jnp.where(jnp.isnan(x), 0, x)
        x = jnp.clip(x, -self.largest, self.largest)
        if noise is not None:
            return self._rounded_at_random(x, noise)
        # XLA rounds the mantissa, to even. Below the smallest normal number the values
        # are as far apart as above it.
        exponent_bits = 11 if x.dtype == jnp.float64 else 8
        normal = jax.lax.reduce_precision(x, exponent_bits, self.mantissa)
        step = 2.0 ** (self.lowest - self.mantissa)
        small = jnp.round(x * (1 / step)) * step
        near_zero = jnp.abs(x) < 2.0**self.lowest
        return self._cut(jnp.where(near_zero, small, normal))

    def _rounded_at_random(self, x: jax.Array, noise: jax.Array) -> jax.Array:
        # A value lies from 2**(exponent - 1) to below 2**exponent.
        _, exponent = frexp(x)
        exponent = jnp.maximum(exponent - 1, self.lowest) - self.mantissa
        step = jnp.ldexp(jnp.ones((), x.dtype), exponent)
        return self._cut(jnp.round(x / step + noise) * step)

    def _cut(self, x: jax.Array) -> jax.Array:
        x = jnp.clip(x, -self.largest, self.largest)
        return x if self.signed_zero else jnp.where(x == 0, 0, x)

    def to_bits(self, values: jax.Array, bits: int) -> jax.Array:
        """Returns the bits of values, as uint8: the sign, the exponent, the mantissa.

        Args:
            values: Values of the type, none of them NaN.
            bits: The bits of the type.

        >>> SmallFloat.of_dtype(jnp.float4_e2m1fn).to_bits(
        ...     jnp.array([0.5, -6.0]), 4).tolist()
        [1, 15]
        """
        values = values.astype(jnp.float32)
        magnitude = jnp.abs(values)
        # The upper bits of a float32 are those of the small float, but for the exponent
        # of 1. Below the smallest normal number that is a multiple of the step.
        as_int = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
        normal = (as_int >> (23 - self.mantissa)) - (self._offset << self.mantissa)
        small = (magnitude * 2.0 ** (self.mantissa - self.lowest)).astype(jnp.int32)
        place = jnp.where(magnitude < 2.0**self.lowest, small, normal)
        # JAX 0.10 crashes where an int32 meets a weak int64 (`jax_enable_x64`).
        sign = jnp.where(jnp.signbit(values), jnp.int32(2 ** (bits - 1)), 0)
        return (place | sign).astype(jnp.uint8)

    def from_bits(self, code: jax.Array, bits: int, dtype: Any) -> jax.Array:
        """Returns the values of bits, in a float dtype; NaN for those of no number.

        Args:
            code: What `to_bits` gave, in an unsigned dtype.
            bits: The bits of the type.
            dtype: The dtype.

        >>> SmallFloat.of_dtype(jnp.float4_e2m1fn).from_bits(
        ...     jnp.array([1, 15], jnp.uint8), 4, jnp.float32).tolist()
        [0.5, -6.0]
        """
        code = code.astype(jnp.int32)
        place = code & (2 ** (bits - 1) - 1)
        as_int = (place << (23 - self.mantissa)) + (self._offset << 23)
        normal = jax.lax.bitcast_convert_type(as_int, jnp.float32)
        small = place.astype(jnp.float32) * 2.0 ** (self.lowest - self.mantissa)
        values = jnp.where(place < 2**self.mantissa, small, normal)
        if self.has_nan:
            values = jnp.where(values > self.largest, jnp.nan, values)
        sign = code & 2 ** (bits - 1)
        if not self.signed_zero:  # What would be -0 is NaN.
            values = jnp.where((sign != 0) & (place == 0), jnp.nan, values)
        as_int = jax.lax.bitcast_convert_type(values, jnp.int32) | sign << (32 - bits)
        return jax.lax.bitcast_convert_type(as_int, jnp.float32).astype(dtype)

    @property
    def _offset(self) -> int:
        """What the exponent of a float32 has more than the one that is stored."""
        return 127 + self.lowest - 1

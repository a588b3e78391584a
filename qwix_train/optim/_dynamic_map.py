"""The dynamic map of 8-bit optimizers (arXiv 2110.02861, sections 1.3 and 2.2).

A code stands for a value of one of seven decades below 1. The values of decade ``i``
are the centers of ``f`` equal parts of it:

    10**(i - 6) * (0.1 + 0.9 * (j + 0.5) / f)        i = 0..6, j = 0..f - 1

A byte holds the sign, the decade in unary, and the fraction in the bits that are left,
so each decade has twice the fractions of the one below: ``f = 2**i`` for each sign.
The unsigned map spends the bit of the sign on the fraction: ``f = 2**(i + 1)``. With 0
and 1 that makes 256 values. A code here is the place of its value in ascending order:
0 is code 127 of the signed map and code 0 of the unsigned one. There is no -1; the
signed map starts at -0.993.
"""

import jax
import jax.numpy as jnp
import numpy as np

_DECADES = 7

SIGNED_ZERO = 127
"""The code of 0 in the signed map."""

ONE = 255
"""The code of 1 in both maps."""


def _values(fractions: int, signs: tuple[int, ...]) -> np.ndarray:
    values = [np.array([0.0, 1.0])]
    for i in range(_DECADES):
        count = fractions * 2**i
        centers = 0.1 + 0.9 * (np.arange(count) + 0.5) / count
        values += [sign * 10.0 ** (i - _DECADES + 1) * centers for sign in signs]
    return np.sort(np.concatenate(values))


SIGNED = _values(1, (-1, 1))
"""The values of the signed map, ascending; shape=(256,), dtype=float64."""

UNSIGNED = _values(2, (1,))
"""The values of the unsigned map, ascending; shape=(256,), dtype=float64."""


def _decade_starts(values: np.ndarray, fractions: int) -> list[float]:
    """Returns the magnitudes from which on decades 0 to 6, and then 1, are nearest."""
    values = values[values >= 0]
    firsts = [fractions * (2**i - 1) + 1 for i in range(_DECADES + 1)]
    return [float(values[first - 1] + values[first]) / 2 for first in firsts]


_SIGNED_STARTS = _decade_starts(SIGNED, 1)
_UNSIGNED_STARTS = _decade_starts(UNSIGNED, 2)


def encode(
    x: jax.Array,
    unsigned: jax.Array,
    zero: jax.Array | None = None,
    signed_zero: jax.Array | int = SIGNED_ZERO,
) -> jax.Array:
    """Returns the code of the nearest value.

    In the unsigned map only 0 has the code of 0. A positive number has at least the
    smallest positive value. An optimizer divides by the root of a second moment, so a
    moment that became 0 would make the update as large as the optimizer's epsilon
    allows.

    Args:
        x: Values from -0.993 to 1, or from 0 to 1 where ``unsigned``; float32 or
            float64. Values above 1 have the code of 1.
        unsigned: Whether the code is one of the unsigned map; broadcasts to ``x``.
        zero: Which elements have the code of 0. If None, those of ``x`` that are
            nearest to it, or equal to it where ``unsigned``.
        signed_zero: The code of 0 in the signed map. Where it is 0, only the half of
            the map that is not negative has codes.

    Returns:
        Codes in the shape of ``x``; uint8.

    >>> compiled = jax.jit(encode)
    >>> compiled(jnp.array([-1., 0., 1e-3, 1.]), jnp.array(False)).tolist()
    [0, 127, 142, 255]
    >>> compiled(jnp.array([0., 1e-9, 1e-3, 1.]), jnp.array(True)).tolist()
    [0, 1, 30, 255]
    """
    # The values of a decade are evenly spaced, so the place within it is arithmetic.
    # It vectorizes: a binary search takes some 30 times as long on a CPU.
    magnitude = jnp.abs(x)
    starts = [
        jnp.where(unsigned, jnp.asarray(u, x.dtype), jnp.asarray(s, x.dtype))
        for u, s in zip(_UNSIGNED_STARTS, _SIGNED_STARTS, strict=True)
    ]
    one = jnp.ones((), x.dtype)
    decade, count = 10.0 ** (_DECADES - 1) * one, one
    for i in range(1, _DECADES):
        reached = magnitude >= starts[i]
        decade = jnp.where(reached, 10.0 ** (_DECADES - 1 - i), decade)
        count = jnp.where(reached, 2.0**i, count)
    count = jnp.where(unsigned, 2 * count, count)
    fraction = jnp.floor(count * (magnitude * decade - 0.1) / 0.9)
    fraction = jnp.clip(fraction, 0, count - 1)
    # Below a decade are 0 and the values of smaller decades: 1 + (count - 1) of them,
    # or 1 + (count - 2) in the unsigned map, whose decades start with two values.
    place = count + fraction - jnp.where(unsigned, 1, 0)
    place = jnp.where(magnitude >= starts[-1], jnp.where(unsigned, 255, 128), place)
    if zero is None:
        zero = jnp.where(unsigned, magnitude == 0, rounds_to_zero(x))
    place = jnp.where(zero, 0, place)
    place = jnp.where(x < 0, -jnp.minimum(place, SIGNED_ZERO), place)
    code = place + jnp.where(unsigned, 0, signed_zero).astype(x.dtype)
    return code.astype(jnp.int32).astype(jnp.uint8)


def rounds_to_zero(x: jax.Array) -> jax.Array:
    """Returns whether 0 is the nearest value of the signed map."""
    return jnp.abs(x) < _SIGNED_STARTS[0]


def decode(
    codes: jax.Array,
    unsigned: jax.Array,
    dtype: jnp.dtype,
    signed_zero: jax.Array | int = SIGNED_ZERO,
) -> jax.Array:
    """Returns the values of codes, in the dtype that is given; see `encode`.

    >>> codes = jnp.array([0, 127, 255], jnp.uint8)
    >>> values = jax.jit(decode, static_argnums=2)(codes, jnp.array(False), jnp.float32)
    >>> [round(value, 3) for value in values.tolist()]
    [-0.993, 0.0, 1.0]
    """
    # Within a decade a value is linear in its code. A lookup in a table would be a
    # gather, which neither fuses with what follows nor takes any sharding.
    # Only these two numbers depend on the map, and each block has one of them.
    step = jnp.where(unsigned, jnp.asarray(0.5, dtype), 1)
    first = jnp.where(unsigned, 0.5, -signed_zero).astype(dtype)
    place = codes.astype(jnp.int32).astype(dtype) * step + first
    magnitude = jnp.abs(place)
    slope, offset = jnp.zeros((), dtype), jnp.zeros((), dtype)
    for i in range(_DECADES):
        reached = magnitude >= 2.0**i
        decade = 10.0 ** (i - _DECADES + 1)
        slope = jnp.where(reached, 0.9 * decade / 2.0**i, slope)
        offset = jnp.where(reached, 0.8 * decade, offset)
    values = (magnitude + step / 2) * slope - offset
    values = jnp.where(magnitude >= 2.0**_DECADES, 1, values)
    return jnp.where(place < 0, -values, values)

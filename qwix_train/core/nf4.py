"""NF4, the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E).

A code is the index of one of 16 levels from -1 to 1, denser around 0.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The levels, in ascending order."""


@functools.cache
def _thresholds() -> np.ndarray:
    """Returns the 15 largest float32 values that take the lower of two levels.

    "Nearer" is judged by the distances as float32 computes them, ties going to the
    lower level. Both distances are monotone in the value, so one threshold for each
    pair of neighbors says it all; bisection over the floats finds it.
    """
    thresholds = []
    for low, high in zip(LEVELS[:-1], LEVELS[1:], strict=True):
        inside, outside = low, high
        while np.nextafter(inside, outside) != outside:
            middle = np.float32((np.float64(inside) + np.float64(outside)) / 2)
            if middle in (inside, outside):
                middle = np.nextafter(inside, outside)
            if np.abs(low - middle) <= np.abs(high - middle):
                inside = middle
            else:
                outside = middle
        thresholds.append(inside)
    return np.array(thresholds, np.float32)


def encode(x: jax.Array) -> jax.Array:
    """Returns the index of the nearest level, as uint4; NaN gives that of 0.

    >>> encode(jnp.array([-3., 0.01, 0.9])).tolist()
    [0, 7, 15]
    """
    # A value's code is the number of thresholds below it, found by bisection: bit by
    # bit from the highest, each compared with the threshold in the middle of what is
    # left. `NaN > t` is false, so NaN comes to the lower half; there, and below, `not
    # (x <= t)` sends it to the highest, level 7, which is 0.
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    thresholds = _thresholds().tolist()
    bits = [x > thresholds[7]]
    for step in (4, 2, 1):
        middle = thresholds[step - 1 :: 2 * step]
        bits.append(~(x <= _chosen(bits, middle, x.dtype)))
    code = jnp.zeros(x.shape, jnp.uint8)
    for weight, bit in zip((8, 4, 2, 1), bits, strict=True):
        code |= jnp.where(bit, jnp.uint8(weight), jnp.uint8(0))
    # XLA on a CPU does not vectorize a loop that writes half bytes. The barrier keeps
    # the comparisons out of that loop.
    return jax.lax.optimization_barrier(code).astype(jnp.uint4)


def encode_stochastically(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Returns the index of one of the two levels around each value, as uint4.

    With the levels ``a <= x < b``, it is that of ``b`` where
    ``(x - a) / (b - a) + noise >= 1 / 2``: with uniform noise, ``x`` on average. Values
    beyond the ends saturate, and NaN gives the index of 0.

    Args:
        x: Scaled values.
        noise: From -0.5 to below 0.5; broadcastable to ``x``.

    >>> encode_stochastically(jnp.array([0.5, 0.5]), jnp.array([0.0, 0.1])).tolist()
    [12, 13]
    """
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    x = jnp.where(jnp.isnan(x), 0, x)
    lower = jnp.zeros(x.shape, jnp.uint8)
    for level in LEVELS[1:-1].tolist():
        lower += (x >= level).astype(jnp.uint8)
    low, high = decode(lower, x.dtype), decode(lower + 1, x.dtype)
    upper = (x - low) / (high - low) + noise >= 0.5
    return jax.lax.optimization_barrier(lower + upper.astype(jnp.uint8)).astype(
        jnp.uint4
    )


def _chosen(bits: list[jax.Array], values: list[Any], dtype: Any) -> jax.Array:
    """One of values, by the bits of its index, the highest first."""
    chosen = [jnp.asarray(value, dtype) for value in values]
    for bit in reversed(bits):
        pairs = zip(chosen[0::2], chosen[1::2], strict=True)
        chosen = [jnp.where(bit, high, low) for low, high in pairs]
    return chosen[0]


def decode(q: jax.Array, dtype: Any) -> jax.Array:
    """Returns the levels of codes, rounded to a dtype."""
    # A binary tree of selects, one bit of the code at a time: it fuses with what
    # follows, where a lookup would be a gather.
    codes = q.astype(jnp.uint8)
    bits = [(codes >> bit) & 1 == 1 for bit in (3, 2, 1, 0)]
    return _chosen(bits, LEVELS.astype(jnp.dtype(dtype)).tolist(), dtype)

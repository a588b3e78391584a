"""Codes that are places in a table of levels, such as those of NF4.

NF4 is the 4-bit NormalFloat of QLoRA (arXiv 2305.14314, appendix E): 16 levels from -1
to 1, denser around 0. A table of another length is filled up to the next power of two,
with levels that no value takes.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Table: TypeAlias = tuple[float, ...]
"""Levels in ascending order, 0 among them; each is exact in float32."""

NF4: Table = tuple(
    float(np.float32(level))
    for level in (
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
    )
)


@functools.cache
def _thresholds(table: Table) -> list[float]:
    """Returns, for each level but the last, the largest float32 value that takes it.

    "Nearer" is judged by the distances as float32 computes them, ties going to the
    lower level. Both distances are monotone in the value, so one threshold for each
    pair of neighbors says it all; bisection over the floats finds it.
    """
    thresholds = []
    levels = np.array(table, np.float32)
    for low, high in zip(levels[:-1], levels[1:], strict=True):
        inside, outside = low, high
        while np.nextafter(inside, outside) != outside:
            middle = np.float32((np.float64(inside) + np.float64(outside)) / 2)
            if middle in (inside, outside):
                middle = np.nextafter(inside, outside)
            if np.abs(low - middle) <= np.abs(high - middle):
                inside = middle
            else:
                outside = middle
        thresholds.append(float(inside))
    return thresholds


def bits(table: Table) -> int:
    """Returns the bits of a place in a table.

    >>> bits(NF4)
    4
    """
    return (len(table) - 1).bit_length()


def storage(table: Table) -> np.dtype:
    """Returns the dtype of the codes."""
    return jnp.dtype(jnp.uint4 if len(table) <= 16 else jnp.uint8)


def encode(x: jax.Array, table: Table) -> jax.Array:
    """Returns the place of the nearest level; NaN gives that of 0.

    >>> encode(jnp.array([-3., 0.01, 0.9]), NF4).tolist()
    [0, 7, 15]
    """
    # A value's code is the number of thresholds below it, found by bisection: bit by
    # bit from the highest, each compared with the threshold in the middle of what is
    # left.
    x = _without_nan(x)
    count = 2 ** bits(table)
    thresholds = _thresholds(table)
    thresholds = thresholds + [float("inf")] * (count - 1 - len(thresholds))
    found: list[jax.Array] = []
    for step in [2**i for i in reversed(range(bits(table)))]:
        middle = thresholds[step - 1 :: 2 * step]
        found.append(x > _chosen(found, middle, x.dtype))
    code = jnp.zeros(x.shape, jnp.uint8)
    for bit, weight in zip(reversed(found), [2**i for i in range(8)], strict=False):
        code |= jnp.where(bit, jnp.uint8(weight), jnp.uint8(0))
    return _stored(code, table)


def encode_stochastically(x: jax.Array, table: Table, noise: jax.Array) -> jax.Array:
    """Returns the place of one of the two levels around each value.

    With the levels ``a <= x < b``, it is that of ``b`` where
    ``(x - a) / (b - a) + noise >= 1 / 2``: with uniform noise, ``x`` on average. Values
    beyond the ends saturate, and NaN gives the place of 0.

    Args:
        x: Scaled values.
        table: The levels.
        noise: From -0.5 to below 0.5; broadcastable to ``x``.

    >>> x, noise = jnp.array([0.5, 0.5]), jnp.array([0.0, 0.1])
    >>> encode_stochastically(x, NF4, noise).tolist()
    [12, 13]
    """
    x = _without_nan(x)
    lower = jnp.zeros(x.shape, jnp.uint8)
    for level in table[1:-1]:
        lower += (x >= level).astype(jnp.uint8)
    low, high = decode(lower, table, x.dtype), decode(lower + 1, table, x.dtype)
    upper = (x - low) / (high - low) + noise >= 0.5
    return _stored(lower + upper.astype(jnp.uint8), table)


def decode(q: jax.Array, table: Table, dtype: Any) -> jax.Array:
    """Returns the levels of codes, rounded to a dtype."""
    # A binary tree of selects, one bit of the code at a time: it fuses with what
    # follows, where a lookup would be a gather.
    codes = q.astype(jnp.uint8)
    levels = _filled(table, dtype).tolist()
    # Within a loop over layers XLA would take the constants out of it, each of them
    # broadcast to the shape of the codes: 16 float arrays. Behind the barrier they are
    # not known to be the same in each round.
    codes, *levels = jax.lax.optimization_barrier(
        (codes, *(jnp.asarray(level, dtype) for level in levels))
    )
    return _selected(codes, levels, dtype)


def selected(q: jax.Array, table: Table, dtype: Any) -> jax.Array:
    """The same within a kernel, which no compiler takes constants out of."""
    return _selected(q, _filled(table, dtype).tolist(), dtype)


def looked_up(q: jax.Array, table: Table, dtype: Any) -> jax.Array:
    """The same of codes in memory: on a CPU by a lookup.

    That takes a half to two thirds of the time of the selects, and half as long to
    compile. Where codes are computed in the same program, XLA computes them in the loop
    of the lookups, which are not vectorized: to fake-quantize takes 12 times as long.
    """
    if any(axis is not None for axis in jax.typeof(q).sharding.spec):
        return decode(q, table, dtype)  # A lookup would have to be told the sharding.

    def lookup(q: jax.Array) -> jax.Array:
        levels = jnp.asarray(_filled(table, dtype))
        return levels.at[q.astype(jnp.int32)].get(mode="promise_in_bounds")

    selects = functools.partial(decode, table=table, dtype=dtype)
    return jax.lax.platform_dependent(q, cpu=lookup, default=selects)


def _selected(codes: jax.Array, values: list[Any], dtype: Any) -> jax.Array:
    found = [
        codes >> bit & 1 == 1 for bit in reversed(range(len(values).bit_length() - 1))
    ]
    return _chosen(found, values, dtype)


def _filled(table: Table, dtype: Any) -> np.ndarray:
    """The levels, and the last one for all other codes of so many bits."""
    levels = np.array(table, np.float32).astype(jnp.dtype(dtype))
    return np.pad(levels, (0, 2 ** bits(table) - len(levels)), mode="edge")


def _without_nan(x: jax.Array) -> jax.Array:
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    return jnp.where(jnp.isnan(x), 0, x)


def _stored(code: jax.Array, table: Table) -> jax.Array:
    # XLA on a CPU does not vectorize a loop that writes half bytes. The barrier keeps
    # the comparisons out of that loop.
    return jax.lax.optimization_barrier(code).astype(storage(table))


def _chosen(found: list[jax.Array], values: list[Any], dtype: Any) -> jax.Array:
    """One of values, by the bits of its index, the highest first."""
    chosen = [jnp.asarray(value, dtype) for value in values]
    for bit in reversed(found):
        pairs = zip(chosen[0::2], chosen[1::2], strict=True)
        chosen = [jnp.where(bit, high, low) for low, high in pairs]
    return chosen[0]

"""The ranges at which scales that are trained begin.

They are given as largest magnitudes, in units of which the scale is one over
`symmetric_bound`, as all ranges that are centered at zero are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import numerics


def lsq(
    tiles: jax.Array,
    axes: tuple[int, ...],
    scale_shape: tuple[int, ...],
    counts: np.ndarray,
    qtype: Any,
) -> jax.Array:
    """LSQ: the scale begins at ``2 * mean(|x|) / sqrt(q_max)``.

    Source: arXiv 1902.08153, section 2.1.

    Args:
        tiles: The array, with each group of elements that shares a scale along axes of
            its own; padded with zeros where tiles are.
        axes: These axes.
        scale_shape: The shape of the scale.
        counts: The elements of each group, without padding, in a layout.
        qtype: An integer type.

    Returns:
        The largest magnitude, in the shape of the scale, float32 or wider.
    """
    _, high = numerics.code_range(qtype)
    total = _sum(jnp.abs(_wide(tiles)), axes, scale_shape)
    mean = total / np.maximum(counts, 1).astype(total.dtype)
    return mean * (2 / high**0.5 * numerics.symmetric_bound(qtype))


def lsq_plus(
    tiles: jax.Array,
    axes: tuple[int, ...],
    scale_shape: tuple[int, ...],
    counts: np.ndarray,
    qtype: Any,
) -> jax.Array:
    """LSQ+: it begins at ``max(|mean - 3 std|, |mean + 3 std|) / 2**(bits - 1)``.

    Source: arXiv 2004.09576, section 3.2 (weights).

    Args:
        tiles: See `lsq`.
        axes: See `lsq`.
        scale_shape: See `lsq`.
        counts: See `lsq`.
        qtype: See `lsq`.

    Returns:
        See `lsq`.
    """
    wide = _wide(tiles)
    counts = np.maximum(counts, 1).astype(wide.dtype)
    mean = _sum(wide, axes, scale_shape) / counts
    squares = _sum(jnp.square(wide), axes, scale_shape) / counts
    # Of weights, whose mean is small against their spread, nothing cancels out.
    deviation = jnp.sqrt(jnp.maximum(squares - jnp.square(mean), 0))
    largest = jnp.abs(mean) + 3 * deviation
    steps = 2 ** (numerics.qtype_bits(qtype) - 1)
    return largest * (numerics.symmetric_bound(qtype) / steps)


def _wide(tiles: jax.Array) -> jax.Array:
    return tiles.astype(numerics.compute_dtype(tiles.dtype))


def _sum(x: jax.Array, axes: tuple[int, ...], scale_shape: Any) -> jax.Array:
    return jnp.sum(x, axis=axes).reshape(scale_shape)

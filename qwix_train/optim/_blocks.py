"""Arrays in 8-bit codes and one scale for each block of elements.

Codes have the shape of the array, and scales its rank: a block is a box of elements,
cut from the last axes, so that whatever shards the array shards its codes, and its
scales wherever no block lies on two devices.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qwix_train.core import numerics, qarray, tiling
from qwix_train.optim import _dynamic_map

_LARGEST = 0.25
"""The largest scale, as a share of the largest number of its dtype.

The reciprocal of a larger one is not a normal number.
"""

QTYPES = ("dynamic", "int8")
"""The types of codes: values of the dynamic maps, and the core's integers."""


def block_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Returns the shape of a block of at most ``block_size`` elements.

    It takes as much of the last axis as it may, and then of the axes before. A size
    that divides the axis is preferred unless it is less than half of that; else the
    last block along the axis is the shorter one.

    >>> block_shape((768, 3072), 256), block_shape((4096, 8), 256)
    ((1, 256), (32, 8))
    >>> block_shape((3, 3, 16, 32), 256), block_shape((50257,), 256)
    ((1, 1, 8, 32), (256,))
    """
    block = []
    for size in reversed(shape):
        most = min(size, block_size)
        divisor = next(d for d in range(most, 0, -1) if size % d == 0)
        tile = divisor if 2 * divisor > most else -(-size // -(-size // most))
        block.append(tile)
        block_size //= tile
    return tuple(reversed(block))


def scale_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Returns the number of blocks along each axis.

    >>> scale_shape((768, 3072), 256), scale_shape((4096, 8), 256)
    ((768, 12), (128, 1))
    """
    pairs = zip(shape, block_shape(shape, block_size), strict=True)
    return tuple(-(-size // tile) for size, tile in pairs)


def code_dtype(qtype: str) -> jnp.dtype:
    """Returns the dtype of the codes of a type."""
    return jnp.dtype(jnp.uint8 if qtype == "dynamic" else qtype)


# Compiled as a whole: an eager init would else compile each operation for each shape.
@functools.partial(jax.jit, static_argnames=("qtype", "block_size"))
def quantize(x: jax.Array, qtype: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes an array in blocks.

    Args:
        x: Any shape without an axis of size 0, a float dtype.
        qtype: One of `QTYPES`.
        block_size: The most elements that share a scale.

    Returns:
        Codes in the shape of ``x``, and scales in its dtype, one for each block. The
        scale is such that the largest magnitude is a value of the type, whatever its
        sign is; so quantizing again what was dequantized changes nothing, and no
        moment shrinks from step to step. A block without negative values has codes of
        the unsigned dynamic map, and says so by a negative scale. A magnitude beyond
        `_LARGEST`, infinity included, is saturated: the moments of one enormous
        gradient overflow, and must not make NaN of the block that they lie in.

    >>> codes, scale = quantize(jnp.array([[-1., 2.], [3., 0.]]), 'dynamic', 2)
    >>> codes.tolist(), scale.tolist()
    ([[35, 255], [255, 0]], [[2.0], [-3.0]])
    """
    counts = scale_shape(x.shape, block_size)
    blocks, within = tiling.split_tiled_axes(tiling.pad_to_tiles(x, counts), counts)
    highest = jnp.max(blocks, axis=within).reshape(counts)
    lowest = jnp.min(blocks, axis=within).reshape(counts)
    # Both keep the reciprocal of the scale finite, also where all is zero. That of
    # float16 is taken in float32; and its moments are that small.
    info = jnp.finfo(x.dtype)
    smallest = info.smallest_subnormal if x.dtype == jnp.float16 else info.tiny
    largest = _LARGEST * float(info.max)  # Of no dtype, which would widen bfloat16.
    if qtype != "dynamic":
        bound = numerics.code_range(qtype)[1]
        absmax = jnp.maximum(highest, -lowest)
        scale = absmax / jnp.asarray(bound, x.dtype)
        scale = jnp.clip(scale, smallest, largest)
        array = qarray.quantize_with_scale_zero_point(x, qtype, scale, None)
        return array.qvalue, array.scale
    end = jnp.asarray(_dynamic_map.SIGNED[0], x.dtype)
    scale = jnp.clip(jnp.maximum(highest, lowest / end), smallest, largest)
    scale = jnp.where(lowest >= 0, -scale, scale)
    return tiling.elementwise(_encode, x, scale), scale


@functools.partial(jax.jit, static_argnames="qtype")
def dequantize(codes: jax.Array, scale: jax.Array, qtype: str) -> jax.Array:
    """Returns the values of `quantize`'s codes and scales, in the scales' dtype."""
    if qtype != "dynamic":
        return qarray.dequantize(qarray.QArray(codes, scale, qtype=qtype))
    return tiling.elementwise(_decode, codes, scale)


def _encode(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = numerics.compute_dtype(x.dtype)
    scale = scale.astype(wide)
    return _dynamic_map.encode(x.astype(wide) * (1 / jnp.abs(scale)), scale < 0)


def _decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    wide = numerics.compute_dtype(scale.dtype)
    values = _dynamic_map.decode(codes, scale < 0, wide)
    return (values * jnp.abs(scale).astype(wide)).astype(scale.dtype)

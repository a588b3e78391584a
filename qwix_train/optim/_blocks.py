"""Arrays in 8-bit codes and one scale for each block of elements.

Codes have the shape of the array, and scales its rank. A block is a box of elements
along the last axes. So codes can be sharded as the array is, and scales, too, where no
block lies on two devices.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qwix_train.core import numerics, qarray, tiling
from qwix_train.core.formats.exponents import frexp
from qwix_train.optim import _dynamic_map

_LARGEST = 0.25
"""The largest scale, as a share of the largest number of its dtype.

The reciprocal of a larger one is not a normal number.
"""

_FINER = 128
"""In a finer block (see `_finer`), the largest value has a code from here on.

Code ``_FINER + n`` says that the other values have a scale that is 4**n times smaller.
"""

QTYPES = ("dynamic", "int8")
"""The types of codes: those of the dynamic maps, and int8 of the core."""


def block_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """Returns the shape of a block of at most ``block_size`` elements.

    It takes as much of the last axis as it can, then of the axis before, and so on.
    Along each axis, it has the largest length that divides the axis, if that is more
    than half of what fits. Otherwise the last block along the axis is shorter.

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


# Compiled as a whole: an eager init would compile each operation for each shape.
@functools.partial(jax.jit, static_argnames=("qtype", "block_size"))
def quantize(x: jax.Array, qtype: str, block_size: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes an array in blocks.

    Args:
        x: An array of a float dtype, in which no axis has size 0.
        qtype: One of `QTYPES`.
        block_size: The most elements that share a scale.

    Returns:
        Codes in the shape of ``x``, uint8 or int8, and scales in its dtype, one for
        each block. The largest magnitude of a block, whatever its sign, is a value of
        the type. So quantizing dequantized values again changes nothing, and no moment
        shrinks from step to step. A block without negative values has codes of the
        unsigned dynamic map, and says so by a negative scale. Scales end at `_LARGEST`,
        and larger values are saturated, infinity included: the moments of one enormous
        gradient overflow, and must not make their whole block NaN. Where all other
        values of such a block are too small for the map, they have a finer scale; see
        `_finer`.

    >>> codes, scale = quantize(jnp.array([[-1., 2.], [3., 0.]]), 'dynamic', 2)
    >>> codes.tolist(), scale.tolist()
    ([[35, 255], [255, 0]], [[2.0], [-3.0]])
    """
    counts = scale_shape(x.shape, block_size)
    blocks, within = tiling.split_tiled_axes(tiling.pad_to_tiles(x, counts), counts)
    flat = jnp.max(blocks, axis=within)
    highest = flat.reshape(counts)
    lowest = jnp.min(blocks, axis=within).reshape(counts)
    # These bounds keep the reciprocal of the scale finite, also in a block of zeros.
    # For float16 it is taken in float32, so that its scales can be as small as moments.
    smallest = _smallest(x.dtype)
    # A number without a dtype: one of float32 would widen bfloat16.
    largest = _LARGEST * float(jnp.finfo(x.dtype).max)
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
    spread = jnp.expand_dims(jnp.abs(scale).reshape(flat.shape), within)
    others = jnp.max(jnp.where(blocks < spread, blocks, 0), axis=within)
    finer = _once(_finer(scale, others.reshape(counts)).astype(jnp.float32))
    inverse = 1 / _unit(scale, finer)
    return tiling.elementwise(_encode, x, scale, inverse, finer), scale


@functools.partial(jax.jit, static_argnames="qtype")
def dequantize(codes: jax.Array, scale: jax.Array, qtype: str) -> jax.Array:
    """Returns the values of `quantize`'s codes and scales, in the scales' dtype."""
    if qtype != "dynamic":
        return qarray.dequantize(qarray.QArray(codes, scale, qtype=qtype))
    counts = scale.shape
    blocks, within = tiling.split_tiled_axes(tiling.pad_to_tiles(codes, counts), counts)
    top = jnp.max(blocks, axis=within).reshape(counts).astype(jnp.int32)
    has_finer = _may_be_finer(scale) & (top >= _FINER) & (top < _dynamic_map.ONE)
    finer = jnp.where(has_finer, top - _FINER, 0)
    return tiling.elementwise(_decode, codes, scale, _unit(scale, finer))


def _smallest(dtype: jnp.dtype) -> float:
    """Returns the smallest scale of a dtype."""
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)


def _may_be_finer(scale: jax.Array) -> jax.Array:
    return scale < -_smallest(scale.dtype)


def _finer(scale: jax.Array, others: jax.Array) -> jax.Array:
    """Returns the power of 4 by which a scale is divided for all but the largest value.

    The second moment of one enormous gradient can be so much larger than all others in
    its block that these would have the code of the smallest value. They would keep it
    until the large one has decayed: for tens of thousands of steps of Adam. So they get
    codes of the half of the signed map that is not negative, with a scale of their own.
    That leaves 128 codes of a byte. The largest value has one of these, which says the
    power. In any other block it has the last code of all.

    Args:
        scale: The scale of each block, negative if the block has no negative values.
        others: The largest of the other values of each block.

    Returns:
        The power, int32 from 1 to 126; 0 for blocks that need none.
    """
    may, wide = _may_be_finer(scale), numerics.compute_dtype(scale.dtype)
    scale, others = scale.astype(wide), others.astype(wide)
    _, of_scale = frexp(-scale)
    _, of_others = frexp(others)
    power = jnp.clip((of_scale - of_others - 2) // 2, 0, _dynamic_map.ONE - 1 - _FINER)
    lost = others <= -scale * _dynamic_map.UNSIGNED[1]
    return jnp.where(may & (others > 0) & lost, power, 0)


def _encode(
    x: jax.Array, scale: jax.Array, inverse: jax.Array, finer: jax.Array
) -> jax.Array:
    x = x.astype(inverse.dtype)
    ratio = x * jnp.abs(inverse)
    # A positive value does not become 0, even where the ratio is too small for a float.
    zero = jnp.where(scale < 0, x == 0, _dynamic_map.rounds_to_zero(ratio))
    signed_zero = _signed_zero(scale, inverse)
    codes = _dynamic_map.encode(ratio, inverse < 0, zero, signed_zero)
    # In a finer block the code of 1 is `_FINER`, and the largest value alone has it.
    return codes + jnp.where(codes >= _FINER, finer, 0).astype(jnp.uint8)


def _decode(codes: jax.Array, scale: jax.Array, unit: jax.Array) -> jax.Array:
    signed_zero = _signed_zero(scale, unit)
    values = _dynamic_map.decode(codes, unit < 0, unit.dtype, signed_zero)
    # The code of 1, and all above it, stand for the largest value.
    largest = jnp.abs(scale).astype(unit.dtype)
    return jnp.where(values == 1, largest, values * jnp.abs(unit)).astype(scale.dtype)


def _signed_zero(scale: jax.Array, unit: jax.Array) -> jax.Array:
    """Returns the code of 0 in the signed map, which is the lowest in a finer block."""
    is_finer = (scale < 0) & (unit > 0)
    return jnp.where(is_finer, 0, _dynamic_map.SIGNED_ZERO)


def _once(x: jax.Array) -> jax.Array:
    """Returns ``x``, so that XLA computes it once for each block, not for each element.

    XLA computes a cheap value again wherever it is used. It takes a division for an
    expensive one, and cannot know that this one is by 1.
    """
    return x / jnp.where(jnp.isnan(x), 2, 1)


def _unit(scale: jax.Array, finer: jax.Array) -> jax.Array:
    """Returns what 1 stands for in each block, in a wide dtype.

    It is negative where a block has codes of the unsigned map.
    """
    wide = scale.astype(numerics.compute_dtype(scale.dtype))
    power = -2 * finer.astype(jnp.int32)
    return _once(jnp.where(finer > 0, jnp.ldexp(-wide, power), wide))

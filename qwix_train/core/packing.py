"""Codes of fewer than 8 bits as bytes, without gaps.

The codes along one axis become a stream of bits, the first code in the lowest bits of
the first byte. The smallest group of codes that fills whole bytes is packed on its own
(2 codes in a byte of 4-bit types, 8 codes in 3 bytes of ``int3``), so shards that hold
whole groups are packed where they are; the last group is filled up with zero bits. All
other axes stay, and a packed array is sharded as its codes are.

The bits of a code are those of its two's complement; of the place in a table; of a
float its sign, exponent and mantissa; and 0 for the code -1 and 1 for +1 in ``int1``.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from qwix_train.core import numerics


def pack(codes: jax.Array, qtype: numerics.QType, axis: int = -1) -> jax.Array:
    """Packs codes along an axis, each shard where it is.

    Args:
        codes: Codes of the type, of rank 1 or more; others are cut to its bits.
        qtype: A type of fewer than 8 bits.
        axis: The axis. If it is sharded, the shards hold whole groups of codes;
            `packing_axis` gives such an axis.

    Returns:
        Bytes (uint8), in the shape that `packed_shape` says.

    Raises:
        ValueError: The type has 8 bits, or shards would have to exchange codes.

    >>> pack(jnp.array([1, -1, 7], jnp.int4), 'int4').tolist()  # 0xf1, 0x07
    [241, 7]
    """
    axis %= codes.ndim
    count, _ = _group(qtype)
    sharding = getattr(codes, "sharding", None)  # NumPy arrays have none.
    if not fits_shards(codes.shape, count, axis, sharding):
        raise ValueError(
            f"Codes of shape {codes.shape} are sharded along axis {axis} as "
            f"{sharding}, and a shard does not hold a multiple of {count} codes."
        )
    name = numerics.qtype_name(qtype)
    return _per_shard(_pack, codes, name, axis)


def unpack(
    packed: jax.Array, qtype: numerics.QType, length: int, axis: int = -1
) -> jax.Array:
    """Unpacks what `pack` has packed.

    Args:
        packed: Bytes.
        qtype: The type.
        length: The number of codes along the axis.
        axis: The axis.

    Returns:
        Codes in the dtype ``storage_dtype(qtype)``.

    Raises:
        ValueError: The type has 8 bits, ``length`` codes are not that many bytes, or
            a shard does not hold whole groups of codes.

    >>> unpack(jnp.array([241, 7], jnp.uint8), 'int4', 3).tolist()
    [1, -1, 7]
    """
    axis %= packed.ndim
    shape = (*packed.shape[:axis], length, *packed.shape[axis + 1 :])
    count, _ = _group(qtype)
    if packed.shape != packed_shape(shape, qtype, axis):
        raise ValueError(
            f"{length} codes of {numerics.qtype_name(qtype)} along axis {axis} are not "
            f"packed into an array of shape {packed.shape}."
        )
    if isinstance(packed.sharding, NamedSharding):
        local = packed.sharding.shard_shape(packed.shape)[axis]
        shards = packed.shape[axis] // max(local, 1)
        if shards > 1 and length % (shards * count):
            raise ValueError(
                f"Bytes of shape {packed.shape} are sharded along axis {axis} as "
                f"{packed.sharding}, and a shard does not hold whole groups of codes."
            )
        length //= max(shards, 1)
    return _per_shard(_unpack, packed, numerics.qtype_name(qtype), length, axis)


def packed_shape(
    shape: Sequence[int], qtype: numerics.QType, axis: int = -1
) -> tuple[int, ...]:
    """Returns the shape of packed codes.

    >>> packed_shape((16, 9), 'int3', axis=0), packed_shape((16, 9), 'int3')
    ((6, 9), (16, 6))
    """
    count, width = _group(qtype)
    axis %= len(shape)
    return (*shape[:axis], -(-shape[axis] // count) * width, *shape[axis + 1 :])


def packing_axis(
    shape: Sequence[int], qtype: numerics.QType, sharding: Sharding | None = None
) -> int | None:
    """Returns the axis along which codes pack into the fewest bytes.

    Args:
        shape: The shape of the codes, of rank 1 or more.
        qtype: The type.
        sharding: How the codes are sharded.

    Returns:
        Of the best axes the last. None if every axis is sharded such that a shard
        does not hold whole groups of codes.

    >>> packing_axis((16, 64), 'int4'), packing_axis((16, 3), 'int4')
    (1, 0)
    """
    count, _ = _group(qtype)
    axes = [a for a in range(len(shape)) if fits_shards(shape, count, a, sharding)]
    sizes = {a: math.prod(packed_shape(shape, qtype, a)) for a in axes}
    return min(reversed(axes), key=lambda a: sizes[a], default=None)


def fits_shards(
    shape: Sequence[int], count: int, axis: int, sharding: Sharding | None
) -> bool:
    """Whether shards hold multiples of a count along an axis, or all of it.

    Only of a `NamedSharding` is it asked: a shard of it is packed where it is.
    """
    if not isinstance(sharding, NamedSharding):
        return True
    local = sharding.shard_shape(tuple(shape))[axis]
    return local == shape[axis] or local % count == 0


def group_size(qtype: numerics.QType) -> int:
    """Returns how many codes are packed together.

    >>> group_size('int4'), group_size('int3')
    (2, 8)
    """
    return _group(qtype)[0]


def bits_of(codes: jax.Array, qtype: numerics.QType) -> jax.Array:
    """Returns the bits of codes of fewer than 8 bits, each in a byte of its own."""
    entry = numerics.format_of(qtype)
    if entry.bits == 1:
        codes = codes.astype(jnp.int8) > 0
    # A signed type of 8 bits first: uint8 takes no negative int4.
    unsigned = codes.dtype in (jnp.bool, jnp.uint4, jnp.uint8)
    codes = codes if unsigned else codes.astype(jnp.int8)
    return codes.astype(jnp.uint8) & (2**entry.bits - 1)


def from_bits(bits: jax.Array, qtype: numerics.QType) -> jax.Array:
    """Returns the codes that `bits_of` gave the bits of."""
    entry = numerics.format_of(qtype)
    dtype, count = entry.storage, entry.bits
    if not entry.has_values:
        return bits.astype(dtype)
    signed = bits.astype(jnp.int8)
    if count == 1:
        return (2 * signed - 1).astype(dtype)
    # Flipping the sign bit and taking its weight away extends it to the upper bits.
    sign = 2 ** (count - 1)
    return ((signed ^ sign) - sign).astype(dtype)


def _group(qtype: numerics.QType) -> tuple[int, int]:
    """The codes of a group, and its bytes."""
    bits = numerics.qtype_bits(qtype)
    if bits == 8:
        raise ValueError(f"Codes of {numerics.qtype_name(qtype)} fill a byte each.")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _per_shard(function: Callable, array: jax.Array, *args: Any) -> jax.Array:
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
        return _sharded(function, args, sharding.mesh, sharding.spec)(array)
    return function(array, *args)


@functools.lru_cache(maxsize=256)
def _sharded(function: Callable, args: tuple, mesh: Any, spec: PartitionSpec):
    return jax.jit(
        jax.shard_map(
            lambda array: function(array, *args),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
        )
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _pack(codes: jax.Array, name: str, axis: int) -> jax.Array:
    bits = numerics.qtype_bits(name)
    count, width = _group(name)
    fields = bits_of(codes, name)
    pad = [(0, 0)] * codes.ndim
    pad[axis] = (0, -codes.shape[axis] % count)
    fields = _split(jnp.pad(fields, pad), axis, count)
    return _merge([_gather(fields, 8, bits, byte) for byte in range(width)], axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _unpack(packed: jax.Array, name: str, length: int, axis: int) -> jax.Array:
    bits = numerics.qtype_bits(name)
    count, width = _group(name)
    parts = _split(packed, axis, width)
    fields = _merge([_gather(parts, bits, 8, code) for code in range(count)], axis)
    fields = jax.lax.slice_in_dim(fields, 0, length, axis=axis) & (2**bits - 1)
    return from_bits(fields, name)


def _gather(
    words: Sequence[jax.Array], to_bits: int, from_bits: int, index: int
) -> jax.Array:
    """One word of a stream that is cut into other words: bits from all it overlaps."""
    result = jnp.zeros_like(words[0])
    for i, word in enumerate(words):
        shift = i * from_bits - index * to_bits
        if 0 <= shift < to_bits:
            result |= word << shift
        elif -from_bits < shift < 0:
            result |= word >> -shift
    return result


def _split(array: jax.Array, axis: int, count: int) -> list[jax.Array]:
    """Every ``count``-th element of an axis, from each of the first ``count``."""
    size = array.shape[axis]
    starts = (min(i, size) for i in range(count))
    return [jax.lax.slice_in_dim(array, i, size, count, axis) for i in starts]


def _merge(parts: list[jax.Array], axis: int) -> jax.Array:
    """The inverse of `_split`."""
    stacked = jnp.stack(parts, axis=axis + 1)
    shape = list(stacked.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return stacked.reshape(shape)

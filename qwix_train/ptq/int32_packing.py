"""Integer codes packed into 32-bit words, as compressed-tensors packs them.

A code of ``b`` bits is stored as the unsigned number ``code + 2**(b - 1)``. Code ``i``
of a row takes ``b`` bits from bit ``i * b`` on, counted from the lowest bit of the
row's first word. (`core.packing` packs two's complement into bytes.)
"""

import numpy as np

PACKED_BITS = (2, 4, 8)
"""Widths that divide a word. How others are packed differs between releases."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs the last axis; the last word of a row is filled with zero bits.

    Args:
        codes: int8, from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``.
        bits: One of `PACKED_BITS`.

    Returns:
        int32 of shape ``(..., ceil(n * bits / 32))``.

    >>> [hex(word) for word in pack(np.array([-8, -7, 7, 0], np.int8), 4).tolist()]
    ['0x8f10']
    """
    per_byte = 8 // bits
    words = -(-codes.shape[-1] * bits // 32)
    octets = np.zeros((*codes.shape[:-1], 4 * words), np.uint8)
    unsigned = codes.view(np.uint8) + np.uint8(2 ** (bits - 1))
    for position in range(per_byte):
        part = unsigned[..., position::per_byte] & np.uint8(2**bits - 1)
        octets[..., : part.shape[-1]] |= part << np.uint8(position * bits)
    return octets.view("<i4").astype(np.int32)


def unpack(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Unpacks the last axis, the reverse of `pack`.

    Args:
        words: int32.
        bits: One of `PACKED_BITS`.
        length: The number of codes in a row.

    Returns:
        int8 of shape ``(..., length)``.

    >>> unpack(np.array([0x8f10], np.int32), 4, 4).tolist()
    [-8, -7, 7, 0]
    """
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (octets[..., None] >> shifts) & np.uint8(2**bits - 1)
    codes = codes.reshape(*words.shape[:-1], -1)[..., :length]
    return (codes - np.uint8(2 ** (bits - 1))).view(np.int8)

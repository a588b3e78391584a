"""Packed words against bits that are set one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwix_train.ptq.int32_packing import PACKED_BITS, pack, unpack


def bits_of(codes, bits):
    """The stream of bits of a row, as one Python integer."""
    return sum((code + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(codes))


@pytest.mark.slow
@pytest.mark.parametrize("bits", PACKED_BITS)
@given(data=st.data())
def test_codes_are_consecutive_bits(bits, data):
    code = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    length = data.draw(st.integers(1, 40))
    row = st.lists(code, min_size=length, max_size=length)
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    codes = np.array(rows, np.int8)
    words = pack(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (len(rows), -(-length * bits // 32))
    for expected, got in zip(rows, words, strict=True):
        assert int.from_bytes(got.astype("<i4").tobytes(), "little") == bits_of(
            expected, bits
        )
    np.testing.assert_array_equal(unpack(words, bits, length), codes)


def test_a_transposed_array():
    codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    np.testing.assert_array_equal(pack(codes.T, 4), pack(codes.T.copy(), 4))
    words = pack(codes, 4)
    np.testing.assert_array_equal(
        unpack(np.asfortranarray(np.repeat(words, 2, 1)), 4, 8), codes
    )

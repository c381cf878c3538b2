"""Packed codes: a bijection, the bytes of NumPy's bit streams, no more bytes than bits say, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.coding import bit_packing
from hashml.coding.bit_packing import code_dtype, packed_size

WIDTHS = range(1, 17)
pack = jax.jit(bit_packing.pack, static_argnames="bits")
unpack = jax.jit(bit_packing.unpack, static_argnames=("bits", "count"))


def stream(codes, bits):
    """The same by NumPy: every code's bits from the lowest, in a row, padded with zeros to bytes."""
    spread = (codes[..., None].astype(np.int64) >> np.arange(bits)) & 1
    return np.packbits(spread.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_are_those_of_the_bit_stream_and_codes_come_back(bits):
    """13 codes end within a byte, unless they are bytes."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, 13))
    codes[0, 0] = 2**bits - 1
    packed = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(packed, stream(codes, bits))
    assert packed.shape[-1] == packed_size(13, bits) == -(-13 * bits // 8)
    found = unpack(packed, bits, 13)
    assert found.dtype == code_dtype(bits)
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("bits", [1, 3, 10])
def test_every_row_of_bytes_is_a_row_of_codes(bits):
    """The other direction of the bijection, where codes fill their bytes."""
    rows = np.random.default_rng(0).integers(0, 256, (5, 5 * bits), dtype=np.uint8)
    np.testing.assert_array_equal(pack(unpack(jnp.asarray(rows), bits, 40), bits), rows)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 5, 12]), st.lists(st.integers(0, 2**32 - 1), min_size=9, max_size=9))
def test_only_the_low_bits_of_a_code_are_kept(bits, codes):
    codes = np.array(codes, np.uint32)
    packed = pack(jnp.asarray(codes), bits)
    np.testing.assert_array_equal(unpack(packed, bits, 9), codes % 2**bits)
    assert packed[-1] >> (9 * bits % 8 or 8) == 0


def test_ten_bits_take_ten_bits():
    """Four codes in five bytes, not eight; and the other widths that no byte divides."""
    assert [packed_size(16, bits) for bits in (3, 5, 6, 7, 10, 12)] == [6, 10, 12, 14, 20, 24]


def test_works_on_empty_arrays_and_inside_a_trace():
    assert pack(jnp.zeros((2, 0), jnp.int32), 3).shape == (2, 0)
    assert unpack(jnp.zeros((0, 3), jnp.uint8), 6, 4).shape == (0, 4)
    codes = jnp.arange(12, dtype=jnp.uint16).reshape(3, 4) * 77
    both = jax.jit(jax.vmap(lambda row: unpack(pack(row, 10), 10, 4)))
    np.testing.assert_array_equal(both(codes), codes % 1024)


@pytest.mark.parametrize("bits", [0, 17, -3])
def test_refuses_other_widths(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; a code has 1 to 16"):
        pack(jnp.zeros(4, jnp.int32), bits)
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        unpack(jnp.zeros(4, jnp.uint8), bits, 4)


def test_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="packed has rows of 4 bytes; 4 codes of 10 bits take 5"):
        unpack(jnp.zeros((2, 4), jnp.uint8), 10, 4)
    with pytest.raises(ValueError, match="count is -1"):
        packed_size(-1, 4)

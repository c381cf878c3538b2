"""Codes of one width with escapes: the definition by a loop, sizes, round trips, refusals."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.coding.bit_packing import packed_size
from hashml.coding.fixed_rate import (
    FixedRate,
    decode_fixed_rate,
    decode_fixed_rate_host,
    encode_fixed_rate,
)

jitted = jax.jit(decode_fixed_rate, static_argnums=(1, 2))


def exponents(count, scale=1.0):
    values = np.random.default_rng(0).standard_normal(count) * scale
    return np.clip(np.floor(np.log2(np.abs(values))) + 120, 0, 255).astype(np.uint8)


def test_the_definition_by_a_loop():
    symbols = np.concatenate([exponents(4096), exponents(1000, 2.0**40)])
    coded = encode_fixed_rate(symbols, 3)
    bits = np.unpackbits(np.asarray(coded.codes), bitorder="little")
    escapes, found = iter(coded.escapes.tolist()), []
    for i in range(len(symbols)):
        code = int(bits[3 * i] + 2 * bits[3 * i + 1] + 4 * bits[3 * i + 2])
        found.append(next(escapes) if code == 7 else int(coded.tops[i // 4096]) - code)
    assert found == symbols.tolist()
    assert next(escapes, None) is None
    assert int(coded.tops[1]) - int(coded.tops[0]) == 40  # each block has its own top


@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_the_top_leaves_the_fewest_escapes(bits):
    symbols = exponents(3000)
    coded = encode_fixed_rate(symbols, bits)
    window = 2**bits - 1
    outside = [int(((symbols > top) | (symbols <= top - window)).sum()) for top in range(256)]
    assert len(coded.escapes) == min(outside)


def test_sizes():
    coded = encode_fixed_rate(exponents(10_000), 3)
    assert coded.codes.nbytes == packed_size(10_000, 3)
    assert coded.tops.nbytes == 3
    # A Gaussian's exponents escape in 2.2 to 2.9 of 100 cases, as seven of them have codes.
    assert 0.015 < len(coded.escapes) / 10_000 < 0.035


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 9000), st.integers(1, 7), st.integers(1, 256), st.integers(0, 2**32 - 1))
def test_any_symbols_come_back(count, bits, alphabet, seed):
    symbols = np.random.default_rng(seed).integers(256 - alphabet, 256, count).astype(np.uint8)
    np.testing.assert_array_equal(decode_fixed_rate_host(encode_fixed_rate(symbols, bits), count, bits), symbols)


@pytest.mark.parametrize("count", [0, 1, 5001])
def test_jit_agrees_without_and_with_escapes(count):
    for symbols in (np.full(count, 9, np.uint8), exponents(count)):
        np.testing.assert_array_equal(jitted(encode_fixed_rate(symbols, 3), count, 3), symbols)


def test_refusals():
    coded = encode_fixed_rate(exponents(100), 3)
    for call in (encode_fixed_rate, lambda s, b: decode_fixed_rate(coded, 100, b)):
        with pytest.raises(ValueError, match="bits is 8; a code of a byte's symbol has 1 to 7"):
            call(exponents(100), 8)
    for decode in (decode_fixed_rate, decode_fixed_rate_host):
        with pytest.raises(ValueError, match="coded has 38 bytes and 1 tops; 5000 symbols take 1875 and 2"):
            decode(coded, 5000, 3)
    with pytest.raises(ValueError, match=r"coded has \d+ escapes; its codes name \d+"):
        decode_fixed_rate_host(FixedRate(coded.codes, coded.tops, np.zeros(99, np.uint8)), 100, 3)

"""Formats cut into symbols and rests: every pattern comes back, bits are where the papers have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.weights.float_split import FORMATS, float_format, from_bits, join, rest_size, split, to_bits

BF16, F16, E4M3, E5M2 = (FORMATS[name] for name in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"))


def patterns(form):
    return np.arange(2**form.bits, dtype=np.uint64).astype(form.word)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_pattern_comes_back(form):
    """NaN payloads, infinities, signed zeros and subnormals are patterns like others."""
    bits = patterns(form)
    numbers = from_bits(bits, form, bits.shape)
    assert np.isnan(numbers.astype(np.float32)).any()
    symbols, rest = split(to_bits(numbers), form)
    assert symbols.max() == 2**form.symbol_bits - 1
    assert rest.nbytes == rest_size(len(bits), form) == len(bits) * form.rest_bits // 8
    np.testing.assert_array_equal(join(symbols, rest, form), bits)

    @jax.jit
    def traced(numbers):
        return from_bits(join(*split(to_bits(numbers), form), form), form, numbers.shape)

    back = np.asarray(traced(jnp.asarray(numbers)))
    np.testing.assert_array_equal(back.view(form.word), bits)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_any_count(form, count):
    bits = patterns(form)[-count - 1 : -1]
    symbols, rest = split(bits, form)
    assert len(rest) == rest_size(count, form)
    np.testing.assert_array_equal(join(symbols, rest, form), bits)


def test_bfloat16_is_cut_as_in_dfloat11():
    bits = patterns(BF16)
    symbols, rest = split(bits, BF16)
    words = bits.view(np.int16).astype(np.int32)
    np.testing.assert_array_equal(symbols, words >> 7 & 0xFF)
    np.testing.assert_array_equal(rest, words >> 8 & 0x80 | words & 0x7F)


def test_e4m3_is_cut_as_in_ecf8_the_first_nibble_high():
    bits = patterns(E4M3).astype(int)
    symbols, rest = split(patterns(E4M3), E4M3)
    np.testing.assert_array_equal(symbols, bits >> 3 & 0xF)
    nibbles = bits >> 4 & 8 | bits & 7
    np.testing.assert_array_equal(rest, nibbles[0::2] << 4 | nibbles[1::2])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_symbol_tells_the_exponent(form):
    """``frexp`` of the finite numbers that are not subnormal, against the symbol's highest bits."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        numbers = from_bits(patterns(form), form, (2**form.bits,)).astype(np.float64)
    symbols, _ = split(patterns(form), form)
    field = symbols >> (form.mantissa_bits - form.low)
    normal = np.isfinite(numbers) & (field > 0)
    bias = 2 ** (form.bits - 2 - form.mantissa_bits) - 1
    np.testing.assert_array_equal(np.frexp(numbers[normal])[1] - 1, field[normal].astype(int) - bias)


def test_any_layout_in_memory():
    numbers = np.arange(12, dtype=np.float16).reshape(3, 4)
    np.testing.assert_array_equal(to_bits(numbers.T), numbers.T.copy().view(np.uint16).reshape(-1))
    assert to_bits(np.array(1.5, np.float16)).tolist() == [0x3E00]


def test_refusals():
    with pytest.raises(
        ValueError, match="dtype is float32; allowed are bfloat16, float16, float8_e4m3fn, float8_e5m2"
    ):
        float_format(np.float32)
    with pytest.raises(ValueError, match="dtype is int16; allowed"):
        to_bits(np.zeros(3, np.int16))
    with pytest.raises(ValueError, match="rest has 3 bytes; 5 numbers take 2"):
        join(np.zeros(5, np.uint8), np.zeros(3, np.uint8), E5M2)
    assert float_format(jnp.float16) is F16

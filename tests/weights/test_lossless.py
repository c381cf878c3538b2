"""The codecs' contract: the same bits under every coder, on the host and under jit; bytes counted; bounds kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hashml.accounting import stored_bytes
from hashml.weights.dfloat11 import DFLOAT11
from hashml.weights.ecf8 import ECF8
from hashml.weights.float_split import FORMATS, from_bits
from hashml.weights.lossless import (
    CODER_NAMES,
    Codec,
    CompressedArray,
    bits_per_weight,
    decode,
    decode_host,
    encode,
    encode_stack,
    entropy_limit,
    stack,
)

jitted = jax.jit(decode)
CODEC_OF = {dtype: codec for codec in (DFLOAT11, ECF8) for dtype in codec.dtypes}


def gaussian(shape, dtype, scale=1.0, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(FORMATS[dtype].dtype)


def every_pattern(dtype):
    """All patterns (65,536 of 16 bits), among numbers that make coding worth while."""
    form = FORMATS[dtype]
    bits = np.arange(2**form.bits, dtype=np.uint64).astype(form.word)
    return np.concatenate([from_bits(bits, form, bits.shape), gaussian(2**18 + 1, dtype)])


def codec_for(dtype, coder):
    """float16's symbols have three bits of mantissa, and a code of 3 bits would hold half an octave of them."""
    rate = 6 if dtype == "float16" else 3
    return dataclasses.replace(CODEC_OF[dtype], coder=coder, rate=rate)


def assert_same_bits(found, wanted):
    found = np.asarray(found)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("coder", ["huffman", "fixed_rate", "raw"])
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bit_pattern_comes_back(dtype, coder):
    array = every_pattern(dtype)
    compressed = encode(array, codec_for(dtype, coder))
    assert compressed.geometry.coder.removesuffix("_pairs") == coder
    assert_same_bits(decode_host(compressed), array)
    assert_same_bits(jitted(compressed), array)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bit_pattern_that_the_reference_layout_holds(dtype):
    """40 symbols at a time, as many as trained weights have: its 16 rows of prefixes do not hold all 240 at once."""
    form, codec = FORMATS[dtype], codec_for(dtype, "gaps")
    bits = np.arange(2**form.bits, dtype=np.uint64).astype(form.word)
    symbols = bits >> form.low & np.array(2**form.symbol_bits - 1, form.word)
    for first in range(0, min(240, 2**form.symbol_bits), 40):
        chosen = bits[(symbols >= first) & (symbols < min(first + 40, 240))]
        if form.bits == 8:
            chosen = np.concatenate([chosen.repeat(300), np.full(90_000, chosen[0])])
        array = from_bits(chosen, form, chosen.shape)
        compressed = encode(array, codec)
        assert compressed.geometry.coder == "gaps"
        assert_same_bits(decode_host(compressed), array)
        if first in (0, 40):
            assert_same_bits(jitted(compressed), array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_the_reference_layout_lacks_stays_raw(dtype):
    """An infinity among weights: its symbol is a pointer there."""
    array = gaussian(10_000, dtype)
    assert encode(array, codec_for(dtype, "gaps")).geometry.coder == "gaps"
    array[77] = np.inf
    compressed = encode(array, codec_for(dtype, "gaps"))
    assert compressed.geometry.coder == "raw"
    assert_same_bits(decode_host(compressed), array)


@pytest.mark.parametrize("coder", CODER_NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0, 2), (2, 3), (5, 7, 11)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_every_shape(dtype, shape, coder):
    array = gaussian((), dtype)[...] if shape == () else gaussian(shape, dtype)
    compressed = encode(array, codec_for(dtype, coder))
    assert_same_bits(decode_host(compressed), array)
    assert stored_bytes(compressed) <= array.nbytes
    assert compressed.shape == shape
    assert compressed.dtype == array.dtype


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*FORMATS]),
    st.sampled_from([*CODER_NAMES]),
    st.integers(1, 700),
    st.floats(1e-30, 1e30),
    st.integers(0, 2**32 - 1),
)
def test_any_numbers(dtype, coder, count, scale, seed):
    with np.errstate(over="ignore"):
        array = gaussian(count, dtype, scale, seed)
    assert_same_bits(decode_host(encode(array, codec_for(dtype, coder))), array)


@pytest.mark.parametrize("dtype", FORMATS)
def test_random_bits_stay_raw(dtype):
    form = FORMATS[dtype]
    bits = np.random.default_rng(0).integers(0, 2**form.bits, 2**16).astype(form.word)
    compressed = encode(from_bits(bits, form, (256, 256)), CODEC_OF[dtype])
    assert compressed.geometry.coder == "raw"
    assert stored_bytes(compressed) == bits.nbytes


@pytest.mark.parametrize("dtype", FORMATS)
def test_equal_numbers_cost_their_rests(dtype):
    """The scales of a norm, all 1: an exponent of no entropy takes no bits, but for the entrances."""
    array = np.ones(2**16, FORMATS[dtype].dtype)
    compressed = encode(array, CODEC_OF[dtype])
    assert entropy_limit(array) == FORMATS[dtype].rest_bits
    assert FORMATS[dtype].rest_bits <= bits_per_weight(compressed) < FORMATS[dtype].rest_bits + 0.05
    assert_same_bits(decode_host(compressed), array)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", 8 + 2.544), ("float8_e4m3fn", 4 + 2.544)])
def test_a_gaussian_is_within_a_hundredth_and_a_half_of_its_entropy(dtype, expected):
    """H = 2.544 of a Gaussian's exponents at any scale, computed by hand from the density; E4M3 as amax = 448."""
    array = gaussian(2**20, "bfloat16", 448 / 5.0 if dtype != "bfloat16" else 0.02).astype(FORMATS[dtype].dtype)
    limit = entropy_limit(array)
    assert abs(limit - expected) < 0.01
    assert limit <= bits_per_weight(encode(array, CODEC_OF[dtype])) < 1.015 * limit


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_no_coder_beats_the_limit_and_bytes_are_those_of_the_leaves(dtype):
    array = gaussian((300, 301), dtype)
    sizes = {}
    for coder in CODER_NAMES:
        compressed = encode(array, codec_for(dtype, coder))
        sizes[coder] = bits_per_weight(compressed)
        parts = compressed.parts.values()
        assert stored_bytes(compressed) == sum(part.nbytes for part in parts) == sizes[coder] * array.size / 8
        assert sizes[coder] >= entropy_limit(array)
    assert sizes["huffman"] < sizes["gaps"] < sizes["fixed_rate"] < sizes["raw"] == 8 * array.itemsize


def test_pairs_are_coded_where_they_take_less():
    """A table of pairs is longer; 0.4 bits of entropy come at a bit each, and in pairs at some 0.6."""
    few = gaussian(300, "float8_e4m3fn")
    skewed = np.where(np.random.default_rng(0).random(2**15 + 1) < 0.08, 2.0, 1.0).astype(few.dtype)
    for array, coder in ((few, "huffman"), (skewed, "huffman_pairs")):
        compressed = encode(array, ECF8)
        assert compressed.geometry.coder == coder
        assert_same_bits(decode_host(compressed), array)
    assert 4.6 < bits_per_weight(encode(skewed, ECF8)) < 4.75


def test_a_table_for_each_scale_beats_one_for_all():
    parts = [gaussian((128, 512), "bfloat16", scale) for scale in (1, 0.3, 0.1, 0.05)]
    apart = sum(stored_bytes(encode(part, DFLOAT11)) for part in parts)
    assert apart < 0.97 * stored_bytes(encode(np.stack(parts), DFLOAT11))


def test_the_tree_goes_through_jit_and_keeps_its_geometry():
    array = gaussian((64, 100), "bfloat16")
    compressed = encode(jnp.asarray(array), DFLOAT11)
    moved = jax.device_put(compressed)
    assert isinstance(moved, CompressedArray)
    assert moved.geometry == compressed.geometry
    product = jax.jit(lambda weights, x: x @ decode(weights))(moved, jnp.ones((2, 64), jnp.bfloat16))
    assert product.tobytes() == jax.jit(jnp.matmul)(jnp.ones((2, 64), jnp.bfloat16), array).tobytes()
    shapes = jax.eval_shape(decode, moved)
    assert (shapes.shape, shapes.dtype) == (array.shape, array.dtype)


@functools.cache
def layers(dtype):
    return np.stack([gaussian((30, 50), dtype, scale, seed) for seed, scale in enumerate((1e-3, 1.0, 300.0))])


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_stack_is_decoded_layer_by_layer(dtype):
    compressed = encode_stack(layers(dtype), CODEC_OF[dtype])
    assert compressed.geometry.coder == "huffman"
    assert_same_bits(jax.jit(lambda stacked: jax.lax.map(decode, stacked))(compressed), layers(dtype))
    assert stored_bytes(compressed) < layers(dtype).nbytes


def test_a_stack_that_gains_nothing_is_raw():
    ones = np.arange(1, 7, dtype=np.float16).reshape(2, 3)
    compressed = encode_stack(ones, DFLOAT11)
    assert compressed.geometry.coder == "raw"
    assert_same_bits(jax.lax.map(decode, compressed), ones)


def test_refusals():
    array = gaussian((8, 200), "bfloat16")
    with pytest.raises(ValueError, match="array is of dtype float32; codec 'dfloat11' is for bfloat16, float16"):
        encode(array.astype(np.float32), DFLOAT11)
    with pytest.raises(ValueError, match="array is of dtype bfloat16; codec 'ecf8' is for"):
        encode_stack(array, ECF8)
    with pytest.raises(ValueError, match="coder is 'zip'; allowed are huffman, gaps, fixed_rate, raw"):
        Codec("mine", ("bfloat16",), "zip")
    with pytest.raises(ValueError, match="dtype is float32; allowed are"):
        Codec("mine", ("float32",))
    with pytest.raises(ValueError, match="allowed is one, of raw, huffman, huffman_pairs"):
        stack([encode(array, DFLOAT11), encode(array[:4], DFLOAT11)])
    with pytest.raises(ValueError, match="allowed is one"):
        stack([encode(gaussian(9999, "bfloat16"), dataclasses.replace(DFLOAT11, coder="gaps"))])
    with pytest.raises(ValueError, match="max_length is 7; allowed are 8 to 14"):
        encode(array, dataclasses.replace(DFLOAT11, max_length=7))


@pytest.mark.parametrize("coder", CODER_NAMES)
def test_parts_that_contradict_each_other_are_refused(coder):
    compressed = encode(gaussian((40, 200), "bfloat16"), dataclasses.replace(DFLOAT11, coder=coder))
    last = [*compressed.parts][-1]
    shorter = dataclasses.replace(compressed, parts=compressed.parts | {last: compressed.parts[last][:-1]})
    for call in (decode_host, functools.partial(jax.eval_shape, decode)):
        with pytest.raises(ValueError, match="rest has 7999 bytes; 8000|has 7999 numbers"):
            call(shorter)
    other = dataclasses.replace(compressed, parts=compressed.parts | {last: compressed.parts[last].astype(np.int64)})
    with pytest.raises(ValueError, match="compressed has parts"):
        decode_host(other)

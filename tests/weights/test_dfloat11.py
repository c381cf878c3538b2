"""The reference's container: fields as its description says, by a reader that knows nothing else; sizes; refusals."""

import ml_dtypes
import numpy as np
import pytest

from hashml.coding.huffman import crude_code_lengths
from hashml.weights.dfloat11 import from_reference, reference_fields, size_formula
from hashml.weights.gap_layout import Gaps, decode_gaps_host, encode_gaps


def gaussian(shape, scale=1.0, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(ml_dtypes.bfloat16)


UNIT = {"q": gaussian((60, 100)), "k": gaussian((31, 100), 0.05, 1), "norm": np.ones(7, ml_dtypes.bfloat16)}


def slow(stream, luts, count):
    """Symbol after symbol, byte tables walked as the description says."""
    bits = "".join(f"{byte:08b}" for byte in stream) + "0" * 40
    starts, symbols, place = [], [], 0
    while len(symbols) < count:
        row, ahead = 0, place
        while (value := int(luts[row, int(bits[ahead : ahead + 8], 2)])) >= 240:
            row, ahead = 256 - value, ahead + 8
        starts.append(place)
        symbols.append(value)
        place += int(luts[-1, value])
    return np.array(symbols), np.array(starts), place


def five_bits(gaps, count, width):
    bits = "".join(f"{byte:08b}" for byte in gaps)
    return [int(bits[width * i : width * (i + 1)], 2) for i in range(count)]


def test_the_fields_are_as_described():
    fields = reference_fields(UNIT)
    flat = np.concatenate([array.reshape(-1) for array in UNIT.values()])
    words = flat.view(np.int16).astype(int)
    count = len(flat)
    assert {name: field.dtype.name for name, field in fields.items()} == {
        "luts": "uint8",
        "encoded_exponent": "uint8",
        "sign_mantissa": "uint8",
        "output_positions": "uint8",
        "gaps": "uint8",
        "split_positions": "int64",
    }
    assert fields["split_positions"].tolist() == [6000, 9100]
    np.testing.assert_array_equal(fields["sign_mantissa"], words >> 8 & 0x80 | words & 0x7F)
    symbols, starts, end = slow(fields["encoded_exponent"], fields["luts"], count)
    np.testing.assert_array_equal(symbols, words >> 7 & 0xFF)
    size = len(fields["encoded_exponent"])
    assert size == -(-end // 8)

    chunks, blocks = -(-size // 8), -(-size // 4096)
    gaps = five_bits(fields["gaps"], 512 * blocks, 5)
    assert len(fields["gaps"]) == 512 * blocks * 5 // 8
    for chunk in range(chunks - 1):
        assert gaps[chunk] == starts[starts >= 64 * chunk][0] - 64 * chunk < 32
    assert set(gaps[chunks:]) <= {0}
    positions = fields["output_positions"].view("<u4")
    assert len(positions) == blocks + 1
    assert positions.tolist() == [*((starts < 32768 * block).sum() for block in range(blocks)), count]


def test_a_fixture_written_by_hand():
    """Exponents 127, 126, 127, 125, 126 under the codes 0, 10 and 110; the end symbol has 111."""
    luts = np.zeros((2, 256), np.uint8)
    luts[0, :128], luts[0, 128:192], luts[0, 192:] = 127, 126, 125
    luts[1, [127, 126, 125]] = [1, 2, 3]
    fields = {
        "luts": luts,
        "encoded_exponent": np.array([0b01001101, 0b01110000], np.uint8),
        "sign_mantissa": np.array([0x00, 0x80, 0x40, 0x01, 0xFF], np.uint8),
        "gaps": np.zeros(320, np.uint8),
        "output_positions": np.array([0, 5], "<u4").view(np.uint8),
        "split_positions": np.array([2], np.int64),
    }
    first, second = from_reference(fields)
    assert first.astype(float).tolist() == [1.0, -0.5]
    # 1.5 * 2^0, (1 + 1/128) * 2^-2, -(1 + 127/128) * 2^-1
    assert second.astype(float).tolist() == [1.5, 0.25 * (1 + 1 / 128), -0.5 * (1 + 127 / 128)]


def test_units_come_back_bit_for_bit():
    for found, array in zip(from_reference(reference_fields(UNIT)), UNIT.values(), strict=True):
        assert found.tobytes() == array.tobytes()


def test_bytes_follow_the_formula():
    array = gaussian(2**18)
    fields = reference_fields({"w": array})
    symbols = array.view(np.uint16) >> 7 & 0xFF
    counts = np.append(np.bincount(symbols, minlength=256), 1)
    mean_length = float((counts * np.maximum(crude_code_lengths(counts, 32), 0))[:256].sum() / array.size)
    found = 8 * sum(field.nbytes for field in fields.values()) / array.size
    # Gaps and positions are rounded up to a block of 4096 bytes: 320 and 8 bytes at most.
    assert 0 <= found - size_formula(mean_length, array.size, len(fields["luts"])) < 8 * 328 / array.size
    assert 10.75 < found - 8 * fields["luts"].nbytes / array.size < 10.85  # 10.79 by the density of a Gaussian


@pytest.mark.parametrize("max_length", [32, 16])
def test_codes_of_every_length_up_to_the_limit(max_length):
    """Counts of Fibonacci's numbers make Huffman's code as deep as it can be."""
    counts = [1, 1]
    while len(counts) < 24:
        counts.append(counts[-1] + counts[-2])
    symbols = np.random.default_rng(0).permutation(np.repeat(np.arange(24), counts)).astype(np.uint8)[:30_000]
    symbols = np.concatenate([symbols, np.arange(24, dtype=np.uint8)])
    coded = encode_gaps(symbols, max_length)
    assert 10 < coded.luts[-1].max() <= max_length
    np.testing.assert_array_equal(slow(coded.stream, coded.luts, len(symbols))[0], symbols)
    np.testing.assert_array_equal(decode_gaps_host(coded, len(symbols), max_length), symbols)


def test_refusals():
    with pytest.raises(
        ValueError, match=r"weights\['w'\] is of dtype float16; the reference's layout is for bfloat16"
    ):
        reference_fields({"w": np.ones(3, np.float16)})
    with pytest.raises(ValueError, match="weights is empty"):
        reference_fields({})
    with pytest.raises(ValueError, match="symbols has 255; the gap layout holds at least one, and all below 240"):
        reference_fields({"w": np.array([1, np.inf], ml_dtypes.bfloat16)})
    with pytest.raises(ValueError, match="symbols has no symbol"):
        reference_fields({"w": np.zeros(0, ml_dtypes.bfloat16)})
    with pytest.raises(ValueError, match="max_length is 24; allowed are 32"):
        encode_gaps(np.zeros(3, np.uint8), 24)
    fields = reference_fields(UNIT)
    with pytest.raises(ValueError, match="fields lacks gaps, luts; a unit has encoded_exponent"):
        from_reference({name: field for name, field in fields.items() if name not in ("gaps", "luts")})
    with pytest.raises(ValueError, match="bytes of gaps and"):
        from_reference(fields | {"gaps": fields["gaps"][:-1]})
    with pytest.raises(ValueError, match="output_positions that disagree with the stream of 9107 symbols"):
        from_reference(fields | {"output_positions": fields["output_positions"][::-1].copy()})
    coded = encode_gaps(np.arange(9, dtype=np.uint8), 16)
    with pytest.raises(ValueError, match="a symbol of no bits"):
        decode_gaps_host(Gaps(*coded[:3], np.zeros_like(coded.luts)), 9, 16)

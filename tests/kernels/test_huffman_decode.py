"""Every backend gives the symbols that were coded and the floats that were split, bit for bit; bad input by name."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml.coding.huffman import decode_table, unpack_lengths
from hashml.coding.huffman_chunks import Chunks, encode_chunks
from hashml.weights.float_split import FORMATS, from_bits, split, to_bits
from hashml_kernels.huffman_decode import FloatParts, huffman_decode, pallas_mosaic_tpu, pallas_triton, shapes
from hashml_kernels.huffman_decode.operands import Geometry, Operands

BACKENDS = ("reference", "xla", "pallas_triton", "pallas_mosaic_tpu")
PARTS = {name: FloatParts(form.bits, form.low) for name, form in FORMATS.items()}


class Coded(NamedTuple):
    """Arrays of the op, the rest among them if there is one, what is static, and the truth."""

    arrays: tuple[np.ndarray, ...]
    form: FloatParts | None
    total: int
    lanes_a_base: int
    expected: np.ndarray


def coded(symbols: np.ndarray, chunk: int, max_length: int = 12, **floats: Any) -> Coded:
    chunks = encode_chunks(symbols, chunk=chunk, max_length=max_length)
    table = decode_table(unpack_lengths(np.asarray(chunks.lengths)), max_length)
    steps = -(-len(symbols) // (4 * len(chunks.starts)))
    arrays = (np.asarray(chunks.words), np.asarray(chunks.bases), np.asarray(chunks.starts), table)
    right = {"rest": None, "form": None, "expected": symbols} | floats
    rest = [] if right["rest"] is None else [right["rest"]]
    return Coded(
        (*arrays, *rest), right["form"], len(right["expected"]), max(1, 4096 // (4 * steps)), right["expected"]
    )


@functools.cache
def numbers(dtype: str, pairs: bool) -> Coded:
    """Every bit pattern, NaNs and all, among numbers that make coding worth while; no number of them is even."""
    form = FORMATS[dtype]
    bits = np.arange(2**form.bits, dtype=np.uint64).astype(form.word)
    gaussian = np.random.default_rng(0).standard_normal(12_345 + 2**16 - len(bits))
    bits = np.concatenate([bits, to_bits(gaussian.astype(form.dtype))])
    symbols, rest = (np.asarray(part) for part in split(bits, form))
    if pairs:
        symbols = np.pad(symbols, (0, len(symbols) % 2))
        symbols = symbols[0::2] << 4 | symbols[1::2]
    assert from_bits(bits, form, bits.shape).dtype == form.dtype
    return coded(symbols, 120, rest=rest, form=PARTS[dtype]._replace(pairs=pairs), expected=bits)


def one_lane_of_long_words() -> np.ndarray:
    """Symbols of 1, 2, 3... bits, and some lanes that hold nothing but words of 12 or nothing but words of 1."""
    drawn = np.floor(-np.log2(1 - np.random.default_rng(1).random((105, 300, 4)))).astype(np.uint8)
    drawn[:, 7] = 11 + np.random.default_rng(2).integers(0, 3, (105, 4))
    drawn[:, 170:180] = 0
    return drawn.reshape(-1)


def bytes_of_all_values() -> np.ndarray:
    """Words of 14 bits, which lie in many rows of the table."""
    return np.concatenate([np.arange(256), np.zeros(30_000, int), np.arange(64).repeat(40)]).astype(np.uint8)


SYMBOLS = {
    "drift": lambda: coded(one_lane_of_long_words(), 420),
    "long_words": lambda: coded(bytes_of_all_values(), 23, 14),
    "eight_bits": lambda: coded(np.random.default_rng(3).integers(0, 256, 20_001, np.uint8), 48, 8),
    "one_symbol": lambda: coded(np.full(4099, 200, np.uint8), 16),
    "one": lambda: coded(np.full(1, 3, np.uint8), 1),
}


@functools.cache
def symbols_of(name: str) -> Coded:
    return SYMBOLS[name]()


def operands_of(arrays: Any) -> Operands:
    words, bases, starts, table, *rest = arrays
    return Operands(words, bases, starts, table, *rest or [None])


def run(case: Coded, implementation: Any) -> np.ndarray:
    return np.asarray(program(implementation, case.form, case.total, case.lanes_a_base)(*case.arrays))


@functools.cache
def program(implementation: Any, form: FloatParts | None, count: int, lanes_a_base: int):
    """The op, compiled once for arrays of the same sizes."""
    # Interpreted kernels are long programs that run once: LLVM's passes would take most of the time.
    options = {"xla_backend_optimization_level": 0} if implementation.startswith("pallas") else None

    def op(words, bases, starts, table, rest=None):
        return huffman_decode(
            words, bases, starts, table, rest=rest, form=form, count=count, lanes_a_base=lanes_a_base,
            implementation=implementation,
        )  # fmt: skip

    return jax.jit(op, compiler_options=options)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch):
    """Few units of a turn and few lanes of a step: an interpreted kernel is slow, and slow to compile."""
    monkeypatch.setattr(pallas_triton, "_UNITS", 1)
    smaller = {"_MOST_REGISTERS": 1, "_SUBLANES": 2, "_REGISTER": 256, "_CANDIDATES": 1, "_UNROLL": 1, "_PIECE": 16}
    for name, value in smaller.items():
        monkeypatch.setattr(pallas_mosaic_tpu, name, value)


# --- backends -------------------------------------------------------------------------------------


FLOATS = [("bfloat16", False), ("float8_e4m3fn", False), ("float8_e4m3fn", True), ("float8_e5m2", False)]
CASES = [
    (backend, *floats) for backend in BACKENDS for floats in FLOATS if (backend, floats) != (BACKENDS[3], FLOATS[1])
]
CASES += [("xla", "float16", False)]  # to the kernels, the same as bfloat16


@pytest.mark.parametrize(("backend", "dtype", "pairs"), CASES)
def test_every_bit_pattern_of_a_float(backend, dtype, pairs):
    case = numbers(dtype, pairs)
    found = run(case, backend)
    assert found.dtype == case.expected.dtype
    np.testing.assert_array_equal(found, case.expected)


TPU = ("drift",)  # and long words below


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in BACKENDS for name in (TPU if backend == BACKENDS[3] else SYMBOLS)],
)
def test_symbols_of_any_code(backend, name):
    case = symbols_of(name)
    np.testing.assert_array_equal(run(case, backend), case.expected)


@pytest.mark.parametrize("backend", ["xla", "pallas_triton", "pallas_mosaic_tpu"])
def test_damage_gives_numbers_all_the_same(backend):
    case = symbols_of("drift")
    rng = np.random.default_rng(9)
    broken = tuple(rng.integers(0, np.iinfo(x.dtype).max, x.shape, x.dtype, endpoint=True) for x in case.arrays[:3])
    assert run(case._replace(arrays=(*broken, case.arrays[3])), backend).shape == (case.total,)


def test_cases_reach_what_they_are_for():
    """Two pages and a drift of lanes; several rows of long words; a first table that says all; an empty stream."""

    def plan(case: Coded) -> pallas_mosaic_tpu._Plan:
        geometry = Geometry(case.total, len(case.arrays[2]), case.lanes_a_base, case.form)
        return pallas_mosaic_tpu._Plan.of(operands_of(case.arrays), geometry)

    drift, long_words = symbols_of("drift"), symbols_of("long_words")
    assert plan(drift).pages == 2
    _, bases, starts, _ = drift.arrays
    lane = np.arange(len(starts))
    words = np.diff(bases[lane // drift.lanes_a_base].astype(int) + starts / 32)
    assert words.max() > 128 > 16 > words.min()
    lengths = long_words.arrays[3] >> 8
    assert lengths.max() > 12
    assert (lengths.reshape(-1, 128) > 7).any(axis=1).sum() > 3
    assert len(long_words.arrays[2]) > 1024
    assert symbols_of("one_symbol").arrays[0].tolist() == [0]
    assert {len(symbols_of(name).arrays[3]) for name in SYMBOLS} == {2**8, 2**12, 2**14}


def test_kernels_as_they_are_on_the_device(monkeypatch):
    """Several units and lanes of a turn, several registers of a step."""
    monkeypatch.undo()
    monkeypatch.setattr(pallas_mosaic_tpu, "_MOST_REGISTERS", 2)
    case = symbols_of("long_words")
    assert len(case.arrays[2]) > 1024
    program.cache_clear()
    for backend in ("pallas_triton", "pallas_mosaic_tpu"):
        np.testing.assert_array_equal(run(case, backend), case.expected)
    program.cache_clear()


def test_tpu_kernel_under_the_simulator(monkeypatch):
    """JAX's simulation of the TPU's memories: reads out of bounds and races; of a sound stream and a broken one.

    Each access calls the host, so registers are of one line here.
    """
    for name, value in {"_SUBLANES": 1, "_REGISTER": 128, "_LEAST_LANES": 1, "_PIECE": 8}.items():
        monkeypatch.setattr(pallas_mosaic_tpu, name, value)
    symbols = np.random.default_rng(0).integers(0, 4, 400).astype(np.uint8)
    case = coded(symbols, 4, 8)
    geometry = Geometry(case.total, len(case.arrays[2]), case.lanes_a_base, None)
    simulate = pltpu.InterpretParams(uninitialized_memory="zero", detect_races=True)

    @jax.jit
    def decode(*arrays):
        return pallas_mosaic_tpu.decode(operands_of(arrays), geometry, interpret=simulate)

    np.testing.assert_array_equal(decode(*case.arrays), symbols)
    words, bases, starts, table = case.arrays
    broken = words, np.full_like(bases, 2**32 - 1), np.full_like(starts, 2**16 - 1), np.full_like(table, 2**16 - 1)
    assert decode(*broken).shape == symbols.shape


def test_the_op_goes_through_a_scan_over_stacked_streams():
    """As a forward pass over compressed layers does it."""
    rows = np.random.default_rng(4).integers(0, 9, (3, 1500)).astype(np.uint8)
    parts = [coded(row, 60, 9) for row in rows]
    longest = max(len(part.arrays[0]) for part in parts)
    words = np.stack([np.pad(part.arrays[0], (0, longest - len(part.arrays[0]))) for part in parts])
    others = [np.stack([part.arrays[i] for part in parts]) for i in (1, 2, 3)]

    def one(arrays):
        return huffman_decode(*arrays, count=1500, lanes_a_base=parts[0].lanes_a_base)

    np.testing.assert_array_equal(jax.lax.map(one, tuple(map(jnp.asarray, (words, *others)))), rows)


# --- bad input ------------------------------------------------------------------------------------


def unchecked(**given: Any) -> Any:
    right: dict[str, Any] = {
        "words": np.zeros(9, np.uint32),
        "bases": np.zeros(2, np.uint32),
        "starts": np.zeros(12, np.uint16),
        "table": np.zeros(2**12, np.uint16),
        "count": 100,
        "lanes_a_base": 8,
    }
    return getattr(huffman_decode, "__wrapped__", huffman_decode)(**right | given)


REST, TABLES = np.zeros(100, np.uint8), np.zeros((2, 2048), np.uint16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"words": np.zeros(9, np.int32)}, TypeError, "words has dtype int32; it must be uint32"),
        ({"starts": np.zeros(12, np.uint32)}, TypeError, "starts has dtype uint32; it must be uint16"),
        (
            {"table": np.zeros((2, 2048), np.uint16)},
            ValueError,
            r"table has shape \(2, 2048\); it must have one axis",
        ),
        ({"words": np.zeros(0, np.uint32)}, ValueError, "words has 0 entries and starts 12; both have at least one"),
        ({"bases": np.zeros(3, np.uint32)}, ValueError, "bases has 3 entries, one for 8 lanes; starts has 12 lanes"),
        ({"lanes_a_base": 0}, ValueError, "bases has 2 entries, one for 0 lanes"),
        ({"table": np.zeros(100, np.uint16)}, ValueError, r"table has 100 entries; it must have 2\^8 to 2\^14"),
        ({"table": np.zeros(2**15, np.uint16)}, ValueError, "table has 32768 entries"),
        ({"count": -1}, ValueError, "count is -1; it must not be negative"),
        ({"rest": REST}, ValueError, "one of rest and form is None"),
        ({"rest": REST, "form": FloatParts(16, 8)}, ValueError, r"form is FloatParts\(bits=16, low=8.*allowed are"),
        ({"rest": REST, "form": FloatParts(8, 1, True)}, ValueError, "pairs where a symbol and a rest have 4 bits"),
        ({"rest": REST[1:], "form": FloatParts(16, 7)}, ValueError, "rest has 99 bytes; 100 numbers of .* have 100"),
        ({"implementation": "triton"}, ValueError, "implementation is 'triton'; it must be one of"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        unchecked(**changes)


def test_nothing_is_decoded_to_nothing():
    form = FloatParts(16, 7)
    assert unchecked(count=0).dtype == jnp.uint8
    assert unchecked(count=0, rest=REST[:0], form=form).dtype == jnp.uint16


# --- sizes ----------------------------------------------------------------------------------------

PROBLEMS = {problem.case: problem for problem in shapes.problems()}


def test_every_case_has_a_name_of_its_own_and_no_backward_pass():
    assert list(PROBLEMS) == [case.name for case in shapes.CASES]
    assert {problem.direction for problem in PROBLEMS.values()} == {"forward"}


@pytest.mark.parametrize("case", shapes.CASES, ids=lambda case: case.name)
def test_kernels_serve_all_but_few_lanes(case):
    refused = [PROBLEMS[case.name].refusal(kernel) is not None for kernel in ("pallas_triton", "pallas_mosaic_tpu")]
    assert refused == [False, case.geometry.lanes < 256]


@pytest.mark.parametrize(
    ("name", "read", "written"),
    [
        ("llama7b_attention", 10.5 + 0.07, 16),
        ("llama7b_mlp", 10.5 + 0.07, 16),
        ("llama7b_mlp_symbols", 2.5 + 0.07, 8),
        ("llama7b_mlp_f16", 8 + 5.47 + 0.07, 16),
        ("llama7b_mlp_e4m3_pairs", 4 + (5.47 + 0.07) / 2, 8),
        ("llama7b_mlp_e5m2", 2 + 3.47 + 0.07, 8),
    ],
)
def test_bits_of_a_number(name, read, written):
    """The rest, the mean word, an entrance of 16 bits a lane and one of 32 bits a segment; and the result."""
    case = next(case for case in shapes.CASES if case.name == name)
    assert 8 * case.bytes() / case.total == pytest.approx(read + written, rel=0.005)


@pytest.mark.parametrize("name", ["ragged", "ragged_e4m3", "few_lanes"])
def test_problems_run_as_drawn(name):
    problem = PROBLEMS[name]
    arrays = problem.draw(np.random.default_rng(0))
    assert [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in problem.arguments]
    one, other = (jax.jit(functools.partial(problem.call, name))(*arrays) for name in ("auto", "reference"))
    np.testing.assert_array_equal(one, other)
    assert len(np.unique(one)) > 100


def test_chunks_of_the_library_are_the_ops_arguments():
    """The layout has two descriptions, one there and one here."""
    from hashml.coding.huffman_chunks import decode_chunks

    symbols = np.random.default_rng(5).integers(0, 30, 9000).astype(np.uint8)
    chunks = encode_chunks(symbols, chunk=100)
    found = jax.jit(lambda chunks: decode_chunks(chunks, 9000, 12))(Chunks(*map(jnp.asarray, chunks)))
    np.testing.assert_array_equal(found, symbols)

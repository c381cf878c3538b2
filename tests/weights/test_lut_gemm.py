"""The lookup-table GEMM: every form equals a naive loop over the table, whatever the levels; packing; step sizes."""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hashml.coding import pack, packed_size
from hashml.weights import lut_gemm, lut_gemm_native
from hashml.weights.lut_gemm import (
    LsqDense,
    accumulator_bound,
    lsq_codes,
    lsq_dense,
    lsq_levels,
    lsq_quantize,
    lsq_scale,
    lut_dense,
    lut_product,
    pack_dense,
    pack_weights,
    packed_product,
    product_table,
    unpack_weights,
)
from hashml_kernels import native, native_xla

native_only = pytest.mark.skipif(not lut_gemm_native.available(), reason="there is no C++ compiler")
FORMS = ("int8", "byte_tables", "bit_planes", pytest.param("native", marks=native_only))
BOOKS = {
    "card": ([0, 1, 2, 3], [-1, 0, 1, 2]),
    "no zero": ([5, -3, 7, 2], [1, 9, -4, 100]),
    "wide": ([0, 255, -7, 1], [-40_000, 3, 17, 250]),
    "3 bits": ([-4, -3, -2, -1, 0, 1, 2, 3], [0, 1, -2, 4, -8, 16, -32, 64]),
    "4 bits": (range(16), [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]),
    "4 bits, uneven": ([n * n for n in range(16)], [(-1) ** n * n**3 for n in range(16)]),
    "2 by 4 bits": ([n - 7 for n in range(16)], [-128, -1, 3, 127]),
    "4 by 2 bits": ([-128, -1, 3, 127], [3 * n - 20 for n in range(16)]),
}
product = jax.jit(packed_product, static_argnames="implementation")


def known(a, w, a_levels, w_levels, form: Any = "auto"):
    """The product as a program to which levels are known."""
    return jax.jit(lambda a, w: lut_product(a, w, a_levels, w_levels, implementation=form))(a, w)


def codes(seed: int, levels: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, shape).astype(np.uint8)


def naive(a: np.ndarray, w: np.ndarray, a_levels, w_levels) -> np.ndarray:
    """Product by product out of the table, in Python's own integers or in double precision."""
    table = product_table(np.asarray(a_levels), np.asarray(w_levels)).tolist()
    bits = len(a_levels).bit_length() - 1
    found = np.zeros((len(a), len(w)), np.int64 if isinstance(table[0], int) else np.float64)
    for m, n, k in np.ndindex(*found.shape, a.shape[1]):
        found[m, n] += table[int(w[n, k]) << bits | int(a[m, k])]
    return found


# --- exactness ------------------------------------------------------------------------------------------


def test_the_table_holds_all_products_where_the_card_says():
    table = product_table(np.array([0, 1, 2, 3]), np.array([-1, 0, 1, 2]))
    assert table.dtype == np.int64
    for w, a in np.ndindex(4, 4):
        assert table[w << 2 | a] == [-1, 0, 1, 2][w] * a
    table = product_table(np.arange(16), np.array([0.5, -1.5, 0, 3]))
    assert table[1 << 4 | 7] == -10.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("book", BOOKS)
def test_integers_are_those_of_a_naive_loop(form, book):
    """29 columns fill no byte at 2, 3 or 4 bits; 67 rows fill no block."""
    a_levels, w_levels = (np.array(list(levels)) for levels in BOOKS[book])
    a, w = codes(1, len(a_levels), 5, 29), codes(2, len(w_levels), 67, 29)
    found = known(a, w, a_levels, w_levels, form)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, naive(a, w, a_levels, w_levels))


@native_only
@pytest.mark.parametrize("book", ["card", "wide", "3 bits", "4 bits, uneven", "2 by 4 bits", "4 by 2 bits"])
def test_native_sums_are_exact_by_all_instructions(book):
    """Long rows, on which sums of bytes and of 16 bits overflow many times over; the largest products throughout.

    The first product is large enough for tables of 64 entries, the second is not.
    """
    a_levels, w_levels = (np.array(list(levels), np.int32) for levels in BOOKS[book])
    for count, rows, columns in ((26, 257, 1021), (1, 64, 4100)):
        a, w = codes(3, len(a_levels), count, columns), codes(4, len(w_levels), rows, columns)
        a[0], w[0] = np.abs(a_levels).argmax(), np.abs(w_levels).argmax()
        # In 64 bits, then modulo 2^32.
        expected = (a_levels.astype(np.int64)[a] @ w_levels.astype(np.int64)[w].T).astype(np.int32)
        blocks = pack_weights(w, w_levels).blocks
        both = len(a_levels) == len(w_levels) == 4
        packed, packed_rows = (pack(jnp.asarray(a), 2), lut_gemm_native.pack_rows(w)) if both else (None, None)
        for level in lut_gemm_native.LEVELS[1:]:
            found = lut_gemm_native.block_product(a, blocks, a_levels, w_levels, rows=rows, level=level)
            np.testing.assert_array_equal(found, expected, level)
            if packed is not None and packed_rows is not None:
                found = lut_gemm_native.row_product(
                    packed, packed_rows, a_levels, w_levels, columns=columns, level=level
                )
                np.testing.assert_array_equal(found, expected, level)


@pytest.mark.parametrize("form", ["float32", "byte_tables", "bit_planes", "auto"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float_levels_give_the_float_product_to_rounding(form, bits):
    rng = np.random.default_rng(bits)
    a_levels, w_levels = rng.standard_normal((2, 2**bits)).astype(np.float32)
    a, w = codes(5, 2**bits, 3, 29), codes(6, 2**bits, 67, 29)
    found = known(a, w, a_levels, w_levels, form)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, naive(a, w, a_levels, w_levels), rtol=1e-5, atol=2e-5)


def test_an_order_of_columns_changes_nothing():
    a_levels, w_levels = (np.array(levels) for levels in BOOKS["no zero"])
    a, w = codes(7, 4, 2, 29), codes(8, 4, 67, 29)
    order = np.random.default_rng(9).permutation(29)
    np.testing.assert_array_equal(
        known(a, w, a_levels, w_levels), known(a[:, order], w[:, order], a_levels, w_levels)
    )


def test_floats_serve_integers_as_far_as_they_are_exact():
    a, w = codes(10, 4, 3, 50), codes(11, 4, 5, 50)
    a_levels, w_levels = np.array([0, 1, 2, 3]), np.array([-1, 0, 1, 2])
    found = known(a, w, a_levels, w_levels, "float32")
    np.testing.assert_array_equal(found, naive(a, w, a_levels, w_levels))
    assert found.dtype == jnp.int32
    with pytest.raises(
        ValueError, match="implementation is 'float32'; sums may reach 16777250, .* exact to 16777216"
    ):
        lut_product(a, w, np.array([0, 1, 2, 335545]), np.array([-1, 0, 1, 1]), implementation="float32")


def test_traced_levels_are_served_too():
    """Their sums are not known to fit float32, so integers multiply. A code beyond is read as the last."""
    a, w = codes(12, 4, 3, 29), codes(13, 4, 67, 29)
    a_levels, w_levels = (np.array(levels, np.int32) for levels in BOOKS["wide"])
    packed = pack_weights(w, w_levels)
    assert packed.levels.dtype == np.int32
    for form in ("auto", "int8", "bit_planes"):
        found = product(jnp.asarray(a), packed, jnp.asarray(a_levels), implementation=form)
        np.testing.assert_array_equal(found, naive(a, w, a_levels, w_levels))
    beyond = jnp.asarray(np.where(a == 3, 77, a).astype(np.uint8))
    for form in ("auto", "int8"):
        found = product(beyond, packed, jnp.asarray(a_levels), implementation=form)
        np.testing.assert_array_equal(found, naive(a, w, a_levels, w_levels))


# --- storage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_take_their_bits_and_come_back(bits):
    for columns in (1, 29, 64):
        w = codes(14, 2**bits, 70, columns)
        packed = pack_weights(w, np.arange(2**bits))
        assert packed.bits == bits
        assert packed.blocks.nbytes == 128 * packed_size(columns, bits)
        assert packed.levels.dtype == np.int8
        np.testing.assert_array_equal(unpack_weights(packed), w)
    assert pack_weights(codes(15, 4, 64, 64), np.arange(4)).blocks.nbytes == 64 * 64 // 4


def test_rows_of_the_papers_kernel_swap_neighbours():
    (row,) = np.asarray(lut_gemm_native.pack_rows(np.array([[1, 2, 3, 0, 2]])))
    assert row.tolist() == [2 | 1 << 2 | 0 << 4 | 3 << 6, 0 | 2 << 2]


# --- step sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True)])
def test_steps_round_to_the_nearest_level(bits, signed):
    levels = lsq_levels(bits, signed=signed)
    assert levels.tolist() == list(range(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed)))
    x = np.linspace(-3, 7, 400).astype(np.float32)
    scale = 0.37
    found = np.asarray(lsq_codes(x, scale, bits, signed=signed))
    expected = [int(np.abs(number / scale - levels).argmin()) for number in x.astype(np.float64)]
    assert found.tolist() == expected
    np.testing.assert_allclose(lsq_quantize(x, scale, bits, signed=signed), scale * levels[found], rtol=1e-6)


def test_gradients_pass_over_the_rounding():
    """As the paper writes them: by cases, in NumPy."""
    x = np.array([-5.0, -0.9, -0.3, 0.2, 0.7, 9.0], np.float32)
    scale, bits = np.float32(0.5), 2
    upstream = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], np.float32)

    def loss(x, scale):
        return (lsq_quantize(x, scale, bits, signed=True) * upstream).sum()

    of_x, of_scale = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), jnp.asarray(scale))
    v = x / scale
    inside = (v > -2) & (v < 1)
    np.testing.assert_allclose(of_x, upstream * inside)
    by_cases = np.where(v <= -2, -2, np.where(v >= 1, 1, np.round(v) - v))
    np.testing.assert_allclose(of_scale, (by_cases * upstream).sum() / math.sqrt(6 * 1), rtol=1e-5)
    assert lsq_scale(x, 3, signed=True) == pytest.approx(2 * np.abs(x).mean() / math.sqrt(3))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_trained_layer_is_the_same_by_look_ups(bits):
    rng = np.random.default_rng(16)
    x = jnp.asarray(np.abs(rng.standard_normal((2, 3, 29))), jnp.float32)
    layer = LsqDense(70, bits, input_scale=0.4)
    params: Any = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    params["bias"] = jnp.asarray(rng.standard_normal(70), jnp.float32)
    assert params["kernel_scale"].shape == (70,)
    expected = jax.jit(layer.apply)({"params": params}, x)
    packed = pack_dense(params["kernel"], params["kernel_scale"], bits=bits)
    rest = (params["bias"], params["kernel_scale"], params["input_scale"])
    np.testing.assert_allclose(lut_dense(x, packed, *rest, bits=bits), expected, rtol=1e-5, atol=1e-5)
    kernel = np.asarray(lsq_quantize(params["kernel"], params["kernel_scale"], bits, signed=True))
    assert len(np.unique(kernel[:, 0])) <= 2**bits
    # Two programs round 29 products of at most about 1, and their sums, in orders of their own.
    found = lsq_dense(x, params["kernel"], *rest, bits=bits)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=29 * 2.0**-24)


# --- bad input, and machines without a compiler -----------------------------------------------------------


def test_what_does_not_fit_is_refused():
    a, w, book = codes(17, 4, 2, 8), codes(18, 4, 3, 8), np.arange(4)
    with pytest.raises(ValueError, match="there are 5 levels of weights; codes of 2, 3 or 4 bits have 4, 8 or 16"):
        lut_product(a, w, book, np.arange(5))
    with pytest.raises(ValueError, match="there are 2 levels of activations"):
        lut_product(a, w, book[:2], book)
    with pytest.raises(ValueError, match="codes has no column"):
        pack_weights(w[:, :0], book)
    with pytest.raises(ValueError, match="activations has 7 columns; the weights have 8"):
        packed_product(a[:, :7], pack_weights(w, book), book)
    for form in ("native", "int8"):
        with pytest.raises(ValueError, match=f"implementation is '{form}', which needs integer levels"):
            lut_product(a, w, book, book / 2, implementation=form)
    large = np.array([0, 1, 2, 2**15])
    assert accumulator_bound(large, 2 * large, 8) == 2**34
    with pytest.raises(ValueError, match="8 products may add up to 17179869184; int32 ends at 2147483647"):
        lut_product(a, w, large, 2 * large)
    with pytest.raises(ValueError, match="levels reach from 0 to 4294967296; they must be int32"):
        lut_product(a, w, book, 2**17 * large)
    with pytest.raises(ValueError, match="bits is 5; allowed are 2, 3, 4"):
        lsq_quantize(np.ones(3, np.float32), 1.0, 5, signed=True)


@native_only
def test_the_native_kernels_refuse_what_would_leave_their_arrays():
    a, levels = codes(19, 4, 2, 8), np.arange(4, dtype=np.int32)
    packed = pack_weights(codes(20, 4, 70, 8), levels)
    call = functools.partial(lut_gemm_native.block_product, a, packed.blocks)
    with pytest.raises(ValueError, match=r"blocks has shape \(2, 2, 64\); 129 rows of 8 codes are \(3, 2, 64\)"):
        call(levels, levels, rows=129)
    with pytest.raises(ValueError, match="there are 17 activation_levels and 4 weight_levels; allowed are 1 to 16"):
        call(np.arange(17, dtype=np.int32), levels, rows=70)
    with pytest.raises(ValueError, match="rows have 2 and 1 bytes; 8 codes of 2 bits take 2"):
        lut_gemm_native.row_product(pack(jnp.asarray(a), 2), packed.blocks[0, :, :1], levels, levels, columns=8)
    assert lut_gemm_native.best_level() in lut_gemm_native.LEVELS[1:]


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    """As on a machine where nothing compiles."""
    monkeypatch.setattr(native, "compilers", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_xla.load.cache_clear()
    yield
    native_xla.load.cache_clear()


def test_without_a_compiler_xla_serves_and_says_so_once(no_library, caplog):
    del no_library
    a_levels, w_levels = (np.array(levels) for levels in BOOKS["card"])
    a, w = codes(21, 4, 2, 29), codes(22, 4, 67, 29)
    with caplog.at_level(logging.WARNING):
        found = [known(a, w, a_levels, w_levels) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "The lookup-table GEMM runs without its native kernel, by XLA's products: no C++ compiler was found (c++, "
        "g++, clang++, or one named by $CXX)"
    ]
    np.testing.assert_array_equal(found[0], naive(a, w, a_levels, w_levels))
    with pytest.raises(native.NativeUnavailable, match="there is no native library: no C"):
        lut_product(a, w, a_levels, w_levels, implementation="native")
    assert lut_gemm.BLOCK == 64

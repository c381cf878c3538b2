"""NoMAD-Attention: codebooks, codes in blocks, tables of bytes, and native look-ups that equal XLA's bit for bit."""

import functools
import logging
import math
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hashml.attention import nomad, nomad_native
from hashml.attention.nomad import Nomad
from hashml.attention.nomad_keys import NomadKeys
from hashml.attention.selector_contract import index_bits
from hashml.kvcache import Dense, KeepAll, LayerSpec, LayerTables
from hashml.kvcache.attending import attend
from hashml.kvcache.eviction import append
from hashml.kvcache.state import init_layer
from hashml.models.rotary import Rotary
from hashml_kernels import native, native_xla

B, K, J, N, D, C = 2, 2, 2, 45, 12, 2
H, S = K * J, D // C
KEY = jax.random.key(5)

native_only = pytest.mark.skipif(not nomad_native.available(), reason="there is no C++ compiler")
sums = jax.jit(nomad.lookup_sums, static_argnames="implementation")
attention = jax.jit(nomad.nomad_attention, static_argnames=("implementation", "scale"))
encode = jax.jit(nomad.encode_keys)
write = jax.jit(nomad.write_codes)
float_tables = jax.jit(nomad.lookup_tables)
query_tables = jax.jit(nomad.query_tables)
score = jax.jit(nomad.nomad_scores, static_argnames="implementation")
quantised = jax.jit(nomad.quantise_tables)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def inputs():
    """``(q, keys, values)``."""
    return normal(0, B, H, D), normal(1, B, K, N, D), normal(2, B, K, N, 9)


@pytest.fixture(scope="module")
def book(inputs):
    keys = inputs[1].swapaxes(1, 2).reshape(B * N, K, D)
    return nomad.nomad_codebooks(KEY, keys, channels=C, iterations=4)


@pytest.fixture(scope="module")
def blocks(inputs, book):
    return nomad.pack_blocks(encode(inputs[1], book))


def decoded(codes, book):
    """``[B, K, n, D]``, a part at a time."""
    codes, book = np.asarray(codes), np.asarray(book, np.float64)
    parts = [book[k, s][codes[:, k, :, s]] for k in range(book.shape[0]) for s in range(book.shape[1])]
    stacked = np.stack(parts).reshape(*book.shape[:2], codes.shape[0], codes.shape[2], -1)
    return stacked.transpose(2, 0, 3, 1, 4).reshape(codes.shape[0], book.shape[0], codes.shape[2], -1)


def softmax_read(logits, values):
    """``[B, H, V]`` of logits ``[B, H, n]``."""
    values = np.repeat(np.asarray(values, np.float64), logits.shape[1] // values.shape[1], axis=1)
    return np.einsum("bhn,bhnv->bhv", scipy.special.softmax(logits, axis=-1), values)


# --- codebooks and codes ------------------------------------------------------------------------------


def test_codes_name_the_nearest_centroid(inputs, book):
    keys, codes = np.asarray(inputs[1], np.float64), np.asarray(encode(inputs[1], book))
    for b, k, n, s in np.ndindex(B, K, N, S):
        distances = ((keys[b, k, n, s * C : s * C + C] - np.asarray(book)[k, s]) ** 2).sum(axis=-1)
        assert distances[codes[b, k, n, s]] <= distances.min() + 1e-6


def test_encoding_decoded_keys_changes_nothing(inputs, book):
    codes = encode(inputs[1], book)
    np.testing.assert_array_equal(encode(jnp.asarray(decoded(codes, book), jnp.float32), book), codes)


def test_iterations_never_raise_the_distortion():
    keys = normal(3, 300, 1, 4)
    found = []
    for iterations in (1, 25):
        own = nomad.nomad_codebooks(KEY, keys, channels=4, iterations=iterations)
        distances = ((np.asarray(keys)[:, 0, None] - np.asarray(own)[0, 0]) ** 2).sum(axis=-1)
        found.append(distances.min(axis=1).sum())
    assert found[1] < found[0]


def test_keys_beyond_4096_are_drawn_from():
    """Half of 9000 keys are 0 and the others 1: of 4096 draws both are among the centroids, and nothing else."""
    many = jnp.asarray(np.arange(9000)[:, None, None] % 2, jnp.float32)
    own = nomad.nomad_codebooks(KEY, many, iterations=1)
    assert own.shape == (1, 1, 16, 1)
    assert set(np.asarray(own).ravel().tolist()) == {0.0, 1.0}


def test_heads_have_codebooks_of_their_own(inputs, book):
    """Other heads, other books: with heads in another order, their results are."""
    q, keys, values = inputs
    order = np.asarray([1, 0])
    of_queries = (order[:, None] * J + np.arange(J)).reshape(-1)
    length = jnp.asarray([N, N], jnp.int32)
    found = attention(q, nomad.pack_blocks(encode(keys, book)), values, book, length, implementation="xla")
    other = attention(q[:, of_queries], nomad.pack_blocks(encode(keys[:, order], book[order])), values[:, order],
                      book[order], length, implementation="xla")  # fmt: skip
    np.testing.assert_array_equal(other, np.asarray(found)[:, of_queries])
    assert not np.allclose(np.asarray(book)[0], np.asarray(book)[1])


@pytest.mark.parametrize("slots", [0, 1, 31, 32, 45])
def test_blocks_are_the_documented_nibbles(slots):
    codes = np.random.default_rng(slots).integers(0, 16, (2, slots, 3)).astype(np.uint8)
    blocks = np.asarray(nomad.pack_blocks(jnp.asarray(codes)))
    assert blocks.shape == (2, -(-slots // 32), 3, 16)
    for row, n, s in np.ndindex(2, 32 * blocks.shape[1], 3):
        byte = blocks[row, n // 32, s, n % 16]
        assert (byte >> 4 if n % 32 >= 16 else byte & 15) == (codes[row, n, s] if n < slots else 0)
    np.testing.assert_array_equal(nomad.unpack_blocks(jnp.asarray(blocks), slots), codes)


def test_codes_are_written_where_they_belong(blocks):
    codes = np.random.default_rng(7).integers(0, 16, (B, K, 6, S)).astype(np.uint8)
    at = np.asarray([[[3, 19, -1, 64, 40, 63]], [[0, 16, 44, 70, 1, 2]]], np.int32)
    expected = np.array(nomad.unpack_blocks(blocks, 64))
    for b, i in np.ndindex(B, 6):
        if 0 <= at[b, 0, i] < 64:
            expected[b, :, at[b, 0, i]] = codes[b, :, i]
    found = write(blocks, jnp.asarray(codes), jnp.asarray(at))
    np.testing.assert_array_equal(nomad.unpack_blocks(found, 64), expected)
    # A code has four bits; what is above them is no other key's.
    wild = write(blocks, jnp.asarray(codes | 0xF0), jnp.asarray(at))
    np.testing.assert_array_equal(wild, found)


# --- tables and scores --------------------------------------------------------------------------------


def test_float_tables_are_products_with_decoded_keys(inputs, book):
    q, keys, _ = inputs
    codes = np.asarray(encode(keys, book))
    tables = np.asarray(float_tables(q, book))
    products = np.einsum("bkjd,bknd->bkjn", np.asarray(q).reshape(B, K, J, D), decoded(codes, book))
    looked_up = np.zeros((B, K, J, N))
    for s in range(S):
        for b, k in np.ndindex(B, K):
            looked_up[b, k] += tables[b, k, :, s][:, codes[b, k, :, s]]
    np.testing.assert_allclose(looked_up, products, atol=1e-5)


def test_rounding_of_tables_is_within_its_bound(inputs, book, blocks):
    """``|step sum + bias - float sum| <= S step / 2``, and with keys that are centroids the float sum is q . k."""
    q, keys, _ = inputs
    tables = query_tables(q, book)
    products = np.einsum("bkjd,bknd->bkjn", np.asarray(q).reshape(B, K, J, D), decoded(encode(keys, book), book))
    found = np.asarray(score(q, blocks, book, implementation="xla"))[..., :N]
    room = S * np.asarray(tables.step)[..., None] / 2
    assert (np.abs(found - products) <= room + 1e-5).all()
    assert np.abs(found - products).max() > 0.05 * room.max()


def test_sums_never_leave_16_bits():
    """Up to 257 quantisers each may have 255; beyond, the step grows, though every entry were rounded up."""
    quantisers = 2000
    equal = np.zeros((quantisers, 16), np.float32)
    equal[:, 1] = 1
    rounded_up = np.where(np.arange(quantisers) < 1000, 1.0, 0.5)[:, None] * equal
    for tables in (equal, rounded_up, np.random.default_rng(0).random((quantisers, 16), np.float32), equal[:257]):
        found = quantised(jnp.asarray(tables, jnp.float32))
        most = np.asarray(found.entries).max(axis=1).astype(int).sum()
        assert most <= 65535
        assert most >= 0.95 * min(65535, 255 * len(tables)) or tables is rounded_up
    assert np.asarray(quantised(jnp.asarray(equal[:257])).entries).max() == 255


def test_each_score_is_its_entries_by_a_loop(blocks):
    rng = np.random.default_rng(8)
    entries = rng.integers(0, 256, (B, K, J, S, 16)).astype(np.uint8)
    codes = np.asarray(nomad.unpack_blocks(blocks, 64))
    expected = np.zeros((B, K, J, 64), int)
    for b, k, j, n, s in np.ndindex(B, K, J, 64, S):
        expected[b, k, j, n] += entries[b, k, j, s, codes[b, k, n, s]]
    np.testing.assert_array_equal(sums(jnp.asarray(entries), blocks, implementation="xla"), expected)


@native_only
@pytest.mark.parametrize(("rows", "group", "quantisers", "count"), [(1, 1, 1, 1), (3, 2, 7, 9), (2, 1, 258, 70)])
def test_native_sums_are_those_of_xla(rows, group, quantisers, count):
    """To the bit, by all instructions that the processor has; 258 whole tables wrap as 16 bits do."""
    rng = np.random.default_rng(quantisers)
    entries = rng.integers(0, 256, (rows, group, quantisers, 16)).astype(np.uint8)
    entries[:, :, :, 3] = 255
    codes = rng.integers(0, 256, (rows, count, quantisers, 16)).astype(np.uint8)
    codes[:, -1] = 0x33
    entries, codes = jnp.asarray(entries), jnp.asarray(codes)
    expected = np.asarray(sums(entries[None], codes[None], implementation="xla"))[0]
    assert expected[0, 0, -1] == 255 * quantisers % 65536
    step, bias = (jnp.asarray(rng.standard_normal((rows, group)), jnp.float32) for _ in range(2))
    logits = np.asarray(step, np.float64)[..., None] * expected + np.asarray(bias, np.float64)[..., None]
    for level in nomad_native.LEVELS:
        np.testing.assert_array_equal(nomad_native.lookup_sums(entries, codes, level=level), expected, level)
        found = nomad_native.lookup_logits(entries, step, bias, codes, level=level)
        np.testing.assert_allclose(found, logits, rtol=1e-6, atol=1e-6, err_msg=level)
    np.testing.assert_array_equal(sums(entries[None], codes[None], implementation="auto")[0], expected)


@native_only
@pytest.mark.parametrize(("heads", "group", "quantisers", "channels"), [(2, 3, 5, 1), (3, 1, 4, 4), (1, 1, 300, 1)])
def test_native_tables_are_those_of_xla(heads, group, quantisers, channels):
    """Entries lie at a half of two once in some ten thousand."""
    rng = np.random.default_rng(quantisers)
    q = rng.standard_normal((2, heads * group, quantisers * channels)).astype(np.float32)
    q[0, 0] *= 1e30  # beyond what counts
    q[1, -1] = 0
    book = jnp.asarray(rng.standard_normal((heads, quantisers, 16, channels)), jnp.float32)
    expected = query_tables(jnp.asarray(q), book)
    rows = q.reshape(2 * heads, group, -1)
    entries, step, bias = nomad_native.query_tables(jnp.asarray(rows), book)
    apart = np.abs(np.asarray(entries, int) - np.asarray(expected.entries, int).reshape(entries.shape))
    assert apart.max() <= 1
    assert np.mean(apart) < 1e-3
    np.testing.assert_allclose(step, expected.step.reshape(step.shape), rtol=1e-5)
    np.testing.assert_allclose(bias, expected.bias.reshape(bias.shape), rtol=1e-5, atol=1e-5)
    q[1, 0, 0] = np.nan
    _, broken, _ = nomad_native.query_tables(jnp.asarray(q.reshape(rows.shape)), book)
    assert np.isnan(broken).sum() == 1


# --- attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["xla", pytest.param("native", marks=native_only)])
def test_attention_is_softmax_over_scores(implementation, inputs, book, blocks):
    q, _, values = inputs
    scores = np.asarray(score(q, blocks, book, implementation="xla"), np.float64).reshape(B, H, -1)
    for scale in (None, -3.0):
        for lengths in ((N, 7), (1, 0), (99, -4)):
            found = attention(q, blocks, values, book, jnp.asarray(lengths, jnp.int32), scale=scale,
                              implementation=implementation)  # fmt: skip
            for b, length in enumerate(np.clip(lengths, 0, N)):
                if not length:
                    np.testing.assert_array_equal(found[b], np.zeros((H, 9)))
                    continue
                logits = scores[b : b + 1, :, :length] * (1 / math.sqrt(D) if scale is None else scale)
                expected = softmax_read(logits, values[b : b + 1, :, :length])[0]
                np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-5)


@native_only
def test_native_attention_joins_chunks_whatever_the_instructions():
    """5000 keys are three chunks; values of width 150 use vectors of every size and a remainder."""
    rng = np.random.default_rng(9)
    slots, width, quantisers = 5000, 150, 3
    entries = rng.integers(0, 256, (1, 2, quantisers, 16)).astype(np.uint8)
    codes = rng.integers(0, 256, (1, -(-slots // 32), quantisers, 16)).astype(np.uint8)
    values, slope = normal(10, 1, slots, width), jnp.asarray([[0.02, 3.0]], jnp.float32)
    total = np.asarray(sums(jnp.asarray(entries)[None], jnp.asarray(codes)[None], implementation="xla"))[0]
    for length in (slots, 4097, 2048):
        logits = np.asarray(slope, np.float64)[..., None] * total[..., :length]
        expected = softmax_read(logits, values[:, None, :length])
        for level in nomad_native.LEVELS:
            found = nomad_native.attend(jnp.asarray(entries), slope, jnp.asarray(codes), values,
                                        jnp.asarray([length], jnp.int32), level=level)  # fmt: skip
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=level)


def test_distinct_keys_that_are_centroids_are_dense_attention():
    """One part of the whole width and at most 16 distinct keys: only the rounding of the table is left."""
    few, values, q = normal(11, 13, 8), normal(12, 1, 1, 40, 8), normal(13, 1, 1, 8)
    keys = few[np.random.default_rng(0).integers(0, 13, 40)][None, None]
    own = nomad.nomad_codebooks(KEY, few[:, None], channels=8)
    np.testing.assert_allclose(decoded(encode(keys, own), own), keys, atol=1e-6)
    logits = np.einsum("bhd,bhnd->bhn", np.asarray(q, np.float64), np.asarray(keys, np.float64)) / math.sqrt(8)
    found = attention(q, nomad.pack_blocks(encode(keys, own)), values, own, jnp.asarray([40], jnp.int32))
    # A logit is off by half a step at most, hence a weight by a factor of exp(step) together with the mass.
    step = float(nomad.query_tables(q, own).step[0, 0, 0]) / math.sqrt(8)
    room = math.expm1(step) * np.abs(np.asarray(values)).max()
    assert np.abs(np.asarray(found) - softmax_read(logits, values)).max() <= room < 0.1


@pytest.mark.parametrize("implementation", ["xla", pytest.param("native", marks=native_only)])
def test_finite_inputs_give_finite_results_and_nan_is_not_hidden(implementation, inputs, book, blocks):
    q, keys, values = inputs
    length = jnp.asarray([N, N], jnp.int32)
    read = functools.partial(attention, implementation=implementation)
    for size in (0.0, 1e-38, 1e18, 3e38):
        huge = nomad.pack_blocks(encode(keys * 0 + size, jnp.full_like(book, -size)))
        for own in (book, jnp.full_like(book, size), book * jnp.float32(1e18)):
            assert np.isfinite(np.asarray(read(q * 0 + size, huge, values, own, length))).all()
    broken = np.asarray(read(q.at[0, 0, 0].set(jnp.nan), blocks, values, book, length))
    assert np.isnan(broken[0, 0]).all()
    assert np.isfinite(broken[0, 1:]).all()
    empty = read(q, blocks[:, :, :0], values[:, :, :0], book, length)
    np.testing.assert_array_equal(empty, np.zeros((B, H, 9)))


# --- the selector and the codec -------------------------------------------------------------------------


def test_a_selector_that_grows_is_one_that_was_built(inputs, book, blocks):
    q, keys, values = inputs
    positions = jnp.asarray(np.arange(N, dtype=np.int32)[None, None].repeat(B, axis=0))
    selector = Nomad(implementation="xla")
    build = jax.jit(lambda keys: selector.build(keys, values, positions, learned=book))
    whole = build(keys)
    grown = build(jnp.where(np.arange(N)[:, None] < 20, keys, 0))
    at = jnp.asarray(np.concatenate([np.arange(20, N), [-1, N, 63]])[None, None].repeat(B, axis=0), jnp.int32)
    extra = jnp.concatenate([keys[:, :, 20:], keys[:, :, :3] + 9], axis=2)
    grown = jax.jit(selector.append)(grown, extra, extra, at)
    jax.tree.map(np.testing.assert_array_equal, grown, whole)
    np.testing.assert_array_equal(whole.slots["codes"], blocks)
    scores = np.asarray(jax.jit(selector.scores)(whole, q))
    assert scores.shape == (B, K, J, N)
    last = jnp.full(B, N - 1, jnp.int32)
    choose = jax.jit(functools.partial(selector.select, sinks=0, window=0, heavy=5))
    idx, valid, _ = choose(whole, q, positions, last)
    assert np.asarray(valid).all()
    found = np.take_along_axis(scores.reshape(B, H, N), np.asarray(idx), axis=2)
    np.testing.assert_array_equal(found, -np.sort(-scores.reshape(B, H, N), axis=-1)[..., :5])
    # 4 bits a part, and 64 slots of which 45 are counted.
    assert index_bits(whole, B, K, N) == 4 * S * 64 / N
    with pytest.raises(ValueError, match="learned is None; Nomad needs it for its codebook"):
        selector.build(keys, values, positions)


def test_a_cache_of_codes_attends_by_them(inputs, book):
    """Token after token into a layer without a window: rotated keys, then softmax over the codes' scores."""
    _, keys, values = inputs
    rotary, tokens = Rotary(10000.0), 4
    spec = LayerSpec(kv_heads=K, query_heads=H, head_dim=D, slots=8, window=0, key_codec=NomadKeys(C),
                     value_codec=Dense(), policy=KeepAll(), rotary=rotary, rope="write")  # fmt: skip
    tables = LayerTables(keys={"codebook": book})
    places = jnp.asarray(np.broadcast_to(np.arange(tokens, dtype=np.int32), (B, 1, tokens)))
    padded = jnp.pad(values[:, :, :tokens], ((0, 0), (0, 0), (0, 0), (0, D - 9)))

    @jax.jit
    def decode(keys, values, q):
        layer, head = init_layer(spec, B), jnp.zeros((), jnp.int32)
        turned = rotary.rotate(keys, places)
        for n in range(tokens):
            pos = places[:, 0, n]
            layer = append(
                spec, tables, layer, head, turned[:, :, n : n + 1], values[:, :, n : n + 1], pos[:, None], pos
            )
        out, _ = attend(spec, tables, layer, q, places[:, 0, -1:])
        asked = rotary.rotate(q, places[:, :, -1:])[:, :, 0] / math.sqrt(D)
        codes = nomad.encode_keys(turned, book)
        scores = nomad.nomad_scores(asked, nomad.pack_blocks(codes), book, implementation="xla")
        return out, layer.keys, spec.key_codec.decode(tables.keys, layer.keys), codes, scores

    out, held, exact, codes, scores = decode(keys[:, :, :tokens], padded, normal(14, B, H, 1, D))
    assert held.slots["code"].shape == (B, K, 8, S // 2)
    np.testing.assert_allclose(exact[:, :, :tokens], decoded(codes, book), rtol=1e-6)
    logits = np.asarray(scores, np.float64).reshape(B, H, -1)[..., :tokens]
    # The cache divides its queries by sqrt(D) before they make tables, as is done here.
    np.testing.assert_allclose(out[:, :, 0], softmax_read(logits, padded), rtol=1e-4, atol=1e-5)


# --- bad input, and machines without a compiler ---------------------------------------------------------


def test_what_does_not_fit_is_refused(inputs, book, blocks):
    q, keys, values = inputs
    length = jnp.asarray([N, N], jnp.int32)
    entries = query_tables(q, book).entries
    with pytest.raises(ValueError, match="channels is 5; it must be at least 1 and divide the width of a key, 12"):
        nomad.nomad_codebooks(KEY, keys[0].swapaxes(0, 1), channels=5)
    with pytest.raises(ValueError, match="there must be at least one key"):
        nomad.nomad_codebooks(KEY, keys[0, :, :0].swapaxes(0, 1))
    with pytest.raises(ValueError, match="codebook has 15 centroids; a table of 16 entries fits a register"):
        nomad.encode_keys(keys, book[:, :, :15])
    with pytest.raises(
        ValueError, match="codebook is of 2 heads and 5 parts of 2 channels; keys have 2 heads of wid"
    ):
        nomad.encode_keys(keys, book[:, :5])
    with pytest.raises(ValueError, match="q has 3 heads; they must be a multiple of the 2 key heads"):
        nomad.query_tables(q[:, :3], book)
    with pytest.raises(ValueError, match="slots is 65; 2 blocks hold 0 to 64 keys"):
        nomad.unpack_blocks(blocks, 65)
    with pytest.raises(
        ValueError, match=r"blocks has shape \(2, 2, 2, 5, 16\); of 2 rows, 2 key heads and 6 quantisers"
    ):
        nomad.lookup_sums(entries, blocks[:, :, :, :5])
    with pytest.raises(ValueError, match=r"blocks has shape .* with values .* it must be \[2, 2, 2, S, 16\]"):
        nomad.nomad_attention(q, blocks[:, :, :1], values, book, length)
    with pytest.raises(ValueError, match="2 key heads and 6 quantisers it must be"):
        nomad.nomad_attention(q, blocks[:, :, :, :5], values, book, length)
    with pytest.raises(ValueError, match="channels is 0; it must be at least 1"):
        NomadKeys(0)


@pytest.fixture
def no_library(monkeypatch):
    """As on a machine where nothing compiles."""
    monkeypatch.setattr(native, "compilers", list)
    native_xla.load.cache_clear()
    yield
    native_xla.load.cache_clear()


def test_without_a_compiler_xla_serves_and_says_so_once(
    no_library, tmp_path, monkeypatch, caplog, inputs, book, blocks
):
    del no_library
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    q, _, values = inputs
    length = jnp.asarray([N, N], jnp.int32)
    with caplog.at_level(logging.WARNING):
        found = [jax.jit(lambda *x: nomad.nomad_attention(*x))(q, blocks, values, book, length) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "NoMAD-Attention runs without its native look-ups, by XLA's slower ones: no C++ compiler was found (c++, "
        "g++, clang++, or one named by $CXX)"
    ]
    expected = attention(q, blocks, values, book, length, implementation="xla")
    np.testing.assert_array_equal(found[0], expected)
    with pytest.raises(native.NativeUnavailable, match="there is no native library: no C"):
        nomad.nomad_attention(q, blocks, values, book, length, implementation="native")


def test_a_library_is_built_once_by_the_first_compiler_that_works(tmp_path):
    """The compiler is a shell's script, which writes what it was asked to write."""
    works = ["sh", "-c", 'echo run >> "$0.runs"; for last; do :; done; echo library > "$last"', str(tmp_path / "cc")]
    fails = ["sh", "-c", "echo cc: fatal error: no headers >&2; exit 1"]
    with pytest.raises(native.NativeUnavailable, match=r"sh -c .*: cc: fatal error: no headers"):
        nomad_native.FUNCTIONS.build(tmp_path, [fails])
    with pytest.raises(native.NativeUnavailable, match="nowhere/c\\+\\+"):
        nomad_native.FUNCTIONS.build(tmp_path, [[str(tmp_path / "nowhere/c++")]])
    found = nomad_native.FUNCTIONS.build(tmp_path / "a" / "b", [fails, works])
    assert found.read_text() == "library\n"
    assert [path.name for path in found.parent.iterdir()] == [found.name]
    assert nomad_native.FUNCTIONS.build(tmp_path / "a" / "b", [works]) == found
    assert (tmp_path / "cc.runs").read_text() == "run\n"

    def slow(*arguments, **options):
        raise subprocess.TimeoutExpired("c++", 300)

    with pytest.raises(native.NativeUnavailable, match="timed out after 300 seconds"):
        nomad_native.FUNCTIONS.build(tmp_path / "c", [["c++"]], run=slow)
    assert not list((tmp_path / "c").iterdir())


def test_the_compiler_of_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("CXX", "ccache 'my c++'")
    assert native.compilers()[0] == ["ccache", "my c++"]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX")
    assert native.compilers() == []

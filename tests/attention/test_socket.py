"""SOCKET and the scores that share its index: the card's identities, beside loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax.sharding import AbstractDevice, AbstractMesh

from hashml.attention.selector_contract import index_bits, slot_positions
from hashml.attention.socket import (
    AsymmetricSRP,
    HammingLSH,
    HardLSH,
    SimHashIndex,
    Socket,
    factorised_scores,
    socket_scores,
    srp_codes,
    value_norms,
)
from hashml.attention.sparse_decode import sparse_decode
from hashml.hashing.simhash import soft_hash, srp_planes

B, K, J, N, D, L, P = 2, 2, 2, 40, 16, 6, 4
H = K * J
KEY = jax.random.key(7)


@functools.partial(jax.jit, static_argnames=("selector",))
def build(selector, k, v, positions):
    return selector.build(k, v, positions, key=KEY)


@functools.partial(jax.jit, static_argnames=("selector", "sizes", "gqa"))
def select(selector, index, q, positions, query_pos, sizes, gqa="head"):
    sinks, window, heavy = sizes
    return selector.select(index, q, positions, query_pos, sinks=sinks, window=window, heavy=heavy, gqa=gqa)


@functools.partial(jax.jit, static_argnames=("selector",))
def score(selector, index, q):
    return selector.scores(index, q)


append = jax.jit(lambda selector, *rest: selector.append(*rest), static_argnums=0)
decode = jax.jit(sparse_decode)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    k = rng.standard_normal((B, K, N, D))
    v = rng.standard_normal((B, K, N, D)) * rng.lognormal(0, 0.5, (B, K, N, 1))
    q = rng.standard_normal((B, H, D)) * 2
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v))


@pytest.fixture(scope="module")
def planes():
    return srp_planes(KEY, L, P, D)


FULL = slot_positions(jnp.full(B, N), N)
LAST = jnp.full(B, N - 1)


def projections(x, planes):
    """``[..., L, P]`` in float64."""
    return np.einsum("...d,lpd->...lp", np.asarray(x, np.float64), np.asarray(planes, np.float64))


def bits_of(k, planes):
    return projections(k, planes) >= 0


def rank_correlation(x, y):
    ranks = (scipy.stats.rankdata(x), scipy.stats.rankdata(y))
    return float(np.corrcoef(*ranks)[0, 1])


def soft_by_hand(q, k, planes, tau):
    """The definition: for each key and table, the softmax over corners at the key's. ``[B, K, J, N]``"""
    corners = 2.0 * (np.arange(2**P)[:, None] >> np.arange(P)[::-1] & 1) - 1
    u = np.tanh(projections(q, planes)) / np.sqrt(D)
    shares = scipy.special.softmax(np.einsum("bhlp,rp->bhlr", u, corners) / tau, axis=-1)
    codes = (bits_of(k, planes) * 2 ** np.arange(P)[::-1]).sum(axis=-1)
    total = np.zeros((B, H, N))
    for b, h, n in np.ndindex(B, H, N):
        total[b, h, n] = shares[b, h, np.arange(L), codes[b, h // J, n]].sum()
    return total.reshape(B, K, J, N)


def test_codes_are_the_signs_of_the_keys(inputs, planes):
    k = inputs[1]
    expected = (bits_of(k, planes) * 2 ** np.arange(P)[::-1]).sum(axis=-1)
    np.testing.assert_array_equal(srp_codes(k, planes), expected)
    assert srp_codes(k, planes).dtype == jnp.uint8
    np.testing.assert_array_equal(srp_codes(3.7 * k, planes), expected)
    # Blocks of tokens, the last one short; nine bits do not fit in a byte.
    long, wide = jnp.tile(k, (1, 1, 8, 1))[:, :, :300], srp_planes(KEY, 2, 9, D)
    found = srp_codes(long, wide)
    assert found.dtype == jnp.uint16
    expected = (bits_of(long, wide) * 2 ** np.arange(9)[::-1]).sum(axis=-1)
    np.testing.assert_array_equal(found, expected)


def test_scores_are_the_definition(inputs, planes):
    q, k, v = inputs
    selector = Socket(tables=L, bits=P)
    index = build(selector, k, v, FULL)
    norms = np.linalg.norm(np.asarray(v, np.float64), axis=-1)[:, :, None]
    found = score(selector, index, q)
    expected = norms * soft_by_hand(q, k, planes, 0.3)
    # Norms are float16: half a unit in the 11th bit.
    np.testing.assert_allclose(found, expected, rtol=2**-11 + 1e-5)
    assert (np.asarray(found) >= 0).all()
    assert (np.asarray(found) <= L * norms.max() * 1.001).all()
    bare = Socket(tables=L, bits=P, value_norm_power=0)
    index = build(bare, k, v, FULL)
    assert set(index.slots) == {"codes"}
    np.testing.assert_allclose(score(bare, index, q), soft_by_hand(q, k, planes, 0.3), rtol=1e-5)
    root = Socket(tables=L, bits=P, value_norm_power=0.5)
    expected = np.sqrt(norms) * soft_by_hand(q, k, planes, 0.3)
    np.testing.assert_allclose(score(root, build(root, k, v, FULL), q), expected, rtol=2**-11)


def test_soft_tables_sum_to_one(inputs, planes):
    table = soft_hash(inputs[0], planes, Socket().beta(D))
    np.testing.assert_allclose(np.asarray(table).sum(axis=-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_tables_and_factors_are_one_score(inputs, planes, tau):
    q, k, _ = inputs
    codes, queries = srp_codes(k, planes).swapaxes(2, 3), q.reshape(B, K, J, D)
    beta = Socket(temperature=tau).beta(D)
    gathered = socket_scores(queries, planes, codes, beta)
    np.testing.assert_allclose(factorised_scores(queries, planes, codes, beta), gathered, rtol=1e-5, atol=1e-7)


def test_a_low_temperature_counts_collisions(inputs, planes):
    """Where no projection is near zero; these queries are parallel to none of the planes."""
    q, k, v = inputs
    assert np.abs(projections(q, planes)).min() > 0.005
    cold, hard = (make(tables=L, bits=P) for make in (functools.partial(Socket, temperature=1e-4), HardLSH))
    index = build(cold, k, v, FULL)
    counts = (
        (bits_of(q, planes).reshape(B, K, J, 1, L, P) == bits_of(k, planes)[:, :, None]).all(axis=-1).sum(axis=-1)
    )
    expected = np.asarray(index.slots["norms"], np.float64)[:, :, None] * counts
    np.testing.assert_allclose(score(hard, index, q), expected, rtol=1e-6)
    np.testing.assert_allclose(score(cold, index, q), expected, rtol=1e-3, atol=1e-3)


def test_a_high_temperature_ranks_by_bits_that_agree(inputs, planes):
    q, k, v = inputs
    hot = Socket(tables=L, bits=P, value_norm_power=0, temperature=300.0)
    signs = 2.0 * bits_of(k, planes)[:, :, None] - 1
    linear = (signs * np.tanh(projections(q, planes)).reshape(B, K, J, 1, L, P)).sum(axis=(-1, -2))
    found = np.asarray(score(hot, build(hot, k, v, FULL), q))
    for at in np.ndindex(B, K, J):
        assert rank_correlation(found[at], linear[at]) > 0.999
    with_norm = Socket(tables=L, bits=P, temperature=1e4)
    found = np.asarray(score(with_norm, build(with_norm, k, v, FULL), q))
    norms = np.asarray(value_norms(v))
    for b, h, j in np.ndindex(B, K, J):
        assert rank_correlation(found[b, h, j], norms[b, h]) > 0.9999


def test_controls_at_equal_bits(inputs, planes):
    q, k, v = inputs
    q_bits, k_bits = bits_of(q, planes).reshape(B, K, J, 1, L, P), bits_of(k, planes)[:, :, None]
    hamming = HammingLSH(tables=L, bits=P, value_norm_power=0)
    index = build(hamming, k, v, FULL)
    np.testing.assert_array_equal(score(hamming, index, q), (q_bits == k_bits).sum(axis=(-1, -2)))
    asymmetric = AsymmetricSRP(tables=L, bits=P, value_norm_power=0)
    expected = ((2.0 * k_bits - 1) * projections(q, planes).reshape(B, K, J, 1, L, P)).sum(axis=(-1, -2))
    np.testing.assert_allclose(score(asymmetric, index, q), expected, rtol=1e-5, atol=1e-4)


def test_asymmetric_scores_estimate_the_inner_product():
    """E[(w.q) sign(w.k)] = sqrt(2 / pi) q.k / |k| over normal w."""
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((1, 1, D)), rng.standard_normal((1, 1, 3, D))
    tables = 4000
    selector = AsymmetricSRP(tables=tables, bits=1, value_norm_power=0)
    q, k = jnp.asarray(q, jnp.float32), jnp.asarray(k, jnp.float32)
    index = build(selector, k, k, slot_positions(jnp.array([3]), 3))
    found = np.asarray(score(selector, index, q))[0, 0, 0] / tables
    exact = np.sqrt(2 / np.pi) * np.einsum("d,nd->n", q[0, 0], k[0, 0]) / np.linalg.norm(k[0, 0], axis=-1)
    error = np.linalg.norm(q) / np.sqrt(tables)
    assert (np.abs(found - exact) < 4 * error).all()


def test_everything_chosen_is_dense_attention(inputs):
    q, k, v = inputs
    selector = Socket(tables=L, bits=P)
    index = build(selector, k, v, FULL)
    logits = np.einsum("bhd,bhnd->bhn", q, np.repeat(k, J, axis=1)) / np.sqrt(D)
    dense = np.einsum("bhn,bhnd->bhd", scipy.special.softmax(logits, axis=-1), np.repeat(v, J, axis=1))
    for gqa, lists in (("head", H), ("max", K)):
        found = select(selector, index, q, FULL, LAST, (4, 6, N), gqa)
        assert found.idx.shape == (B, lists, N)
        np.testing.assert_allclose(decode(q, k, v, *found), dense, rtol=1e-5, atol=1e-5)


def test_tokens_one_by_one_make_the_same_index(inputs):
    _, k, v = inputs
    selector = Socket(tables=L, bits=P)
    whole = build(selector, k, v, FULL)
    grown = build(selector, jnp.zeros_like(k), jnp.zeros_like(v), jnp.full_like(FULL, -1))
    for n in range(N):
        at = jnp.full((B, 1, 1), n)
        grown = append(selector, grown, k[:, :, n : n + 1], v[:, :, n : n + 1], at)
    jax.tree.map(np.testing.assert_array_equal, grown, whole)
    nowhere = append(selector, grown, k[:, :, :1], v[:, :, :1], jnp.array([[[-1]], [[N]]]))
    jax.tree.map(np.testing.assert_array_equal, nowhere, whole)


def test_lists_hold_no_token_twice_and_fill_the_budget(inputs):
    q, k, v = inputs
    selector = Socket(tables=L, bits=P)
    found = select(selector, build(selector, k, v, FULL), q, FULL, LAST, (3, 5, 7))
    idx = np.asarray(found.idx)
    assert np.asarray(found.valid).all()
    for row in idx.reshape(-1, 15):
        assert len(set(row)) == 15
        assert {0, 1, 2, *range(N - 5, N)} <= set(row)


def test_scaling_values_and_keys(inputs):
    q, k, v = inputs
    selector = Socket(tables=L, bits=P)
    index = build(selector, k, v, FULL)
    # A power of two, so that float16 rounds alike.
    louder = build(selector, k, 4 * v, FULL)
    lists = [select(selector, i, q, FULL, LAST, (3, 5, 7)) for i in (index, louder)]
    np.testing.assert_array_equal(lists[0].idx, lists[1].idx)
    np.testing.assert_allclose(decode(q, k, 4 * v, *lists[1]), 4 * decode(q, k, v, *lists[0]), rtol=1e-6)
    longer = build(selector, 3.3 * k, v, FULL)
    np.testing.assert_array_equal(longer.slots["codes"], index.slots["codes"])


def test_centring_moves_codes_and_not_attention(inputs, planes):
    q, k, v = inputs
    selector = Socket(tables=L, bits=P, center="prefill_mean")
    positions = slot_positions(jnp.array([N, 25]), N)
    index = build(selector, k + 3.0, v, positions)
    held = np.asarray(positions >= 0)[..., None]
    mean = np.where(held, k + 3.0, 0).sum(axis=2) / held.sum(axis=2)
    np.testing.assert_allclose(index.fixed["centre"], mean, rtol=1e-5)
    centred = np.asarray(k + 3.0, np.float64) - mean[:, :, None]
    expected = (bits_of(centred, planes) * 2 ** np.arange(P)[::-1]).sum(axis=-1).swapaxes(2, 3)
    # A projection within rounding of zero may fall on either side.
    unsure = (np.abs(projections(centred, planes)) < 1e-4).any(axis=-1).swapaxes(2, 3)
    assert ((np.asarray(index.slots["codes"]) == expected) | unsure).all()
    assert unsure.mean() < 0.01
    # Later keys are centred with the same mean, which stays.
    later = append(selector, index, k[:, :, :1] + 3.0, v[:, :, :1], jnp.full((B, 1, 1), N - 1))
    np.testing.assert_array_equal(later.slots["codes"][..., N - 1], index.slots["codes"][..., 0])
    np.testing.assert_array_equal(later.fixed["centre"], index.fixed["centre"])
    full = select(selector, index, q, FULL, LAST, (4, 6, N), "max")
    np.testing.assert_allclose(
        decode(q, k - mean[:, :, None].astype(np.float32), v, *full), decode(q, k, v, *full), rtol=1e-4, atol=1e-4
    )


def test_bits_of_the_index_do_not_know_query_heads(inputs):
    """Counted from the arrays: a byte a code up to 8 bits, two above, and two for a length."""

    def bits(selector):
        index = jax.eval_shape(lambda k, v, p: selector.build(k, v, p, key=KEY), *inputs[1:], FULL)
        return index_bits(index, B, K, N)

    assert bits(Socket()) == 60 * 8 + 16
    assert bits(Socket(bits=3, value_norm_power=0)) == 60 * 8
    assert bits(Socket(tables=10, bits=10)) == 10 * 16 + 16
    assert bits(HardLSH()) == bits(HammingLSH()) == bits(AsymmetricSRP()) == bits(Socket())


def test_no_float_for_every_table_and_key():
    """The loop over tables holds sums for all keys, and never an array over keys and tables, but for codes."""
    slots, tables = 2048, 16
    planes = srp_planes(KEY, tables, 8, D)
    shapes = jnp.zeros((1, 2, 2, D)), jnp.zeros((1, 2, tables, slots), jnp.uint8)
    for scores in (socket_scores, factorised_scores):
        found = jax.jit(lambda q, codes, scores=scores: scores(q, planes, codes, 0.5)).lower(*shapes).compile()
        memory = found.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 4 * (4 * tables * slots) / 2


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_kernels_score_as_the_look_up(inputs, power):
    """By XLA's form of the kernel's op; `tests/kernels` holds the kernels equal to it."""
    q, k, v = inputs
    selector = Socket(tables=L, bits=P, value_norm_power=power)
    index = build(selector, k, v, FULL)
    found = jax.jit(selector._by_kernel)(index, q)
    assert found.shape == (B, K, J, N)
    np.testing.assert_allclose(found, score(selector, index, q), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_long_indices_are_scored_by_a_kernel_where_there_is_one():
    chips = {"cpu": ("cpu", "cpu"), "cuda": ("NVIDIA H200", "gpu"), "tpu": ("TPU v5 lite", "tpu")}

    def kernels(platform, slots, implementation):
        selector = Socket(tables=5, implementation=implementation)
        kind, device = chips[platform]
        mesh = AbstractMesh(
            (1,), ("x",), abstract_device=AbstractDevice(kind, 1 if device == "tpu" else None, device)
        )
        keys = jax.ShapeDtypeStruct((1, 2, slots, D), jnp.float32)
        positions = jax.ShapeDtypeStruct((1, 1, slots), jnp.int32)
        index = jax.eval_shape(lambda k, at: selector.build(k, k, at, key=KEY), keys, positions)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(selector.scores).trace(index, jax.ShapeDtypeStruct((1, 4, D), jnp.float32))
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("custom_call @tpu_custom_call") + text.count("custom_call @__gpu$xla.gpu.triton")

    for platform in chips:
        assert kernels(platform, 1024, "auto") == int(platform != "cpu")
    assert kernels("cuda", 1023, "auto") == kernels("cuda", 1024, "xla") == 0


def test_what_cannot_be_is_refused(inputs):
    _, k, v = inputs
    for make, message in (
        (lambda: Socket(tables=0), "tables is 0; it must be at least 1"),
        (lambda: Socket(bits=17), "bits is 17; it must lie in 1..16"),
        (lambda: Socket(temperature=0), "temperature is 0; it must be positive and finite"),
        (lambda: Socket(value_norm_power=-1), "value_norm_power is -1; it must be at least 0 and finite"),
        (lambda: Socket().build(k, v, FULL), "key is None; Socket needs it to draw its planes"),
        (lambda: Socket().scores(build(Socket(), k, v, FULL), jnp.zeros((B, 3, D))), "q has 3 heads; they must be a"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(Exception, match="median"):  # the annotation refuses it first where annotations are checked
        Socket(center="median")  # pyright: ignore[reportArgumentType]
    assert isinstance(Socket(), SimHashIndex)

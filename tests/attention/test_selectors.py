"""Every selector: what its index holds, grown or built; bounds, limits and unbiased sums of each method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from hashml.attention.double_sparsity import DoubleSparsity, heavy_channels
from hashml.attention.hash_attention import HashAttention, hash_codes, hash_map, init_mlps, train_hash_attention
from hashml.attention.magic_pig import MagicPig, collision_probability
from hashml.attention.nomad import Nomad
from hashml.attention.oracle import OracleTopK, OracleTopP
from hashml.attention.pq_cache import PQCache
from hashml.attention.quest import Quest
from hashml.attention.selection_controls import StreamingMask, UniformRandom
from hashml.attention.selector_contract import Selector, index_bits
from hashml.attention.socket import Socket
from hashml.attention.sparse_decode import gather_rows, sparse_decode
from hashml.attention.v_attention import VAttention, sample_budget

B, K, J, N, D = 2, 2, 2, 37, 16
H = K * J
KEY = jax.random.key(3)
CHANNELS = jnp.asarray([[0, 3, 5, 9], [1, 2, 15, 4]], jnp.int32)


def numpy_maps(seed):
    """Maps as `init_mlps` makes them, of normal numbers that no compilation has to make."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_mlps(KEY, H, K, D, hidden=(12,)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)


MAPS = numpy_maps(1)

SELECTORS = {
    "streaming": StreamingMask(),
    "random": UniformRandom(),
    "oracle": OracleTopK(),
    "oracle_p": OracleTopP(mass=1),
    "quest": Quest(page_size=4),
    "double_sparsity": DoubleSparsity(4),
    "hash_attention": HashAttention(),
    "pq_cache": PQCache(bits=3, iterations=3),
    "magic_pig": MagicPig(tables=40, bits=2, matches=1),
    "socket": Socket(tables=6, bits=4),
    "nomad": Nomad(),
    "v_attention": VAttention(OracleTopK(), epsilon=0),
}
BOOK = jnp.asarray(np.random.default_rng(5).standard_normal((K, D // 2, 16, 2)), jnp.float32)
LEARNED = {"double_sparsity": CHANNELS, "hash_attention": MAPS, "nomad": BOOK}
SIZES = (3, 5, 8)


def filled(*lengths):
    """Positions of rows that are filled in order so far, and of the last token. NumPy makes them: each operation of
    JAX would be compiled."""
    places = np.broadcast_to(np.arange(N, dtype=np.int32), (len(lengths), 1, N))
    lengths = np.asarray(lengths, np.int32)
    positions = np.where(places < lengths[:, None, None], places, -1).astype(np.int32)
    return jnp.asarray(positions), jnp.asarray(lengths - 1)


FULL, LAST = filled(N, N)
EARLY = 25
GONE = np.arange(N)[:, None] >= EARLY


def choose(selector, index, q, k, positions, query_pos, sizes=SIZES, gqa="head", key=KEY):
    sinks, window, heavy = sizes
    rows = functools.partial(gather_rows, k)
    return selector.select(
        index, q, positions, query_pos, sinks=sinks, window=window, heavy=heavy, gqa=gqa, key=key, rows=rows
    )


select = jax.jit(choose, static_argnames=("selector", "sizes", "gqa"))
append = jax.jit(lambda selector, *rest: selector.append(*rest), static_argnums=0)
decode = jax.jit(sparse_decode)


@jax.jit
def build_all(k, v, positions):
    return {name: SELECTORS[name].build(k, v, positions, key=KEY, learned=LEARNED.get(name)) for name in SELECTORS}


@jax.jit
def append_all(indexes, k, v, at):
    return {name: SELECTORS[name].append(index, k, v, at) for name, index in indexes.items()}


@functools.partial(jax.jit, static_argnames=("sizes", "gqa", "names"))
def select_all(indexes, q, k, positions, query_pos, sizes, gqa, names):
    return {name: choose(SELECTORS[name], indexes[name], q, k, positions, query_pos, sizes, gqa) for name in names}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, H, D), (B, K, N, D), (B, K, N, D)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


@pytest.fixture(scope="module")
def indexes(inputs):
    return build_all(*inputs[1:], FULL)


@jax.jit
def score_all(indexes, q):
    return {name: SELECTORS[name].scores(index, q) for name, index in indexes.items()}


@pytest.fixture(scope="module")
def scores(inputs, indexes):
    names = ("double_sparsity", "hash_attention", "pq_cache")
    return score_all({name: indexes[name] for name in names}, inputs[0])


@pytest.fixture(scope="module")
def lists(inputs, indexes):
    """Row 1 holds 12 tokens, fewer than are asked for."""
    return select_all(indexes, *inputs[:2], *filled(N, 12), SIZES, "head", tuple(SELECTORS))


@pytest.fixture(scope="module")
def everything(inputs, indexes):
    """As many tokens as there are, one list for the two query heads of a key head."""
    names = tuple(name for name in SELECTORS if name != "magic_pig")
    return select_all(indexes, *inputs[:2], FULL, LAST, (2, 3, N), "mean", names)


@pytest.fixture(scope="module")
def grown(inputs):
    """Indexes that were built while the last third of the slots was empty, and then grew one by one."""
    k, v = (np.asarray(x) for x in inputs[1:])
    held = (jnp.asarray(np.where(GONE, 0, x)) for x in (k, v))
    indexes = build_all(*held, filled(EARLY, EARLY)[0])
    for n in [*range(EARLY, N), -1, N]:
        place = max(0, min(n, N - 1))
        rows = (jnp.asarray(x[:, :, place : place + 1]) for x in (k, v))
        indexes = append_all(indexes, *rows, jnp.asarray(np.full((B, 1, 1), n, np.int32)))
    return indexes


def exact_logits(q, k):
    """``[B, H, N]`` in float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    return np.einsum("bhd,bhnd->bhn", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)) / np.sqrt(q.shape[-1])


def dense(q, k, v):
    shares = scipy.special.softmax(exact_logits(q, k), axis=-1)
    return np.einsum("bhn,bhnd->bhd", shares, np.repeat(np.asarray(v), H // K, axis=1))


# the contract


@pytest.mark.parametrize("name", SELECTORS)
def test_lists_share_no_token_and_see_what_they_may(name, lists):
    assert isinstance(SELECTORS[name], Selector)
    found = lists[name]
    assert found.idx.shape[:2] == (B, H)
    for b, h in np.ndindex(B, H):
        named = np.asarray(found.idx)[b, h][np.asarray(found.valid)[b, h]]
        assert len(set(named)) == len(named)
        assert set(named) <= set(range([N, 12][b]))
        assert {0, 1, 2, *range([N, 12][b] - 5, [N, 12][b])} <= set(named)
        if name != "magic_pig":
            assert len(named) == min(sum(SIZES), [N, 12][b])
    assert np.isfinite(np.asarray(found.weight)).all()
    if name not in ("random", "magic_pig", "v_attention"):
        assert (np.asarray(found.weight) == 1).all()


@pytest.mark.parametrize("name", [name for name in SELECTORS if name != "magic_pig"])
def test_all_tokens_are_dense_attention(name, inputs, everything):
    q, k, v = inputs
    found = everything[name]
    assert found.idx.shape[:2] == (B, K)
    np.testing.assert_allclose(decode(q, k, v, *found), dense(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in ("pq_cache", "magic_pig")])
def test_tokens_one_by_one_make_the_same_index(name, indexes, grown):
    """But for what is fixed by the first tokens: codebooks, means and lengths."""
    jax.tree.map(np.testing.assert_array_equal, grown[name], indexes[name])


def test_magic_pig_keeps_the_mean_and_the_length_of_the_first_tokens(inputs, grown):
    _, k, v = inputs
    whole = build_all(k, v, filled(EARLY, EARLY)[0])["magic_pig"]
    jax.tree.map(np.testing.assert_array_equal, grown["magic_pig"], whole)
    first = np.asarray(k, np.float64)[:, :, :EARLY]
    np.testing.assert_allclose(whole.fixed["mean"], first.mean(axis=2), rtol=1e-5, atol=1e-6)
    lengths = np.linalg.norm(first - first.mean(axis=2, keepdims=True), axis=-1)
    np.testing.assert_allclose(whole.fixed["longest"][..., 0], lengths.max(axis=2), rtol=1e-5)


def test_bits_of_a_token():
    """By counting: what each index stores for a slot and key head, at the defaults and heads of 64."""
    slots, width = 64, 64
    k, positions = (
        jax.ShapeDtypeStruct((1, 2, slots, width), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, slots), "int32"),
    )

    def bits(selector, learned=None):
        def make(k, positions, learned):
            return selector.build(k, k, positions, key=KEY, learned=learned)

        return index_bits(jax.eval_shape(make, k, positions, learned), 1, 2, slots)

    assert bits(StreamingMask()) == bits(UniformRandom()) == 0
    assert bits(OracleTopK()) == 32 * width
    assert bits(Quest()) == 32 * width / 16
    assert bits(DoubleSparsity(4), jnp.asarray(np.zeros((2, 4), np.int32))) == 4 * 4 + 32
    assert bits(HashAttention(), jax.eval_shape(lambda: init_mlps(KEY, 2, 2, width))) == 32
    assert bits(PQCache()) == 16
    assert bits(MagicPig()) == 75 * 8
    assert bits(VAttention(Quest())) == bits(Quest())


# one by one


def test_streaming_is_a_longer_window(lists):
    for row in np.asarray(lists["streaming"].idx)[0]:
        assert set(row) == {0, 1, 2, *range(N - 13, N)}


def test_oracle_has_the_largest_logits(inputs, lists):
    best = np.argsort(-exact_logits(*inputs[:2])[0, :, 3 : N - 5], axis=-1)[:, :8] + 3
    for row, others in zip(np.asarray(lists["oracle"].idx)[0], best, strict=True):
        assert set(row) == {0, 1, 2, *range(N - 5, N), *others}


@pytest.mark.parametrize("mass", [1e-6, 0.6])
def test_top_p_takes_the_fewest_tokens_that_reach_the_mass(mass, inputs, indexes):
    q, k, _ = inputs
    selector = OracleTopP(mass=mass)
    found = select(selector, indexes["oracle"], q, k, FULL, LAST, (3, 5, N))
    inner = scipy.special.softmax(exact_logits(q, k)[..., 3 : N - 5], axis=-1)
    for b, h in np.ndindex(B, H):
        order = np.argsort(-inner[b, h])
        count = 1 + int((np.cumsum(inner[b, h][order]) < mass).sum())
        named = set(np.asarray(found.idx[b, h])[np.asarray(found.valid[b, h])])
        assert named == {0, 1, 2, *range(N - 5, N), *(order[:count] + 3)}


@jax.jit
def quest_pages(q, k, v):
    """Index and page bounds of each dtype; of pages of one slot last."""
    selectors = [*(Quest(page_size=5, dtype=dtype) for dtype in QUEST_DTYPES), Quest(page_size=1, dtype="float32")]
    indexes = [selector.build(k, v, FULL) for selector in selectors]
    return [(index, selector.page_scores(index, q)) for index, selector in zip(indexes, selectors, strict=True)]


QUEST_DTYPES = ("float16", "bfloat16", "float32")


def test_quest_bounds_every_logit_of_a_page(inputs):
    q, k, _ = inputs
    logits, keys = exact_logits(q, k) * np.sqrt(D), np.asarray(k, np.float64)
    found = quest_pages(*inputs)
    for (index, bounds), unit in zip(found[:3], (2**-10, 2**-7, 0), strict=True):
        bounds = np.asarray(bounds).reshape(B, H, -1)
        low, high = (np.asarray(index.slots[name]).astype(np.float64) for name in ("low", "high"))
        for page in range(8):
            of_page = slice(page * 5, page * 5 + 5)
            # The bound is summed in float32.
            assert (bounds[..., page] >= logits[..., of_page].max(axis=-1) - 1e-5).all()
            least, most = keys[:, :, of_page].min(axis=2), keys[:, :, of_page].max(axis=2)
            assert (low[:, :, page] <= least).all()
            assert (high[:, :, page] >= most).all()
            # And no wider than one unit in the last place.
            assert (least - low[:, :, page] <= unit * np.abs(least) + 1e-6).all()
            assert (high[:, :, page] - most <= unit * np.abs(most) + 1e-6).all()
    ones = np.asarray(found[3][1]).reshape(B, H, N)
    np.testing.assert_allclose(ones, logits, rtol=1e-4, atol=1e-5)


def test_double_sparsity_scores_a_few_coordinates(inputs, scores):
    q, k, _ = inputs
    found = np.asarray(scores["double_sparsity"])
    for b, h, j in np.ndindex(B, K, J):
        few_k, few_q = np.asarray(k[b, h])[:, CHANNELS[h]], np.asarray(q[b, h * J + j])[CHANNELS[h]]
        step = (few_k.max(axis=-1) - few_k.min(axis=-1)) / 15
        # Half a step in each coordinate, and the rounding of a float16 scale and minimum.
        room = (0.5 * step + 0.004) * np.abs(few_q).sum() / 2
        assert (np.abs(found[b, h, j] - few_k @ few_q / 2) <= room).all()
    importance = np.abs(np.asarray(q)).reshape(B, K, J, D).sum(axis=(0, 2)) * np.abs(np.asarray(k)).sum(axis=(0, 2))
    chosen = heavy_channels(q[:, :, None], k, 3)
    np.testing.assert_array_equal(chosen, np.argsort(-importance, axis=-1)[:, :3])


def test_hash_attention_counts_agreeing_signs(inputs, scores):
    q, k, _ = inputs
    found = scores["hash_attention"]
    of_q = np.where(np.asarray(hash_map(MAPS["query"], q[:, :, None]))[:, :, 0] >= 0, 1, -1).reshape(B, K, J, 1, 32)
    of_k = np.where(np.asarray(hash_map(MAPS["key"], k)) >= 0, 1, -1)[:, :, None]
    np.testing.assert_array_equal(found, (of_q * of_k).sum(axis=-1))
    with pytest.raises(ValueError, match="mlp has 12 outputs; allowed are 8, 16 and 32 bits"):
        hash_codes(MAPS["key"][:1], k)


def test_training_makes_codes_that_find_top_keys():
    """Keys in eight clusters around orthogonal directions: the top keys of a query are those of its cluster.

    A random choice finds an eighth of them; the queries are not those of the training.
    """
    rng = np.random.default_rng(5)
    keys = np.repeat(np.eye(8)[None, None], 4, axis=2) * 3 + 0.3 * rng.standard_normal((1, 1, 32, 8))
    queries = np.repeat(np.eye(8)[None, None], 16, axis=2) * 3 + 0.3 * rng.standard_normal((1, 1, 128, 8))
    learning, asking = (queries[:, :, part::2].astype(np.float32) for part in (0, 1))
    keys, learning = (jnp.asarray(x, jnp.float32) for x in (keys, learning))
    options = {"top": 4, "bits": 8, "hidden": (16,), "learning_rate": 0.01}
    trained = train_hash_attention(jax.random.key(0), learning, keys, steps=150, batch=16, **options)
    best = np.argsort(-(asking[0, 0] @ np.asarray(keys)[0, 0].T), axis=-1)[:, :4]

    def recall(maps):
        signs = [
            np.where(np.asarray(hash_map(maps[n], jnp.asarray(x)))[0, 0] >= 0, 1, -1)
            for n, x in (("query", asking), ("key", keys))
        ]
        found = np.argsort(-(signs[0] @ signs[1].T), axis=-1, kind="stable")[:, :4]
        return np.mean([len(set(a) & set(b)) / 4 for a, b in zip(found, best, strict=True)])

    assert np.asarray(trained.losses)[-10:].mean() < 0.5 * np.asarray(trained.losses)[:3].mean()
    assert recall(trained.params) > 0.8


def test_product_codes_score_the_decoded_keys(inputs, indexes, scores):
    q, k, _ = inputs
    index = indexes["pq_cache"]
    books, codes = np.asarray(index.fixed["codebook"]), np.asarray(index.slots["codes"])
    assert books.shape == (B, K, 2, 8, D // 2)
    found = np.asarray(scores["pq_cache"])
    for b, h in np.ndindex(B, K):
        decoded = np.concatenate([books[b, h, g][codes[b, h, g]] for g in range(2)], axis=-1)
        np.testing.assert_allclose(
            found[b, h], np.asarray(q[b]).reshape(K, J, D)[h] @ decoded.T, rtol=1e-5, atol=1e-5
        )
        for g, part in enumerate(np.split(np.asarray(k[b, h]), 2, axis=-1)):
            nearest = ((part[:, None] - books[b, h, g]) ** 2).sum(axis=-1).argmin(axis=-1)
            np.testing.assert_array_equal(codes[b, h, g], nearest)
    # A later key is coded with the same books.
    selector, first = SELECTORS["pq_cache"], jnp.asarray(np.asarray(k)[:, :, :1])
    later = append(selector, index, first, first, jnp.asarray(np.full((B, 1, 1), 20, np.int32)))
    np.testing.assert_array_equal(np.asarray(later.slots["codes"])[..., 20], codes[..., 0])


def test_product_codes_do_not_learn_from_empty_slots(inputs):
    k = np.asarray(inputs[1])
    far = jnp.asarray(np.where(GONE, np.float32(1e3), k))
    books = build_all(far, inputs[2], filled(EARLY, EARLY)[0])["pq_cache"].fixed["codebook"]
    assert np.abs(np.asarray(books)).max() <= np.abs(k[:, :, :EARLY]).max()


# sampling


def assert_unbiased(inputs, many):
    """Denominators and numerators of many selections ``[n, B, H, M]``, beside the exact ones.

    The mean lies within four standard errors at nearly all places: of a few hundred, one may lie outside.
    """
    q, k, v = inputs
    idx = np.asarray(many.idx)
    weights = np.asarray(many.weight, np.float64) * np.asarray(many.valid)
    every, rows = np.exp(exact_logits(q, k)), np.repeat(np.asarray(v, np.float64), J, axis=1)
    b, h = np.arange(B)[:, None, None], np.arange(H)[:, None]
    shares = weights * every[b, h, idx]
    above = np.einsum("cbhm,cbhmd->cbhd", shares, rows[b, h, idx])
    for found, exact in ((shares.sum(axis=-1), every.sum(axis=-1)), (above, np.einsum("bhn,bhnd->bhd", every, rows))):
        error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
        off = np.abs(found.mean(axis=0) - exact) > 4 * error
        assert off.sum() <= off.size // 128


PIGS = (MagicPig(tables=12, bits=2, matches=2), N), (MagicPig(tables=12, bits=2, matches=1), 6)


@jax.jit
def draws(q, k, v, indexes):
    """2,000 selections of each method that samples, with keys of their own."""

    def draw(key):
        found = {name: choose(SELECTORS[name], indexes[name], q, k, FULL, LAST, key=key) for name in indexes}
        for pig, heavy in PIGS:
            index = pig.build(k, v, FULL, key=key)
            found[f"pig_{pig.matches}"] = choose(pig, index, q, k, FULL, LAST, (1, 2, heavy), key=key)
        return found

    return jax.vmap(draw)(jax.random.split(KEY, 2000))


@pytest.fixture(scope="module")
def many(inputs, indexes):
    return draws(*inputs, {name: indexes[name] for name in ("random", "v_attention")})


@pytest.mark.parametrize("name", ["random", "v_attention"])
def test_samples_are_unbiased(name, inputs, many):
    """v_attention with epsilon 0 takes all draws that it has room for: half of ``heavy``, beside the best tokens."""
    assert len({tuple(row) for row in np.asarray(many[name].idx)[:, 0, 0]}) > 1900
    assert_unbiased(inputs, many[name])


@pytest.mark.parametrize("matches", [2, 1])
def test_magic_pig_is_unbiased_over_its_planes(matches, inputs, many):
    """With one match, there is room for 6 of the tokens that collide, and they are more."""
    if matches == 1:
        assert (np.asarray(many["pig_1"].valid).sum(axis=-1) == 9).mean() > 0.5
    assert_unbiased(inputs, many[f"pig_{matches}"])


def test_collision_probability_is_the_binomial_law():
    cosine = np.linspace(-1, 1, 9)
    once = (1 - np.arccos(cosine) / np.pi) ** 3
    for matches in (1, 2):
        expected = scipy.stats.binom.sf(matches - 1, 10, once)
        found = collision_probability(jnp.asarray(cosine, jnp.float32), 10, 3, matches)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_v_attention_budget_follows_its_formula():
    sigma, total, n, least = (jnp.asarray([x], jnp.float32) for x in (0.1, 40.0, 1000.0, 50.0))
    z = scipy.stats.norm.ppf(0.95)
    budget = functools.partial(sample_budget, sigma, total, n, least, delta=0.05)
    for epsilon in (0.4, 0.2):
        expected = np.ceil((z * 0.1 * 1000 / (epsilon * 40)) ** 2)
        np.testing.assert_allclose(budget(epsilon=epsilon), [expected])
    assert budget(epsilon=0.8) == 50  # not fewer than the draws that it comes from
    assert budget(epsilon=1e-6) == budget(epsilon=0) == 1000
    assert sample_budget(sigma * 0, total * 0, n, least, epsilon=0.1, delta=0.05) == 50


def test_v_attention_keeps_its_promise():
    """The denominator is too small, or too large, by more than epsilon in about a part delta of 500 trials each; half
    as many again is allowed. With both sides in the promise, this holds of the two together.

    A list with room for all tokens, no best ones, and keys whose weights vary little.
    """
    rng = np.random.default_rng(8)
    slots, epsilon, delta = 400, 0.1, 0.1
    q, k = rng.standard_normal((1, 1, 8)), rng.standard_normal((1, 1, slots, 8))
    q, k = (jnp.asarray(x, jnp.float32) for x in (0.8 * np.sqrt(8) * q / np.linalg.norm(q), k))
    logits = exact_logits(q, k)[0, 0]
    positions, now = jnp.asarray(np.arange(slots, dtype=np.int32)[None, None]), jnp.asarray([slots - 1], jnp.int32)
    index = OracleTopK().build(k, k, positions)
    options = {"top_share": 0, "base": 0.05, "epsilon": epsilon, "delta": delta}
    selectors = [VAttention(OracleTopK(), **options, sides=sides) for sides in (1, 2)]

    def draw(key):
        return [choose(selector, index, q, k, positions, now, (4, 4, slots), key=key) for selector in selectors]

    one, both = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 500))
    errors, used = [], []
    for many in (one, both):
        weights = (np.asarray(many.weight) * np.asarray(many.valid))[:, 0, 0]
        found = (weights * np.exp(logits[np.asarray(many.idx)[:, 0, 0]])).sum(axis=-1)
        errors.append(found / np.exp(logits).sum() - 1)
        used.append(np.asarray(many.valid)[:, 0, 0].sum(axis=-1))
    assert (errors[0] < -epsilon).mean() <= 1.5 * delta
    assert (errors[0] > epsilon).mean() <= 1.5 * delta
    assert (np.abs(errors[1]) > epsilon).mean() <= 1.5 * delta
    assert used[0].mean() < used[1].mean() < 0.75 * slots  # it reads less than all
    assert used[0].min() >= 8 + 20  # and never fewer than its base


def test_random_weights_can_be_left_out(inputs, indexes, lists):
    q, k, _ = inputs
    plain = select(UniformRandom(weighted=False), indexes["random"], q, k, *filled(N, 12))
    assert (np.asarray(plain.weight) == 1).all()
    np.testing.assert_allclose(np.asarray(lists["random"].weight)[0, :, 8:], (N - 8) / 8)
    # Where there are no more than ``heavy`` others, each counts once.
    np.testing.assert_allclose(np.asarray(lists["random"].weight)[1], 1)


def test_what_cannot_be_is_refused(inputs, indexes):
    q, k, v = inputs
    for make, message in (
        (lambda: OracleTopP(mass=0), r"mass is 0; it must lie in \(0, 1\]"),
        (lambda: Quest(page_size=0), "page_size is 0; it must be at least 1"),
        (lambda: DoubleSparsity(0), "channels is 0; it must be at least 1"),
        (lambda: DoubleSparsity(4, bits=9), "bits is 9; allowed are 1 to 8"),
        (lambda: DoubleSparsity(4).build(k, v, FULL), "learned is None; DoubleSparsity needs it for its channels"),
        (lambda: DoubleSparsity(3).build(k, v, FULL, learned=CHANNELS), r"channels must be \(2, 3\)"),
        (lambda: heavy_channels(k, k, 17), r"count is 17; it must lie in 1..16"),
        (lambda: HashAttention().build(k, v, FULL), "learned is None; HashAttention needs it for its maps"),
        (lambda: train_hash_attention(KEY, k, k, top=N), "top is 37; it must lie in 1..36, with 37 keys"),
        (lambda: train_hash_attention(KEY, k, k, top=1, bits=9), "bits is 9; allowed are 8, 16 and 32"),
        (lambda: PQCache(groups=0), "groups is 0; it must be at least 1"),
        (lambda: PQCache(bits=17), "bits is 17; it must lie in 1..16"),
        (lambda: PQCache(groups=3).build(k, v, FULL, key=KEY), "groups is 3; it must divide the head's width, 16"),
        (lambda: PQCache().build(k, v, FULL), "key is None; PQCache needs it for the seeds of k-means"),
        (lambda: MagicPig(tables=1), "tables is 1; it must be at least matches, 2"),
        (lambda: VAttention(OracleTopK(), delta=0), r"delta is 0; it must lie in \(0, 0.5\]"),
        (lambda: VAttention(OracleTopK(), top_share=2), r"top_share is 2; it must lie in \[0, 1\]"),
        (lambda: VAttention(OracleTopK(), epsilon=-1), "epsilon is -1; it must be at least 0 and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    sizes = {"sinks": 0, "window": 0, "heavy": 4}
    for name, options, message in (
        ("random", {}, "key is None; UniformRandom needs it to draw tokens"),
        ("v_attention", {"key": KEY}, "rows is None; VAttention needs it for the weights"),
        ("magic_pig", {"key": KEY}, "rows is None; MagicPig needs it for the angles"),
        ("magic_pig", {"gqa": "max"}, "gqa is 'max'; allowed are 'head'"),
        ("oracle_p", {"gqa": "max"}, "gqa is 'max'; allowed are 'head', 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            SELECTORS[name].select(indexes[name], q, FULL, LAST, **sizes, **options)

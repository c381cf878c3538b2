"""PairConnect: its sums by a loop, attention as a case of it, hashing by hand, and what it must not see."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hashml.accounting import stored_bytes
from hashml.attention.pair_connect import (
    PairConnect,
    attention_pair_table,
    checked_ids,
    distance_bucket,
    hashed_pair_connect,
    pair_attention,
    pair_connect,
    pair_rows,
    pair_table_rows,
)
from hashml.attention.pair_connect_model import PairConnectLM
from hashml_kernels import bits
from hashml_kernels.hash_gather.geometry import BlockGeometry, block_bases, block_signs

WORDS, LENGTH, WINDOW = 5, 9, 4


def drawn(seed=0, *, words=WORDS, window=WINDOW, dilation=1, relative=True, width=3):
    """Tokens [2, T], a table of all pairs and factors that differ."""
    rng = np.random.default_rng(seed)
    rows = pair_table_rows(words, window=window, dilation=dilation, relative=relative)
    ids = rng.integers(0, words, (2, LENGTH)).astype(np.int32)
    return ids, *(x.astype(np.float32) for x in (rng.standard_normal((rows, width)), rng.standard_normal(window)))


def loop(ids, window, *, words=WORDS, dilation=1, relative=True):
    """``(batch, i, k, row)`` of every pair that there is, by the definition."""
    buckets = [0, 1, 2, 3, 3, 4, 4, 4, 4] + 8 * [5]
    for batch, i, k in itertools.product(range(len(ids)), range(ids.shape[1]), range(window)):
        j = i - k * dilation
        if j >= 0:
            rho = buckets[k * dilation] if relative else 0
            yield batch, i, k, (rho * words + int(ids[batch, i])) * words + int(ids[batch, j])


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# --- rows ---------------------------------------------------------------------------------------------


def test_distances_have_the_buckets_of_the_definition():
    expected = [0, 1, 2, 3, 3, 4, 4, 4, 4, *[5] * 8, *[6] * 16, 7]
    assert [distance_bucket(d) for d in range(34)] == expected
    # Buckets multiply the rows: they are part of the index.
    assert pair_table_rows(65, window=32) == 7 * 65**2
    assert pair_table_rows(65, window=32, relative=False) == 65**2
    assert pair_table_rows(65, window=3, dilation=4) == 5 * 65**2


@pytest.mark.parametrize(("relative", "dilation"), [(True, 1), (False, 1), (True, 3)])
def test_rows_are_those_of_a_loop(relative, dilation):
    ids = drawn()[0]
    how = {"vocabulary": WORDS, "window": WINDOW, "dilation": dilation, "relative": relative}
    found = pair_rows(ids, **how)
    seen = np.zeros(found.valid.shape, bool)
    for batch, i, k, row in loop(ids, WINDOW, dilation=dilation, relative=relative):
        assert found.rows[batch, i, k] == row
        seen[i, k] = True
    np.testing.assert_array_equal(found.valid, seen)
    tail = pair_rows(ids, **how, last=2)
    np.testing.assert_array_equal(tail.rows, found.rows[:, -2:])
    np.testing.assert_array_equal(tail.valid, found.valid[-2:])


@pytest.mark.parametrize("words", [WORDS, 100_000])
def test_numpy_and_jax_hash_alike_also_beyond_32_bits(words):
    """Rows in Python's integers, and slots and signs from NumPy and from a compiled program."""
    ids = np.random.default_rng(1).integers(words - 5, words, (2, LENGTH)).astype(np.int32)
    how = {"vocabulary": words, "window": 20}
    geometry = BlockGeometry(2**18 * 8, 8, 8, seed=3, sign="block", align=8)

    def hashed(ids):
        rows = pair_rows(ids, **how).rows
        return rows, block_bases(geometry, rows, np.uint32(0)), block_signs(geometry, rows, np.uint32(0))

    host, device = hashed(ids), jax.jit(hashed)(ids)
    for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        assert isinstance(one, np.ndarray)
        assert one.dtype == np.uint32
        np.testing.assert_array_equal(one, other)
    rows = host[0]
    whole = rows if isinstance(rows, np.ndarray) else rows.lo.astype(object) + rows.hi.astype(object) * 2**32
    assert isinstance(rows, bits.Limbs) == (words > 2**16)
    for batch, i, k, row in itertools.islice(loop(ids[:, :9], 9, words=words), 40):
        assert whole[batch, i, k] == row


# --- sums ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    """Sums, and the gradients of ``sum(z * g)``."""

    @functools.partial(jax.jit, static_argnames=("dilation", "relative"))
    def run(table, alpha, ids, g, dilation=1, relative=True):
        def value(table, alpha):
            z = pair_connect(table, ids, alpha, vocabulary=WORDS, dilation=dilation, relative=relative)
            return jnp.sum(z * g), z

        return jax.grad(value, argnums=(0, 1), has_aux=True)(table, alpha)

    return run


@pytest.mark.parametrize(("dilation", "relative"), [(1, True), (2, False)])
def test_sums_and_gradients_are_those_of_a_loop_and_unused_rows_get_none(exact, dilation, relative):
    ids, table, alpha = drawn(dilation=dilation, relative=relative)
    ids = np.minimum(ids, 3)  # the last word is in no pair
    g = np.random.default_rng(2).standard_normal((2, LENGTH, 3)).astype(np.float32)
    gradients, z = exact(table, alpha, ids, g, dilation=dilation, relative=relative)
    expected, by_table, by_alpha = np.zeros_like(g), np.zeros_like(table), np.zeros_like(alpha)
    used = np.zeros(len(table), bool)
    for batch, i, k, row in loop(ids, WINDOW, dilation=dilation, relative=relative):
        expected[batch, i] += alpha[k] * table[row] / np.sqrt(WINDOW)
        by_table[row] += alpha[k] * g[batch, i] / np.sqrt(WINDOW)
        by_alpha[k] += table[row] @ g[batch, i] / np.sqrt(WINDOW)
        used[row] = True
    close(z, expected)
    close(gradients[0], by_table)
    close(gradients[1], by_alpha)
    assert 0 < used.sum() < used.size
    assert not np.asarray(gradients[0])[~used].any()


def test_no_token_sees_a_later_one(exact):
    ids, table, alpha = drawn(3)
    changed = ids.copy()
    changed[:, 5] = (changed[:, 5] + 1) % WORDS
    g = np.zeros((2, LENGTH, 3), np.float32)
    first, second = (np.asarray(exact(table, alpha, x, g)[1]) for x in (ids, changed))
    np.testing.assert_array_equal(first[:, :5], second[:, :5])
    moved = np.abs(first - second).max(axis=(0, 2)) > 1e-4
    assert moved.tolist() == [False] * 5 + [True] * WINDOW  # 5 .. 8, the window of token 8 being 5 .. 8


def test_a_window_as_long_as_the_sequence_sees_all_of_it():
    rows = pair_table_rows(WORDS, window=2 * LENGTH)
    rng = np.random.default_rng(4)
    ids, table = drawn()[0], rng.standard_normal((rows, 3)).astype(np.float32)
    alpha = rng.standard_normal(2 * LENGTH).astype(np.float32)
    wide = pair_connect(table, ids, alpha, vocabulary=WORDS)
    # A window of T has fewer buckets, and sums are divided by the root of it.
    fewer = table[: pair_table_rows(WORDS, window=LENGTH)]
    close(wide * np.sqrt(2), pair_connect(fewer, ids, alpha[:LENGTH], vocabulary=WORDS))
    windowed = PairConnect(WORDS, 6, pair_features=4, window=LENGTH)
    full = PairConnect(WORDS, 6, pair_features=4, window=None, max_length=LENGTH)
    variables = jax.jit(windowed.init)(jax.random.key(0), ids)
    close(*(jax.jit(module.apply)(variables, ids) for module in (windowed, full)))


# --- attention is a case of it ------------------------------------------------------------------------


def test_a_table_filled_with_an_attention_head_is_that_head():
    words, length, width = 16, 20, 4
    rng = np.random.default_rng(5)
    queries, keys, values = (rng.standard_normal((words, n)) for n in (width, width, 6))
    ids = rng.integers(0, words, (2, length))
    logits = np.einsum("btd,bsd->bts", queries[ids], keys[ids]) / np.sqrt(width)
    weights = np.where(np.tril(np.ones((length, length), bool)), np.exp(logits), 0)
    expected = weights @ values[ids] / weights.sum(axis=-1, keepdims=True)
    table = attention_pair_table(*(x.astype(np.float32) for x in (queries, keys, values)))
    attend = jax.jit(functools.partial(pair_attention, vocabulary=words, relative=False))
    found = attend(table, ids, np.zeros(length, np.float32))
    close(found, expected, 1e-5)
    # A bias of distance and a window: weights of the last 3 tokens, the nearest e times as heavy.
    near = np.array([1, 0, 0], np.float32)
    found = np.asarray(attend(table, ids, near))
    for t in (0, 1, 11):
        seen = np.arange(max(t - 2, 0), t + 1)
        factors = np.exp(logits[1, t, seen] + (seen == t))
        close(found[1, t], factors @ values[ids[1, seen]] / factors.sum())


def test_a_table_holds_what_no_head_of_that_width_can():
    """Logits of a head have its rank, a softmax being blind to a constant a row; the table's are free."""
    words, width = 16, 4
    rng = np.random.default_rng(6)
    head = attention_pair_table(*(rng.standard_normal((words, width)).astype(np.float32) for _ in range(3)))
    free = rng.standard_normal((words**2, width + 1)).astype(np.float32)
    ranks = [
        np.linalg.matrix_rank(x[:, -1].reshape(words, words) @ (np.eye(words) - 1 / words), tol=1e-4)
        for x in (np.asarray(head), free)
    ]
    assert ranks == [width, words - 1]
    ids = np.array([[3, 7]])
    found = pair_attention(free, ids, np.zeros(2, np.float32), vocabulary=words, relative=False)[0, 1]
    one, other = free[7 * words + 7], free[7 * words + 3]
    factors = np.exp([one[-1], other[-1]])
    close(found, factors @ np.stack([one, other])[:, :-1] / factors.sum())


# --- hashing ------------------------------------------------------------------------------------------


def slots(rows, budget, width, seed):
    """First weight and sign of whole rows, by the arithmetic of the kernel in NumPy."""
    geometry = BlockGeometry(budget, width, width, seed, "block", align=width)
    return (
        block_bases(geometry, rows, np.uint32(0)).astype(int),
        1.0 - 2 * block_signs(geometry, rows, np.uint32(0)).astype(int),
    )


def test_where_no_rows_meet_hashing_changes_nothing():
    ids, table, alpha = drawn(7, window=3, relative=False)
    rows, width = np.arange(len(table), dtype=np.uint32), table.shape[1]
    budget = 4096 * width
    seed = next(s for s in range(50) if len(set(slots(rows, budget, width, s)[0].tolist())) == len(rows))
    starts, signs = slots(rows, budget, width, seed)
    memory = np.zeros(budget, np.float32)
    memory[starts[:, None] + np.arange(width)] = table * signs[:, None]
    run = jax.jit(functools.partial(hashed_pair_connect, vocabulary=WORDS, features=width, relative=False, seed=seed))
    close(run(memory, ids, alpha), pair_connect(table, ids, alpha, vocabulary=WORDS, relative=False))
    # Only the slots that were looked up get a gradient.
    gradient = np.asarray(jax.grad(lambda memory: jnp.sum(run(memory, ids, alpha) ** 2))(memory))
    used = {row for *_, row in loop(ids, 3, relative=False)}
    inside = {int(starts[row]) + t for row in used for t in range(width)}
    assert set(np.flatnonzero(gradient).tolist()) == inside


def test_signed_collisions_are_zero_on_average_and_unsigned_ones_are_not():
    """Every pair writes its row where it hashes to; what a token reads is then right but for collisions."""
    ids, table, alpha = drawn(8, relative=False)
    table, alpha = np.abs(table), np.abs(alpha)
    rows, width, budget = np.arange(len(table), dtype=np.uint32), 3, 8 * 3

    def written(seed):
        """The memory without signs and with them, what its reader adds up, and the signs of the rows."""
        starts, signs = slots(rows, budget, width, seed)
        memories = np.zeros((2, budget))
        for memory, factors in zip(memories, (np.ones(len(rows)), signs), strict=True):
            np.add.at(memory, starts[:, None] + np.arange(width), table * factors[:, None])
        return memories, starts, signs

    at = pair_rows(ids[:1], vocabulary=WORDS, window=WINDOW, relative=False, last=1).rows[0, 0]

    def errors(seed):
        memories, starts, signs = written(seed)
        read = memories[:, starts[at][:, None] + np.arange(width)] * np.stack([np.ones(WINDOW), signs[at]])[..., None]
        return np.einsum("w,swp->sp", alpha, read - table[at]) / np.sqrt(WINDOW)

    right = pair_connect(table, ids[:1], alpha, vocabulary=WORDS, relative=False, last=1)[0, 0]
    for signed in (False, True):  # the function reads what is said here
        memory = written(11)[0][int(signed)].astype(np.float32)
        how = {"vocabulary": WORDS, "features": width, "relative": False, "seed": 11, "signed": signed, "last": 1}
        found = jax.jit(functools.partial(hashed_pair_connect, **how))(memory, ids[:1], alpha)[0, 0]
        close(np.asarray(found) - np.asarray(right), errors(11)[int(signed)], 1e-4)
    found = np.stack([errors(seed) for seed in range(600)])
    score = found.mean(axis=0) / (found.std(axis=0, ddof=1) / np.sqrt(len(found)))
    assert np.abs(score[0]).min() > 4
    assert np.abs(score[1]).max() < 4


# --- the modules --------------------------------------------------------------------------------------


def test_the_module_hashes_what_is_too_large_and_concatenates_its_heads():
    ids = drawn()[0]

    def shapes(**how: Any):
        sizes: dict[str, Any] = {"vocabulary": WORDS, "features": 6}
        module = PairConnect(**(sizes | how))
        return jax.tree.map(jnp.shape, jax.eval_shape(module.init, jax.random.key(0), ids)["params"])

    out = {"kernel": (64, 6)}
    assert shapes() == {"table": (1, 7 * WORDS**2, 64), "alpha": (1, 32), "out": out}
    assert shapes(vocabulary=400) == {"memory": (1, 2**18 * 64), "alpha": (1, 32), "out": out}  # 7 * 400**2 > 2**20
    assert shapes(vocabulary=400, relative=False)["table"] == (1, 400**2, 64)
    assert shapes(heads=2, normalised=True) == {"table": (2, 7 * WORDS**2, 33), "bias": (2, 32), "out": out}
    heads = PairConnect(WORDS, 6, pair_features=8, window=WINDOW, heads=2, budget=64, seed=5)
    variables = jax.jit(heads.init)(jax.random.key(0), ids)
    params = variables["params"]
    alpha = np.array([[1, 2, 3, 4], [4, -3, 2, 1]], np.float32)
    z = [
        hashed_pair_connect(params["memory"][h], ids, alpha[h], vocabulary=WORDS, features=4, seed=5 + h)
        for h in range(2)
    ]
    expected = np.concatenate(z, axis=-1) @ np.asarray(params["out"]["kernel"])
    close(jax.jit(heads.apply)({"params": {**params, "alpha": alpha}}, ids), expected)
    assert stored_bytes(params) == 4 * (64 + 2 * WINDOW + 8 * 6)


def test_blocks_smaller_than_a_row_lie_apart():
    ids, _, alpha = drawn()
    memory = np.arange(50, dtype=np.float32)
    how = {"vocabulary": WORDS, "features": 4, "seed": 1, "block_size": 2, "signed": False}
    found = hashed_pair_connect(memory, ids, alpha, **how)
    rows = pair_rows(ids, vocabulary=WORDS, window=WINDOW).rows
    expected = np.zeros((2, LENGTH, 4))
    geometry = BlockGeometry(50, 4, 2, 1)
    for batch, i, k, row in loop(ids, WINDOW):
        assert rows[batch, i, k] == row
        starts = block_bases(geometry, np.array([row], np.uint32), np.arange(2, dtype=np.uint32)).astype(int)
        expected[batch, i] += alpha[k] / 2 * ((starts[:, None] + np.arange(2)) % 50).ravel()
    close(found, expected, 1e-4)


def test_the_model_knows_of_other_tokens_by_its_pairs_alone_and_decodes_from_the_last_ids():
    ids = np.random.default_rng(9).integers(0, WORDS, (2, 12)).astype(np.int32)
    layer = functools.partial(
        PairConnect, WORDS, 8, pair_features=4, window=3, table_init=jax.nn.initializers.normal(1)
    )
    model = PairConnectLM(WORDS, 8, pairs=(layer(), layer(dilation=2)))
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    apply = jax.jit(model.apply, static_argnames="last")
    logits = np.asarray(apply(variables, ids))
    assert logits.shape == (2, 12, WORDS)
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % WORDS
    moved = np.abs(np.asarray(apply(variables, changed)) - logits).max(axis=(0, 2)) > 1e-5
    # Rows are of ids: the second layer does not read what the first one wrote, and reaches 2 * 2 tokens back.
    assert moved.tolist() == [4 <= t <= 8 and t != 7 for t in range(12)]
    close(apply(variables, ids[:, -5:], last=1), logits[:, -1:])
    alone = PairConnectLM(WORDS, 8)
    variables = jax.jit(alone.init)(jax.random.key(0), ids)
    apply = jax.jit(alone.apply)
    by_word = np.asarray(apply(variables, np.arange(10).reshape(2, 5) % WORDS))[0]
    close(apply(variables, ids), by_word[ids])


def test_adagrad_leaves_unused_rows_and_adam_does_not(exact):
    """Two steps, the second with other tokens: what the first step used stays where it was."""
    ids, table, alpha = drawn(10)
    other = np.full_like(ids, WORDS - 1)
    g = np.ones((2, LENGTH, 3), np.float32)
    gradients = [exact(table, alpha, x, g)[0][0] for x in (np.minimum(ids, 2), other)]
    idle = np.asarray((gradients[0] != 0).all(axis=1) & (gradients[1] == 0).all(axis=1))
    assert idle.any()
    for optimizer, stays in ((optax.adagrad(0.1), True), (optax.adam(0.1), False)):
        state = optimizer.init(jnp.asarray(table))
        _, state = optimizer.update(gradients[0], state)
        second, state = optimizer.update(gradients[1], state)
        assert (not np.asarray(second)[idle].any()) == stays
        # What is stored beside the table: one number a weight, or two.
        assert (stored_bytes(state) < 1.5 * table.nbytes) == stays


# --- bad input ----------------------------------------------------------------------------------------


def test_traced_ids_outside_the_vocabulary_make_nan_of_all_who_see_them():
    ids, table, alpha = drawn()
    calls = {
        "exact": lambda ids: pair_connect(table, ids, alpha, vocabulary=WORDS),
        "hashed": lambda ids: hashed_pair_connect(table.ravel(), ids, alpha, vocabulary=WORDS, features=3),
        "normalised": lambda ids: pair_attention(table, ids, alpha, vocabulary=WORDS),
    }
    for wrong, (name, call) in itertools.product((WORDS, -1), calls.items()):
        bad = ids.copy()
        bad[1, 2] = wrong
        lost = np.isnan(np.asarray(jax.jit(call)(bad)))
        for t in range(LENGTH):
            assert (lost[1, t] == (2 <= t < 2 + WINDOW)).all(), name
        assert not lost[0].any()
    with pytest.raises(ValueError, match=f"ids lie in 0..{WORDS + 2}; they must lie in 0..4"):
        calls["exact"](np.arange(WORDS + 3)[None])


IDS = np.zeros((1, 6), np.int32)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window": 0}, "window is 0; it must be"),
        ({"dilation": 0}, "dilation is 0"),
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"vocabulary": 2**30}, "vocabulary is 1073741824, of 7 buckets of distance; their product"),
        ({"last": 7}, "last is 7; it must lie in 0..6"),
        ({"last": -1}, "last is -1"),
        ({"ids": np.array([0, 5])}, r"ids lie in 0..5; they must lie in 0..4"),
    ],
)
def test_bad_rows_are_refused_by_name(how, message):
    how = {"ids": IDS, "vocabulary": WORDS, "window": 32} | how
    with pytest.raises(ValueError, match=message):
        pair_rows(how.pop("ids"), **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 65}, "memory has 65 weights; whole rows need a multiple of features = 4"),
        ({"budget": 3}, "memory has 3 weights"),
        ({"budget": 33, "heads": 2}, "budget is 33; heads = 2 must divide it"),
        ({"budget": 64, "block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"budget": 2, "block_size": 4}, "budget is 2; it must be at least one block"),
        ({"budget": 64, "normalised": True}, "normalised is True and the budget 64"),
        ({"heads": 3}, "heads is 3; it must divide pair_features = 4"),
        ({"window": 0}, "window is 0"),
        ({"window": None}, "give exactly one of window"),
        ({"max_length": 6}, "give exactly one of window"),
        ({"window": None, "max_length": 5}, "ids has 6 tokens; max_length is 5"),
        ({"window": None, "max_length": 0}, "max_length is 0"),
        ({"pair_features": 0}, "pair_features is 0"),
    ],
)
def test_bad_modules_are_refused_by_name(how, message):
    module = PairConnect(**({"vocabulary": WORDS, "features": 8, "pair_features": 4, "window": 3} | how))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(module.init, jax.random.key(0), IDS)


def test_other_bad_input_is_refused_by_name():
    ids, table, alpha = drawn()
    with pytest.raises(ValueError, match="table has 99 rows; vocabulary, window and relative make 100"):
        pair_connect(table[:99], ids, alpha, vocabulary=WORDS)
    with pytest.raises(ValueError, match="a table of every pair has below 2"):
        pair_connect(table, ids, alpha, vocabulary=10**5)
    with pytest.raises(ValueError, match="table has 1 columns"):
        pair_attention(table[:, :1], ids, alpha, vocabulary=WORDS)
    with pytest.raises(ValueError, match="queries has 4 words, keys 4 and values 5"):
        attention_pair_table(table[:4], table[:4], table[:5])
    with pytest.raises(TypeError, match="ids has dtype float64; it must be an integer type"):
        checked_ids(np.zeros(3), WORDS)
    with pytest.raises(ValueError, match="ids is a scalar; tokens need an axis"):
        checked_ids(np.int32(3), WORDS)
    with pytest.raises(ValueError, match="distance is -1"):
        distance_bucket(-1)
    layer = PairConnect(WORDS, 8, window=3)
    for model, message in (
        (PairConnectLM(WORDS, 8, pairs=(layer,), blocks=0), "pairs has 1 layers; there are 0 blocks"),
        (
            PairConnectLM(WORDS, 4, pairs=(layer,)),
            "pairs holds vocabulary 5 and features 8; they must be the model's",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), IDS)

"""Sparse decoding: exact over a full list in any order, weights as multiplicities, lists without a token twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import AbstractDevice, AbstractMesh

from hashml.attention.selector_contract import (
    check_gqa,
    combine,
    disjoint,
    over_group,
    put,
    put_codes,
    rest,
    sample,
    slot_positions,
    union_size,
)
from hashml.attention.sparse_decode import (
    MASKED,
    Partial,
    Selection,
    finish,
    gather_rows,
    merge_partials,
    sparse_decode,
    sparse_partial,
)
from hashml_kernels import sparse_decode as kernel

B, H, K, N, D, V = 2, 4, 2, 23, 8, 5

decode = jax.jit(sparse_decode, static_argnames=("scale", "block"))
partial = jax.jit(sparse_partial, static_argnames=("scale", "block"))
combined = jax.jit(combine, static_argnames=("sinks", "window", "heavy"))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = (B, H, D), (B, K, N, D), (B, K, N, V)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def naive(q, k, v, idx, valid, weight, scale=None):
    """The sums, entry by entry, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    out = np.zeros((q.shape[0], q.shape[1], v.shape[-1]))
    for b, h in np.ndindex(q.shape[:2]):
        of_list, of_key = h // (q.shape[1] // idx.shape[1]), h // (q.shape[1] // k.shape[1])
        above, below = 0.0, 0.0
        top = scale * (k[b, of_key] @ q[b, h]).max()
        for i, counts, w in zip(idx[b, of_list], valid[b, of_list], weight[b, of_list], strict=True):
            if counts and w > 0 and 0 <= i < k.shape[2]:
                e = w * np.exp(scale * q[b, h] @ k[b, of_key, i] - top)
                above, below = above + e * v[b, of_key, i], below + e
        out[b, h] = above / below if below else 0.0
    return out


def unchecked(*given, **named):
    """The function without jaxtyping, whose own errors would come first."""
    return getattr(sparse_decode, "__wrapped__", sparse_decode)(*given, **named)


def dense(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    return np.einsum("bhn,bhnv->bhv", scipy.special.softmax(np.einsum("bhd,bhnd->bhn", q, k) / np.sqrt(D), -1), v)


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def as_selection(idx, valid=None, weight=None):
    valid = np.ones(idx.shape, bool) if valid is None else valid
    weight = np.ones(idx.shape) if weight is None else weight
    return Selection(jnp.asarray(idx, jnp.int32), jnp.asarray(valid), jnp.asarray(weight, jnp.float32))


@pytest.mark.parametrize(("lists", "block"), [(K, 256), (H, 7)])
def test_a_full_list_is_dense_attention_in_any_order(inputs, lists, block):
    rng = np.random.default_rng(1)
    idx = rng.permuted(np.broadcast_to(np.arange(N), (B, lists, N)), axis=-1)
    close(decode(*inputs, *as_selection(idx), block=block), dense(*inputs))


@pytest.mark.parametrize(("lists", "block"), [(K, 4), (H, 256)])
def test_weighted_lists_with_padding_and_indices_out_of_range(inputs, lists, block):
    rng = np.random.default_rng(2)
    idx = rng.integers(-2, N + 2, (B, lists, 9))
    valid, weight = rng.random(idx.shape) < 0.7, rng.choice([0.0, 0.5, 1.0, 3.0], idx.shape)
    found = decode(*inputs, *as_selection(idx, valid, weight), block=block, scale=0.7)
    q, k, v = inputs
    close(found, naive(q, k, v, idx, valid, weight, scale=0.7))


def test_a_weight_is_a_multiplicity(inputs):
    once = as_selection(np.full((B, H, 2), [4, 9]), weight=np.full((B, H, 2), [1.0, 3.0]))
    thrice = as_selection(np.full((B, H, 4), [4, 9, 9, 9]))
    close(decode(*inputs, *once), decode(*inputs, *thrice))


def test_an_empty_list_gives_zeros_and_merges_as_nothing(inputs):
    some = as_selection(np.full((B, H, 3), [1, 2, 3]))
    nothing = some._replace(valid=jnp.zeros((B, H, 3), bool))
    np.testing.assert_array_equal(decode(*inputs, *nothing), np.zeros((B, H, V)))
    empty, full = partial(*inputs, *nothing), partial(*inputs, *some)
    np.testing.assert_array_equal(empty.top, np.full((B, H), np.float32(MASKED)))
    for merged in (merge_partials(empty, full), merge_partials(full, empty)):
        close(finish(merged), decode(*inputs, *some), 1e-6)
    np.testing.assert_array_equal(finish(merge_partials(empty, empty)), np.zeros((B, H, V)))
    no_entry = Selection(*(leaf[:, :, :0] for leaf in some))
    np.testing.assert_array_equal(decode(*inputs, *no_entry), np.zeros((B, H, V)))


def test_merging_does_not_know_an_order(inputs):
    bounds = [(0, 5), (5, 6), (6, 20), (20, N)]
    lists = [np.broadcast_to(np.arange(*bound), (B, H, bound[1] - bound[0])) for bound in bounds]
    parts = [partial(*inputs, *as_selection(idx)) for idx in lists]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        close(finish(merge_partials(*(parts[i] for i in order))), dense(*inputs), 1e-6)
    nested = merge_partials(merge_partials(parts[2], parts[0]), merge_partials(parts[3], parts[1]))
    close(finish(nested), dense(*inputs), 1e-6)


def test_large_logits_and_rubbish_behind_the_mask_stay_finite(inputs):
    q, k, v = inputs
    idx = np.broadcast_to(np.arange(N), (B, K, N))
    some = as_selection(idx, idx < N - 1)
    rubbish = jnp.where(jnp.arange(N)[:, None] == N - 1, jnp.nan, 1.0)
    found = decode(q * 1e3, k * rubbish, v * rubbish, *some)
    # At a factor of 1,000 the largest logit takes all.
    logits = np.einsum("bhd,bhnd->bhn", q, np.repeat(k, 2, axis=1))[:, :, : N - 1]
    best = np.take_along_axis(np.repeat(v, 2, axis=1), logits.argmax(axis=-1)[..., None, None], axis=2)[:, :, 0]
    gap = np.diff(np.sort(logits, axis=-1)[..., -2:]).min()
    assert gap * 1e3 / np.sqrt(D) > 20
    close(found, best)


def test_half_precision_sums_in_float32(inputs):
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs)
    some = as_selection(np.broadcast_to(np.arange(N), (B, K, N)))
    found = decode(q, k, v, *some)
    assert found.dtype == jnp.bfloat16
    assert partial(q, k, v, *some).value.dtype == jnp.float32
    close(finish(partial(q, k, v, *some)), dense(*(np.asarray(x, np.float32) for x in (q, k, v))), 1e-5)


def test_what_cannot_be_is_refused(inputs):
    q, k, v = inputs
    with pytest.raises(
        ValueError, match="idx has lists for 3 heads; with 4 query heads and 2 key heads, allowed are 2"
    ):
        sparse_decode(q, k, v, *as_selection(np.zeros((B, 3, 1))))
    with pytest.raises(ValueError, match="block is 0; it must be at least 1"):
        sparse_decode(q, k, v, *as_selection(np.zeros((B, K, 1))), block=0)
    with pytest.raises(ValueError, match="there must be at least one slot"):
        sparse_decode(q, k[:, :, :0], v[:, :, :0], *as_selection(np.zeros((B, K, 1))))
    with pytest.raises(ValueError, match="implementation is 'triton'; allowed are 'auto' and 'xla'"):
        unchecked(q, k, v, *as_selection(np.zeros((B, K, 1))), implementation="triton")
    with pytest.raises(ValueError, match="parts is empty"):
        merge_partials()


# the kernel


@functools.cache
def picked():
    """Entries out of range, others that are not valid, and weights."""
    idx = np.random.default_rng(7).integers(-2, N + 2, (B, K, 9))
    return as_selection(idx, idx % 3 > 0, 1.0 + idx % 2)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(("platform", "kind", "kernels"), [("cpu", "cpu", 0), ("cuda", "gpu", 1), ("tpu", "tpu", 0)])
def test_gpus_have_a_kernel(inputs, platform, kind, kernels):
    names = {"cpu": "cpu", "cuda": "NVIDIA H200", "tpu": "TPU v5 lite"}
    device = AbstractDevice(names[platform], 1 if kind == "tpu" else None, kind)
    chosen = picked()
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        for implementation, expected in (("auto", kernels), ("xla", 0)):
            traced = jax.jit(sparse_decode, static_argnames="implementation").trace(
                *inputs, *chosen, implementation=implementation
            )
            assert traced.lower(lowering_platforms=(platform,)).as_text().count("xla.gpu.triton") == expected


def test_the_kernel_means_the_same(inputs):
    found = jax.jit(functools.partial(kernel.sparse_decode, implementation="pallas_triton"))(*inputs, *picked())
    close(found, decode(*inputs, *picked()))


def test_that_gpus_have_a_kernel_changes_nothing_here(inputs):
    """Derivatives of both modes, and a batch of calls, on the platform of the tests."""

    def every(implementation, q, k, v):
        def total(q, k, v):
            return (sparse_decode(q, k, v, *picked(), implementation=implementation) ** 2).sum()

        batch = jax.vmap(total)(*(jnp.stack([x, 2 * x]) for x in (q, k, v)))
        return total(q, k, v), batch, jax.grad(total, (0, 1, 2))(q, k, v), jax.jvp(total, (q, k, v), (q, k, v))

    one, other = (jax.jit(functools.partial(every, name))(*inputs) for name in ("auto", "xla"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


# lists


@functools.cache
def scored(lists):
    return jnp.asarray(np.random.default_rng(3).standard_normal((B, lists, N)), jnp.float32)


@pytest.mark.parametrize("filled", [N, 14, 9, 3])
def test_sinks_window_and_heavy_share_no_token(filled):
    """9 are asked for; at 14 and more they are 2 + 3 + 4, below that sinks and window meet."""
    scores = scored(H)
    length = jnp.full(B, filled)
    sizes = {"sinks": 2, "window": 3, "heavy": 4}
    found = combined(scores, slot_positions(length, N), length - 1, **sizes)
    assert found.idx.shape == (B, H, 9)
    for b, h in np.ndindex(B, H):
        named = np.asarray(found.idx[b, h])[np.asarray(found.valid[b, h])]
        always = {i for i in range(filled) if i < 2 or i >= filled - 3}
        others = sorted(set(range(filled)) - always, key=lambda i: -scores[b, h, i])
        assert len(named) == len(set(named)) == min(9, filled)
        assert set(named) == always | set(others[: 9 - len(always)])


def test_positions_and_not_slots_say_who_is_seen():
    rng = np.random.default_rng(4)
    scores = scored(H)
    pos = np.stack([rng.permutation(N) for _ in range(B * K)]).reshape(B, K, N) - 6
    pos = np.where(pos < 0, -1, pos)
    now = np.array([11, 15])
    found = combined(scores, jnp.asarray(pos), jnp.asarray(now), sinks=2, window=3, heavy=4)
    for b, h in np.ndindex(B, H):
        own = pos[b, h // 2]
        seen = {i for i in range(N) if 0 <= own[i] <= now[b]}
        always = {i for i in seen if own[i] < 2 or own[i] > now[b] - 3}
        best = sorted(seen - always, key=lambda i: -scores[b, h, i])[:4]
        assert set(np.asarray(found.idx[b, h])[np.asarray(found.valid[b, h])]) == always | set(best)


def test_scores_that_are_no_numbers():
    positions, now = slot_positions(jnp.full(B, N), N), jnp.full(B, N - 1)
    scores = jnp.zeros((B, H, N)).at[:, :, 3].set(jnp.nan).at[:, :, 4].set(-jnp.inf)
    found = combined(scores, positions, now, sinks=0, window=0, heavy=N)
    named = [set(np.asarray(i)[np.asarray(v)]) for i, v in zip(found.idx[0], found.valid[0], strict=True)]
    assert all(names == set(range(N)) - {4} for names in named)
    assert (np.asarray(found.idx)[:, :, N - 2] == 3).all()


def test_disjoint_keeps_the_first_of_equals():
    first = as_selection(np.array([[[5, 2, 5, 7]]]), np.array([[[True, True, True, False]]]))
    second = as_selection(np.array([[[7, 2, 9, -1, N]]]), weight=np.full((1, 1, 5), 4.0))
    found = disjoint(first, second, N)
    np.testing.assert_array_equal(found.idx[0, 0], [5, 2, 5, 7, 7, 2, 9, -1, N])
    np.testing.assert_array_equal(found.valid[0, 0], [1, 1, 0, 0, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(found.weight[0, 0], [1, 1, 1, 1, 4, 4, 4, 4, 4])


def test_a_sample_is_uniform_and_without_replacement():
    allowed = jnp.arange(N) % 3 == 0
    population = int(allowed.sum())
    draws = 4000
    idx, valid, count = sample(jax.random.key(0), jnp.broadcast_to(allowed, (1, draws, N)), 5)
    assert np.asarray(valid).all()
    assert (np.asarray(count) == population).all()
    drawn = np.asarray(idx)[0]
    assert all(len(set(row)) == 5 for row in drawn)
    # Of all five entries, and of the first two alone.
    for part in (5, 2):
        hits = np.bincount(drawn[:, :part].ravel(), minlength=N)
        share = part / population
        error = np.sqrt(share * (1 - share) * draws)
        assert (hits[~np.asarray(allowed)] == 0).all()
        assert (np.abs(hits[np.asarray(allowed)] - share * draws) < 4 * error).all()
    short = sample(jax.random.key(0), allowed[None, None], N)
    assert short[1].sum() == population


def test_rest_and_union(inputs):
    positions, now = slot_positions(jnp.array([N, 4]), N), jnp.array([N - 1, 3])
    others = rest(positions, now, sinks=2, window=3, heads=H)
    np.testing.assert_array_equal(others.sum(axis=2)[:, 0], [N - 5, 0])
    lists = as_selection(np.array([[[0, 1, 2], [1, 2, 3], [4, 4, 4], [5, 5, 6]]]))
    np.testing.assert_array_equal(union_size(lists, K, N), [[4, 3]])
    rows = gather_rows(inputs[1][:1], lists.idx)
    np.testing.assert_array_equal(rows[0, 3, 2], inputs[1][0, 1, 6])


def test_a_group_shares_a_list_by_its_scores():
    scores = scored(H).reshape(B, K, 2, N)
    reference = np.asarray(scores)
    close(over_group(scores, "mean"), reference.mean(axis=2), 1e-6)
    close(over_group(scores, "max"), reference.max(axis=2), 1e-6)
    close(over_group(scores, "head"), reference.reshape(B, H, N), 0)
    with pytest.raises(ValueError, match="gqa is 'median'; allowed are 'head', 'mean', 'max', 'sum'"):
        check_gqa("median")


def test_rows_are_put_where_they_belong():
    at = jnp.array([[[0, -1, N, 6]], [[3, 2, 1, -7]]])
    rows = jnp.arange(1.0, 1 + B * K * 4 * 2).reshape(B, K, 4, 2)
    found = np.asarray(put(jnp.zeros((B, K, N, 2)), rows, at))
    expected = np.zeros((B, K, N, 2))
    for b, k, i in np.ndindex(B, K, 4):
        if 0 <= at[b, 0, i] < N:
            expected[b, k, at[b, 0, i]] = rows[b, k, i]
    np.testing.assert_array_equal(found, expected)
    codes = put_codes(jnp.zeros((B, K, 2, N)), rows, at)
    np.testing.assert_array_equal(codes, expected.swapaxes(2, 3))


def test_lists_that_cannot_be():
    scores, positions, now = scored(K), slot_positions(jnp.full(B, N), N), jnp.full(B, N - 1)
    with pytest.raises(ValueError, match="window is -1; it must not be negative"):
        combine(scores, positions, now, sinks=0, window=-1, heavy=1)
    with pytest.raises(
        ValueError, match="positions are of 4 heads; they must be of 1, or divide the 2 heads of lists"
    ):
        combine(scores, jnp.repeat(positions, 4, axis=1), now, sinks=0, window=0, heavy=1)
    with pytest.raises(ValueError, match=r"first has lists \(1, 1\) and second \(2, 2\)"):
        disjoint(as_selection(np.zeros((1, 1, 1))), as_selection(np.zeros((2, 2, 1))), N)


def test_partials_of_one_slot_have_the_logit_for_top(inputs):
    q, k, v = inputs
    found = partial(q, k, v, *as_selection(np.full((B, H, 1), 6), weight=np.full((B, H, 1), 2.0)))
    assert isinstance(found, Partial)
    logits = np.einsum("bhd,bhd->bh", q, np.repeat(k, 2, axis=1)[:, :, 6]) / np.sqrt(D)
    close(found.top, logits + np.log(2))
    close(found.mass, np.ones((B, H)))

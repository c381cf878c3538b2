"""Maps of many sizes that fold one another: consistent, collapsible, and each a projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hashml import sharing
from hashml.sharing.nested import coarsen, fold, materialised_map, nested_budgets, nested_map

ROWS, COLUMNS = 30, 8
SIZES = nested_budgets(ROWS * COLUMNS, 4)  # 240, 120, 60, 30, 15


def maps(size, **changes):
    return nested_map(ROWS, COLUMNS, size, **{"full_budget": SIZES[0], **changes})


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrix_of(sharing_map):
    """S: one signed entry a row."""
    ids = np.arange(ROWS)
    slots = np.asarray(sharing_map.slots(ids)).reshape(-1)
    dense = np.zeros((slots.size, sharing_map.budget))
    dense[np.arange(slots.size), slots] = sharing_map.scale * np.asarray(sharing_map.signs(ids)).reshape(-1)
    return dense


def projection(sharing_map, matrix):
    return sharing.expand(sharing_map, sharing.collapse(sharing_map, matrix))


def test_sizes_divide_each_other_and_keep_to_their_share():
    for entries, levels in [(1001, 3), (29_648, 6), (64, 6), (7, 0)]:
        sizes = nested_budgets(entries, levels)
        assert len(sizes) == levels + 1
        for halvings, size in enumerate(sizes):
            assert size * 2**halvings == sizes[0]
            assert size <= entries / 2**halvings < size + 1 + 2 ** (levels - halvings)


def test_a_slot_of_the_smaller_memory_is_that_of_the_larger_one_modulo():
    ids = np.arange(ROWS)
    for i, large in enumerate(SIZES):
        for small in SIZES[i:]:
            np.testing.assert_array_equal(maps(small).slots(ids), np.asarray(maps(large).slots(ids)) % small)
            np.testing.assert_array_equal(maps(small).signs(ids), maps(large).signs(ids))


def test_sizes_that_do_not_nest_agree_almost_never():
    """Why floors are no sizes: 1001 and 500 are both near their share, and share no structure."""
    ids = np.arange(1000)
    slots = np.asarray(nested_map(1000, 1, 1001, full_budget=1001).slots(ids))
    half = np.asarray(nested_map(1000, 1, 500, full_budget=500).slots(ids))
    assert (slots % 500 == half).mean() < 0.02
    with pytest.raises(ValueError, match="budget is 500; it must divide full_budget = 1001, or the two do not nest"):
        nested_map(1000, 1, 500, full_budget=1001)


@pytest.mark.parametrize("size", SIZES)
def test_collapsing_what_was_expanded_gives_it_back(size):
    sharing_map, memory = maps(size), draw(size)
    used = np.asarray(sharing.load(sharing_map)) > 0
    found = sharing.collapse(sharing_map, sharing.expand(sharing_map, memory))
    np.testing.assert_allclose(found, np.where(used, memory, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_projection_is_that_of_linear_algebra(size):
    """Idempotent, symmetric, and S (S'S)^+ S'."""
    sharing_map = maps(size, scale=0.5)
    dense = matrix_of(sharing_map)
    x, y = draw(ROWS, COLUMNS), draw(ROWS, COLUMNS, seed=1)
    expected = (dense @ np.linalg.pinv(dense) @ x.reshape(-1)).reshape(ROWS, COLUMNS)
    np.testing.assert_allclose(projection(sharing_map, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(projection(sharing_map, expected), expected, rtol=1e-4, atol=1e-5)
    inner = np.vdot(projection(sharing_map, x), y)
    np.testing.assert_allclose(inner, np.vdot(x, projection(sharing_map, y)), rtol=1e-4)


def test_spans_are_nested():
    """P_m P_m' = P_m = P_m' P_m where m divides m'."""
    x = draw(ROWS, COLUMNS)
    for large, small in [(SIZES[0], SIZES[1]), (SIZES[1], SIZES[3]), (SIZES[0], SIZES[4])]:
        expected = projection(maps(small), x)
        for inner, outer in [(large, small), (small, large)]:
            found = projection(maps(outer), projection(maps(inner), x))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_another_seed_or_salt_breaks_the_nesting():
    x = draw(ROWS, COLUMNS)
    for change in ({"seed": 1}, {"salt": 5}):
        other = projection(maps(SIZES[2], **change), projection(maps(SIZES[1]), x))
        assert np.abs(other - projection(maps(SIZES[2], **change), x)).max() > 0.1


def test_coarsening_is_collapsing_the_expansion():
    fine, coarse = maps(SIZES[1]), maps(SIZES[3])
    memory, load = draw(SIZES[1]), sharing.load(fine)
    expected = sharing.collapse(coarse, sharing.expand(fine, memory))
    np.testing.assert_allclose(coarsen(memory, load, SIZES[3]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fold(load, SIZES[3]), sharing.load(coarse))
    x = draw(ROWS, COLUMNS)
    np.testing.assert_allclose(fold(sharing.pull(fine, x), SIZES[3]), sharing.pull(coarse, x), rtol=1e-4, atol=1e-5)


def test_every_size_is_filled_evenly():
    """Independent entries: chi-square over groups of slots, the sizes that fold as well as the full one."""
    full = 3 * 2**14
    slots = np.asarray(nested_map(2**17, 1, full, full_budget=full, seed=3).slots(np.arange(2**17)))
    for size in (full, full // 4, full // 96):
        counts = np.bincount((slots % size).reshape(-1) * 64 // size, minlength=64)
        assert counts.shape == (64,)
        assert stats.chisquare(counts).pvalue > 1e-3


def test_rows_beyond_32_bits_have_slots_of_their_own():
    huge = nested_map(2**40, 128, 1000, full_budget=64_000)
    near, far = (np.asarray(huge.slots(np.array([row]))) for row in (5, 2**39 + 5))
    assert (near != far).any()
    # Small rows are hashed alike, whether their flat index is known to fit a word or not.
    np.testing.assert_array_equal(nested_map(100, 128, 1000, full_budget=64_000).slots(np.array([5])), near)


def test_a_materialised_map_is_the_map():
    plain = maps(SIZES[2], scale=0.5)
    kept = materialised_map(plain)
    ids = jnp.array([[3, 29], [0, 3]])
    memory, gradients = draw(SIZES[2]), draw(2, 2, COLUMNS)
    np.testing.assert_array_equal(kept.expand_rows(memory, ids), plain.expand_rows(memory, ids))
    np.testing.assert_array_equal(kept.pull_rows(gradients, ids), plain.pull_rows(gradients, ids))
    assert kept.geometry["materialised"]


def test_a_traced_salt_is_the_salt():
    def expanded(salt):
        return sharing.expand(maps(SIZES[1], salt=salt), memory)

    memory = draw(SIZES[1])
    np.testing.assert_array_equal(jax.jit(expanded)(jnp.uint32(7)), expanded(7))
    assert maps(SIZES[1], salt=7).geometry["salt"] == 7
    assert maps(SIZES[1], salt=jnp.uint32(7)).geometry["salt"] is None


def test_the_gradient_of_a_narrow_memory_is_added_up_wide():
    one = nested_map(4096, 1, 1, full_budget=1, sign="none")
    memory = jnp.zeros(1, jnp.bfloat16)
    gradient = jax.grad(lambda m: sharing.expand(one, m).astype(jnp.float32).sum())(memory)
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient[0]) == 4096  # ones added up in bfloat16 would stop at 256


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nested_budgets(0, 1), ValueError, "entries is 0; it must be at least 1"),
        (lambda: nested_budgets(3, 2), ValueError, "entries is 3; 2 halvings need at least 4"),
        (lambda: nested_budgets(3, -1), ValueError, "levels is -1; it must be at least 0"),
        (lambda: maps(7), ValueError, "budget is 7; it must divide full_budget = 240"),
        (lambda: maps(60, full_budget=2**31), ValueError, "full_budget is 2147483648; a memory holds fewer"),
        (lambda: maps(60, sign="block"), ValueError, "sign is 'block'; it must be one of"),
        (lambda: maps(60, scale=float("inf")), ValueError, "scale is inf; it must be finite"),
        (lambda: fold(jnp.zeros(60), 7), ValueError, "budget is 7; it must divide the finer memory's budget, 60"),
        (lambda: coarsen(draw(60), np.ones(60, int), 7), ValueError, "budget is 7; it must divide"),
        (lambda: maps(60).expand_rows(draw(30), np.arange(2)), ValueError, r"memory has shape \(30,\); it must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()

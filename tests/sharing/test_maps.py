"""The contract of every sharing map, from one table; what is exact, and what holds over seeds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hashml import sharing

SIGNATURES = np.random.default_rng(0).integers(0, 2**32, (40, 2), dtype=np.uint32)
MAPS = {
    "element": lambda seed=0: sharing.element_map(40, 24, 60, seed=seed),
    "element, no sign": lambda seed=0: sharing.element_map(40, 24, 60, seed=seed, sign="none"),
    "block(1)": lambda seed=0: sharing.block_map(40, 24, 60, block_size=1, seed=seed),
    "block(8)": lambda seed=0: sharing.block_map(40, 24, 60, block_size=8, seed=seed, sign="element"),
    "block(8), block signs": lambda seed=0: sharing.block_map(40, 24, 60, block_size=8, seed=seed, sign="block"),
    "block(7), cut short": lambda seed=0: sharing.block_map(40, 24, 61, block_size=7, seed=seed, scale=0.25),
    "block(8), no wrap": lambda seed=0: sharing.block_map(40, 24, 60, block_size=8, seed=seed, wrap="none"),
    "block(16), aligned": lambda seed=0: sharing.block_map(40, 24, 64, block_size=16, seed=seed, align=8),
    "tile(8, 4)": lambda seed=0: sharing.tile_map(40, 24, 60, tile=(8, 4), seed=seed),
    "tile(7, 5), cut, scaled": lambda seed=0: sharing.tile_map(40, 24, 61, tile=(7, 5), seed=seed, scale=0.25),
    "tile(4, 8), tile signs, aligned": lambda seed=0: sharing.tile_map(
        40, 24, 64, tile=(4, 8), seed=seed, sign="tile", align=32, offset=2**40
    ),
    "fold": lambda seed=0: sharing.fold_map(40, 24, 60, seed=seed),
    "fold, no sign": lambda seed=0: sharing.fold_map(40, 24, 61, seed=seed, sign="none", offset=7),
    "fold of tiles(8, 4)": lambda seed=0: sharing.fold_map(40, 24, 60, tile=(8, 4), seed=seed, offset=2**33 + 5),
    "nested": lambda seed=0: sharing.nested_map(40, 24, 60, full_budget=480, seed=seed),
    "lma": lambda seed=0: sharing.lma_map(SIGNATURES, 24, 60, seed=seed),
    "one block fills the memory": lambda seed=0: sharing.block_map(40, 24, 24, block_size=24, seed=seed),
}


@pytest.fixture(params=list(MAPS))
def sharing_map(request):
    return MAPS[request.param]()


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def test_expand_is_its_definition(sharing_map):
    """One hash a weight, one read a weight, in a loop."""
    memory = np.asarray(draw(sharing_map.budget))
    rows = np.arange(sharing_map.rows)
    slots, signs = np.asarray(sharing_map.slots(rows)), np.asarray(sharing_map.signs(rows))
    expected = np.zeros((sharing_map.rows, sharing_map.columns), np.float32)
    for r in range(sharing_map.rows):
        for c in range(sharing_map.columns):
            expected[r, c] = np.float32(signs[r, c] * memory[slots[r, c]]) * np.float32(sharing_map.scale)
    np.testing.assert_array_equal(sharing.expand(sharing_map, jnp.asarray(memory)), expected)
    np.testing.assert_array_equal(jax.jit(lambda m: sharing.expand(sharing_map, m))(memory), expected)


def test_pull_is_its_definition(sharing_map):
    matrix = np.asarray(draw(sharing_map.rows, sharing_map.columns))
    rows = np.arange(sharing_map.rows)
    slots, signs = np.asarray(sharing_map.slots(rows)), np.asarray(sharing_map.signs(rows))
    expected = np.zeros(sharing_map.budget)
    for r in range(sharing_map.rows):
        for c in range(sharing_map.columns):
            expected[slots[r, c]] += sharing_map.scale * signs[r, c] * float(matrix[r, c])
    np.testing.assert_allclose(sharing.pull(sharing_map, matrix), expected, rtol=1e-5, atol=1e-5)


def test_pull_is_the_adjoint_and_the_gradient_of_expand(sharing_map):
    memory, matrix = draw(sharing_map.budget), draw(sharing_map.rows, sharing_map.columns, seed=1)
    inner = jnp.vdot(sharing.expand(sharing_map, memory), matrix)
    np.testing.assert_allclose(inner, jnp.vdot(memory, sharing.pull(sharing_map, matrix)), rtol=1e-4)
    _, backward = jax.vjp(lambda m: sharing.expand(sharing_map, m), memory)
    np.testing.assert_array_equal(backward(matrix)[0], sharing.pull(sharing_map, matrix))


def test_reverse_mode_works_twice(sharing_map):
    """The Hessian of a cubic of the expansion is 6 pull(W v), column by column."""
    memory, vector = draw(sharing_map.budget), draw(sharing_map.budget, seed=1)

    def slope(memory):
        gradient = jax.grad(lambda m: (sharing.expand(sharing_map, m) ** 3).sum())(memory)
        return jnp.vdot(gradient, vector)

    w, v = sharing.expand(sharing_map, memory), sharing.expand(sharing_map, vector)
    np.testing.assert_allclose(jax.grad(slope)(memory), sharing.pull(sharing_map, 6 * w * v), rtol=1e-4, atol=1e-3)


def test_load_counts_every_entry_once(sharing_map):
    load = np.asarray(sharing.load(sharing_map))
    slots = np.asarray(sharing_map.slots(np.arange(sharing_map.rows))).reshape(-1)
    np.testing.assert_array_equal(load, np.bincount(slots, minlength=sharing_map.budget))
    assert load.sum() == sharing_map.rows * sharing_map.columns


def test_collapse_is_the_least_squares_inverse(sharing_map):
    rows = np.arange(sharing_map.rows)
    slots, signs = np.asarray(sharing_map.slots(rows)).reshape(-1), np.asarray(sharing_map.signs(rows)).reshape(-1)
    dense = np.zeros((slots.size, sharing_map.budget))
    dense[np.arange(slots.size), slots] = signs * sharing_map.scale
    matrix = np.asarray(draw(sharing_map.rows, sharing_map.columns))
    expected = np.linalg.lstsq(dense, matrix.reshape(-1), rcond=None)[0]  # of least norm: 0 where nothing is served
    np.testing.assert_allclose(sharing.collapse(sharing_map, matrix), expected, rtol=1e-4, atol=1e-5)


def test_virtual_matmul_equals_the_dense_product(sharing_map):
    x, memory = draw(2, 3, sharing_map.columns, seed=2), draw(sharing_map.budget)

    def blocked(x, memory):
        return sharing.virtual_matmul(x, memory, sharing_map, row_block=7)

    def dense(x, memory):
        return x @ sharing.expand(sharing_map, memory).T

    np.testing.assert_allclose(blocked(x, memory), dense(x, memory), rtol=1e-5, atol=1e-5)
    weight = draw(2, 3, sharing_map.rows, seed=3)
    for found, expected in zip(
        jax.grad(lambda x, m: jnp.vdot(blocked(x, m), weight), (0, 1))(x, memory),
        jax.grad(lambda x, m: jnp.vdot(dense(x, m), weight), (0, 1))(x, memory),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_seed_alone_determines_the_map(sharing_map):
    again = next(make() for make in MAPS.values() if make().geometry == sharing_map.geometry)
    rows = np.arange(sharing_map.rows)
    np.testing.assert_array_equal(again.slots(rows), sharing_map.slots(rows))
    np.testing.assert_array_equal(again.signs(rows), sharing_map.signs(rows))


@pytest.mark.parametrize("name", list(MAPS))
def test_another_seed_is_another_map(name):
    rows = np.arange(40)
    assert (MAPS[name](0).slots(rows) != MAPS[name](1).slots(rows)).any()


def shares_of_the_slots(sharing_map, inside):
    """How likely each slot is to hold an entry that lies ``inside`` a run of its own."""
    geometry, slots = sharing_map.geometry, np.arange(sharing_map.budget)
    if geometry.get("wrap") == "none":
        last = sharing_map.budget - geometry["block_size"]
        return ((slots >= inside) & (slots <= inside + last)).astype(float)
    align = geometry.get("align", 1)
    return (slots % align == inside % align).astype(float)


@pytest.mark.parametrize("name", list(MAPS))
def test_every_slot_is_hit_equally_often_over_seeds(name):
    """Chi-square over the slots of one entry, drawn from 250 seeds: entries of one map are dependent."""
    counts = np.zeros(MAPS[name]().budget, np.int64)
    for seed in range(250):
        counts[int(MAPS[name](seed).slots(np.array([17]))[0, 5])] += 1
    sharing_map = MAPS[name]()
    inside = 5 % sharing_map.geometry.get("block_size", 1)
    if sharing_map.geometry.get("align", 1) > 1:
        inside = int(sharing_map.slots(np.array([17]))[0, 5])  # any slot tells where in its unit the entry lies
    shares = shares_of_the_slots(sharing_map, inside)
    assert counts[shares == 0].sum() == 0
    expected = shares[shares > 0] * counts.sum() / shares.sum()
    if expected.size > 1:
        assert stats.chisquare(counts[shares > 0], expected).pvalue > 1e-3


def test_loads_of_a_large_map_are_poisson_like():
    """A million independent weights in 10,000 slots: the load's variance over its mean is 1, not less."""
    big = sharing.block_map(250_000, 4, 10_000, block_size=1, seed=1)
    load = np.bincount(big.slots(np.arange(250_000)).reshape(-1), minlength=10_000).astype(float)
    ratio = load.var(ddof=1) / load.mean()
    assert abs(ratio - 1) < 4 * np.sqrt(2 / load.size)


def test_rows_that_meet_in_one_block_do_not_meet_in_all():
    """Under the plain linear hash the distance from block 0 to block 1 is one number for all rows."""
    small = sharing.block_map(2000, 8, 1000, block_size=4)
    slots = np.asarray(small.slots(np.arange(2000)))
    distances = (slots[:, 4].astype(int) - slots[:, 0]) % 1000
    counts = np.bincount(distances // 100, minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3


BUDGET = 16
ROW, COLUMN = (index.reshape(-1) for index in np.indices((8, 8)))
# An 8 x 8 matrix in 16 weights, and which entries move together: they never meet.
LAWS = {
    "element": (lambda seed: sharing.element_map(8, 8, BUDGET, seed=seed), 8 * ROW + COLUMN),
    "nested": (
        lambda seed: sharing.nested_map(8, 8, BUDGET, full_budget=4 * BUDGET, seed=seed),
        8 * ROW + COLUMN,
    ),
    "block(8)": (lambda seed: sharing.block_map(8, 8, BUDGET, block_size=8, seed=seed, sign="element"), ROW),
    "block(3), cut": (
        lambda seed: sharing.block_map(8, 8, BUDGET, block_size=3, seed=seed, sign="element"),
        3 * ROW + COLUMN // 3,
    ),
    "tile(2, 4)": (lambda seed: sharing.tile_map(8, 8, BUDGET, tile=(2, 4), seed=seed), 2 * (ROW // 2) + COLUMN // 4),
    "fold": (lambda seed: sharing.fold_map(8, 8, BUDGET, seed=seed, offset=9), (8 * ROW + COLUMN + 9) // BUDGET),
    "fold of tiles(2, 2)": (
        lambda seed: sharing.fold_map(8, 8, BUDGET, tile=(2, 2), seed=seed),
        (4 * (4 * (ROW // 2) + COLUMN // 2) + 2 * (ROW % 2) + COLUMN % 2) // BUDGET,
    ),
}


def variance_law(x, y, group, budget):
    def element(x, y):
        return (x @ x * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / budget

    return element(x, y) - sum(element(x[group == g], y[group == g]) for g in np.unique(group))


@pytest.mark.parametrize("name", list(LAWS))
def test_inner_products_are_unbiased_with_the_variance_of_the_law(name):
    """Two entries that do not move together meet with probability 1 / budget, and signs are independent.

    Cards of ROBE and ROAST: the variance falls with the size of what moves together.
    """
    make, group = LAWS[name]
    seeds = 500
    rng = np.random.default_rng(3)
    x = rng.standard_normal(64)
    y = 0.5 * x + rng.standard_normal(64)
    estimates = np.empty(seeds)
    for seed in range(seeds):
        one = make(seed)
        slots = np.asarray(one.slots(np.arange(8))).reshape(-1)
        signs = np.asarray(one.signs(np.arange(8))).reshape(-1)
        estimates[seed] = np.bincount(slots, signs * x, BUDGET) @ np.bincount(slots, signs * y, BUDGET)
    expected = variance_law(x, y, group, BUDGET)
    assert abs(estimates.mean() - x @ y) < 4 * np.sqrt(expected / seeds)
    fourth = ((estimates - estimates.mean()) ** 4).mean()
    error = np.sqrt((fourth - estimates.var() ** 2) / seeds)  # standard error of a sample variance
    assert abs(estimates.var(ddof=1) - expected) < 4 * error


@pytest.mark.parametrize(("budget", "tile", "offset"), [(60, (1, 1), 0), (77, (1, 1), 123), (64, (4, 8), 96)])
def test_a_fold_loads_every_slot_alike(budget, tile, offset):
    """RANDOMFOLD: floor or ceil of the positions over the budget, over all matrices of one memory."""
    first = sharing.fold_map(40, 24, budget, tile=tile, seed=5)
    second = sharing.fold_map(16, 8, budget, tile=tile, seed=5, offset=first.rows * first.columns)
    load = np.asarray(sharing.load(first) + sharing.load(second))
    positions = 40 * 24 + 16 * 8
    assert set(load.tolist()) <= {positions // budget, -(-positions // budget)}


def test_a_fold_that_fits_is_one_to_one_over_two_matrices():
    first = sharing.fold_map(6, 5, 42, seed=2)
    second = sharing.fold_map(3, 4, 42, seed=2, offset=30)
    slots = np.concatenate([np.asarray(m.slots(np.arange(m.rows))).reshape(-1) for m in (first, second)])
    assert sorted(slots.tolist()) == list(range(42))


def test_two_matrices_of_one_shape_and_memory_have_different_maps():
    """Under one seed the offset keeps them apart; tiles must not lie at one fixed distance either."""
    maps = [sharing.tile_map(64, 64, 10_000, tile=(8, 8), offset=offset) for offset in (0, 4096)]
    slots = [np.asarray(m.slots(np.arange(0, 64, 8)))[:, ::8].astype(int).reshape(-1) for m in maps]
    distance = (slots[0] - slots[1]) % 10_000
    assert np.unique(distance).size > 55


def test_geometry_is_json(sharing_map):
    import json

    assert json.loads(json.dumps(sharing_map.geometry)) == sharing_map.geometry
    assert {"map", "rows", "columns", "budget", "seed"} <= sharing_map.geometry.keys()


def test_expanding_by_rows_never_builds_the_virtual_matrix():
    """188 million rows x 128: memory for forward and backward is the batch's and the budget's alone."""
    huge = sharing.block_map(188_000_000, 128, 1_000_000, block_size=32)
    memory, ids = jnp.zeros(huge.budget), jnp.zeros(1000, jnp.int32)

    def loss(memory, ids):
        return (huge.expand_rows(memory, ids) ** 2).sum()

    found = jax.jit(jax.grad(loss)).lower(memory, ids).compile().memory_analysis()
    assert found is not None
    used = found.temp_size_in_bytes + found.output_size_in_bytes
    assert used < 4 * (3 * huge.budget + 8 * 1000 * 128)
    assert used < 188_000_000 // 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 3}, "budget is 3; it must be at least one block, block_size = 8"),
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"columns": 0}, "features is 0; it must be at least 1"),
        ({"align": 7}, "align is 7; it must divide budget = 60"),
        ({"scale": float("nan")}, "scale is nan; it must be finite"),
        ({"budget": 2**31}, "budget is 2147483648; a memory holds fewer"),
    ],
)
def test_bad_geometry_is_refused_by_name(change, message):
    fields = {"rows": 40, "columns": 24, "budget": 60} | change
    positional = [fields.pop(name) for name in ("rows", "columns", "budget")]
    with pytest.raises(ValueError, match=message):
        sharing.block_map(*positional, block_size=8, **fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 31}, "budget is 31; it must hold one tile at least, 8 x 4 = 32 weights"),
        ({"tile": (8, 0)}, r"tile\[1\] is 0; it must be at least 1"),
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"offset": -1}, "offset is -1; it must lie in 0"),
        ({"align": 7}, "align is 7; it must divide budget = 60"),
        ({"scale": float("inf")}, "scale is inf; it must be finite"),
        ({"budget": 2**31 - 5}, "budget is 2147483643; with a tile it must stay below"),
    ],
)
@pytest.mark.parametrize("make", [sharing.tile_map, sharing.fold_map])
def test_bad_tiles_are_refused_by_name(make, change, message):
    fields = {"rows": 40, "columns": 24, "budget": 60, "tile": (8, 4)} | change
    positional = [fields.pop(name) for name in ("rows", "columns", "budget")]
    with pytest.raises(ValueError, match=message):
        make(*positional, **fields)


def test_virtual_matmul_refuses_other_shapes(sharing_map):
    memory = draw(sharing_map.budget)
    with pytest.raises(ValueError, match=r"x has shape \(3, 5\); its last axis must be 24"):
        sharing.virtual_matmul(draw(3, 5), memory, sharing_map)
    with pytest.raises(ValueError, match="row_block is 0"):
        sharing.virtual_matmul(draw(3, 24), memory, sharing_map, row_block=0)

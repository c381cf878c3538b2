"""Where tiles lie: the definition against a loop, the laws of the two maps, and bad input."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from hashml_kernels import bits
from hashml_kernels.hashed_matmul import TileGeometry, expand, hashed_lookup, hashed_matmul, pull, reference
from hashml_kernels.hashed_matmul.geometry import hashed_starts, tile_runs
from hashml_kernels.hashed_matmul.tiles import first_positions, signs


def start_of(geometry: TileGeometry, key: int) -> int:
    """The hash of one key."""
    limbs = bits.split64(np.array([key], np.uint64))
    return int(hashed_starts(limbs, budget=geometry.budget, align=geometry.align, seed=geometry.seed)[0])


def loop(geometry: TileGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Slots and signs, weight by weight, from the formulas of the module."""
    (bk, bn), budget = geometry.tile, geometry.budget
    slots = np.zeros((geometry.rows, geometry.columns), int)
    negative = np.zeros(slots.shape, int)
    for k in range(geometry.rows):
        for n in range(geometry.columns):
            inside = (k % bk) * bn + n % bn
            first = geometry.offset + ((k // bk) * -(-geometry.columns // bn) + n // bn) * bk * bn
            position = first + inside
            if geometry.map == "tile":
                slots[k, n] = (start_of(geometry, first) + inside) % budget
            else:
                slots[k, n] = (start_of(geometry, position // budget) + position % budget) % budget
            signed = first if geometry.sign == "tile" else position
            if geometry.sign != "none":
                negative[k, n] = int(bits.sign_bit(bits.split64(signed), geometry.seed))
    return slots, 1 - 2 * negative


@pytest.mark.parametrize(
    "geometry",
    [
        TileGeometry(1, 1, 1, (1, 1), sign="none", seed=1),
        TileGeometry(35, 9, 8, (4, 5), sign="tile", seed=2, offset=2**32 - 60),
        TileGeometry(40, 8, 9, (5, 4), seed=3, offset=2**63 - 200, align=8),
        TileGeometry(12, 7, 5, (3, 4), "fold", seed=4, offset=2**32 - 60),
        TileGeometry(41, 9, 9, (2, 5), "fold", seed=5, sign="tile", offset=2**62),
        TileGeometry(7, 5, 9, (1, 7), "fold", seed=2**31, sign="none", offset=3),
    ],
    ids=lambda geometry: f"{geometry.map}-{geometry.sign}-{geometry.offset}",
)
def test_the_definition_equals_a_loop(geometry):
    slots, signs = jax.jit(lambda: (reference.slots(geometry), reference.signs(geometry)))()
    expected, expected_signs = loop(geometry)
    np.testing.assert_array_equal(slots, expected)
    np.testing.assert_array_equal(signs, expected_signs)


@pytest.mark.parametrize("align", [1, 7])
def test_a_fold_loads_every_slot_alike(align):
    """Two matrices that lie one after the other in a model, as one memory sees them; whole tiles."""
    budget, load = 77 * align, 0
    offset = 0
    for rows, columns in ((30, 40), (20, 8)):
        geometry = TileGeometry(budget, rows, columns, (5, 4), "fold", seed=3, offset=offset, align=align)
        load = load + np.bincount(np.asarray(reference.slots(geometry)).ravel(), minlength=budget)
        offset += geometry.positions
    assert offset == 30 * 40 + 20 * 8
    assert set(np.unique(load)) == {offset // budget, -(-offset // budget)}


def test_a_fold_with_room_for_the_model_is_any_dense_matrix():
    geometry = TileGeometry(2 * 12 * 20 + 3, 12, 20, (4, 5), "fold", seed=4, offset=12 * 20)
    slots = np.asarray(reference.slots(geometry))
    assert len(np.unique(slots)) == slots.size
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((12, 20)).astype(np.float32), rng.standard_normal((3, 12)).astype(np.float32)
    memory = np.zeros(geometry.budget, np.float32)
    memory[slots] = w * np.asarray(reference.signs(geometry))
    np.testing.assert_array_equal(expand(memory, geometry), w)
    y = hashed_matmul(x, memory, columns=20, tile=(4, 5), map="fold", seed=4, offset=12 * 20)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, atol=1e-5)


def test_tiles_start_anywhere_alike():
    """Slots of first weights of 10,000 tiles: the counts of a fair die with 20 faces."""
    geometry = TileGeometry(20, 100, 400, (2, 2), seed=5)
    start = tile_runs(geometry).start.ravel()
    counts = np.bincount(start, minlength=20)
    expected = start.size / 20
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 19 + 4 * np.sqrt(2 * 19)  # mean and standard deviation of chi-squared with 19 degrees


def matrix(**changes) -> np.ndarray:
    options = {"budget": 700, "rows": 64, "columns": 64, "tile": (16, 32), "seed": 1, "sign": "none"} | changes
    geometry = TileGeometry(**options)
    return np.asarray(jax.jit(expand, static_argnums=1)(jnp.arange(1.0, 1.0 + geometry.budget), geometry))


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": (32, 16)},
        {"tile": (8, 32)},
        {"seed": 2},
        {"offset": 64 * 64},
        {"map": "fold"},
        {"sign": "element"},
        {"sign": "tile"},
        {"align": 100},
    ],
)
def test_every_field_changes_the_function(changes):
    """Tiles are no tuning knob: a trained memory read with other tiles is another model."""
    assert (matrix() != matrix(**changes)).mean() > 0.3


def test_signs_are_fair_and_of_their_unit():
    geometry = TileGeometry(1024, 256, 256, (16, 16), sign="element")
    elements = np.asarray(reference.signs(geometry))
    tiles = np.asarray(reference.signs(TileGeometry(1024, 256, 256, (16, 16), sign="tile")))
    blocks = tiles.reshape(16, 16, 16, 16).swapaxes(1, 2)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :, :1, :1], blocks.shape))
    for found in (elements, blocks[:, :, 0, 0]):
        assert abs(found.sum()) < 4 * np.sqrt(found.size)  # four standard errors of fair coins


@pytest.mark.parametrize("offset", [0, 2**32 - 100, 2**32, 2**40 + 7])
def test_backends_hash_the_signs_of_the_definition(offset):
    """With and without a high limb that all positions share."""
    geometry = TileGeometry(64, 20, 12, (5, 4), offset=offset, seed=6)
    number = np.arange(12, dtype=np.uint32).reshape(4, 3)[:, None, :, None]
    inside = (np.arange(5, dtype=np.uint32)[:, None, None] * 4 + np.arange(4, dtype=np.uint32)).astype(np.uint32)
    negative = np.asarray(signs(geometry, first_positions(geometry, number), inside)).reshape(20, 12)
    np.testing.assert_array_equal(1 - 2 * negative.astype(int), reference.signs(geometry))


def test_aligned_tiles_are_tiles_of_the_memory():
    size = 8 * 16
    for geometry in (
        TileGeometry(10 * size, 40, 64, (8, 16), align=size),
        TileGeometry(10 * size, 40, 64, (8, 16), "fold", offset=3 * size, align=2 * size),
    ):
        runs = tile_runs(geometry)
        assert geometry.aligned
        assert not (runs.start % size).any()
        assert (runs.split == size).all()
        assert (runs.start + size <= geometry.budget).all()
    assert not TileGeometry(10 * size, 40, 64, (8, 16), "fold", offset=5, align=size).aligned
    assert not TileGeometry(10 * size, 40, 64, (8, 16), align=size // 2).aligned


# --- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def _unchecked(monkeypatch):
    """The checks of a program that runs without the annotations' checks of this test run."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


GOOD = {"budget": 100, "rows": 8, "columns": 8, "tile": (4, 4)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": 15}, ValueError, "budget is 15; it must hold one tile"),
        ({"budget": 2**31 - 8}, ValueError, "must stay below"),
        ({"rows": 0}, ValueError, "rows is 0; it must be at least 1"),
        ({"columns": 2.5}, TypeError, "columns is 2.5; it must be an int"),
        ({"columns": True}, TypeError, "columns is True"),
        ({"tile": (4, 0)}, ValueError, r"tile\[1\] is 0; it must be at least 1"),
        ({"tile": (4, 4, 4)}, TypeError, "must be a pair of ints"),
        ({"tile": 4}, TypeError, "tile is 4"),
        ({"map": "roast"}, ValueError, "map is 'roast'; it must be 'tile' or 'fold'"),
        ({"sign": "block"}, ValueError, "sign is 'block'"),
        ({"offset": -1}, ValueError, "offset is -1"),
        ({"offset": 2**63}, ValueError, "offset is 9223372036854775808"),
        ({"align": 3}, ValueError, "align is 3; it must divide budget = 100"),
        ({"align": 0}, ValueError, "align is 0"),
    ],
)
@pytest.mark.usefixtures("_unchecked")
def test_bad_geometries_are_refused_by_name(changes, error, message):
    with pytest.raises(error, match=message):
        TileGeometry(**(GOOD | changes))


@pytest.mark.parametrize(
    ("x", "memory", "options", "error", "message"),
    [
        (np.ones((2, 8), np.float32), np.ones(100, np.int32), {}, TypeError, "memory has dtype int32"),
        (np.ones((2, 8), np.int32), np.ones(100, np.float32), {}, TypeError, "x has dtype int32"),
        (np.ones((2, 8), np.float32), np.ones((10, 10), np.float32), {}, ValueError, r"memory has shape \(10, 10\)"),
        (np.float32(1), np.ones(100, np.float32), {}, ValueError, "x is a scalar"),
        (np.ones((2, 8), np.float32), np.ones(100, np.float32), {"scale": "1"}, TypeError, "scale is '1'"),
        (np.ones((2, 8), np.float32), np.ones(100, np.float32), {"scale": True}, TypeError, "scale is True"),
        (np.ones((2, 8), np.float32), np.ones(9, np.float32), {}, ValueError, "budget is 9"),
        (
            np.ones((2, 8), np.float32),
            np.ones(100, np.float32),
            {"implementation": "cuda"},
            ValueError,
            "implementation is 'cuda'; it must be one of",
        ),
    ],
)
@pytest.mark.usefixtures("_unchecked")
def test_bad_operands_are_refused_by_name(x, memory, options, error, message):
    with pytest.raises(error, match=message):
        hashed_matmul(x, memory, columns=8, tile=(4, 4), **options)


@pytest.mark.usefixtures("_unchecked")
def test_siblings_refuse_what_does_not_fit_the_geometry():
    geometry = TileGeometry(100, 8, 8, (4, 4))
    with pytest.raises(ValueError, match="memory holds 99 weights; the geometry's budget is 100"):
        expand(np.ones(99, np.float32), geometry)
    with pytest.raises(ValueError, match=r"gradient has shape \(8, 7\)"):
        pull(np.ones((8, 7), np.float32), geometry)
    with pytest.raises(TypeError, match="ids has dtype float32"):
        hashed_lookup(np.ones(100, np.float32), np.ones(3, np.float32), geometry)

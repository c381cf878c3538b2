"""Every backend equals the definition, and the definition equals a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels.hashed_matmul import (
    TileGeometry,
    expand,
    hashed_lookup,
    pallas_mosaic_tpu,
    pallas_triton,
    pull,
    reference,
    xla,
)

EPS = float(np.finfo(np.float32).eps)

# Small budgets: tiles run over the end of the memory, and those of folds over the ends of partitions. Sides that no
# tile divides, one partition a tile, positions around 2**32, more strips than one.
ANY_TILE = {
    "one": TileGeometry(1, 1, 1, (1, 1), sign="none"),
    "ragged": TileGeometry(101, 37, 29, (5, 7), seed=1),
    "fold": TileGeometry(101, 37, 29, (5, 7), "fold", seed=2, offset=3),
    "tight": TileGeometry(35, 37, 29, (5, 7), "fold", seed=3, offset=2**32 - 500),
    "far": TileGeometry(90, 60, 40, (8, 8), seed=4, sign="tile", offset=2**40),
    "whole": TileGeometry(64, 16, 16, (8, 8), "fold", seed=5, sign="tile", align=64),
    "strips": TileGeometry(70_001, 600, 300, (32, 32), "fold", seed=6, offset=77),
    "long": TileGeometry(30, 700, 3, (1, 1), "fold", sign="none"),
}
TRITON_TILE = {
    "one": TileGeometry(3000, 1, 1, (48, 32), sign="none", offset=5),
    "ragged": TileGeometry(1001, 70, 90, (32, 16), seed=1),
    "fold": TileGeometry(1001, 70, 90, (16, 32), "fold", seed=2, offset=3),
    "tight": TileGeometry(800, 37, 129, (16, 48), "fold", seed=3, offset=2**32 - 5000),
    "whole": TileGeometry(512, 48, 32, (16, 16), "fold", seed=5, align=256),
    "shared": TileGeometry(5003, 1100, 20, (32, 32), seed=6, sign="tile", offset=2**40),
}
TPU_TILE = {
    "one": TileGeometry(2**14, 1, 1, (128, 128), sign="none", align=2**14),
    "tile": TileGeometry(2**15, 40, 300, (128, 128), seed=1, align=2**14),
    "fold": TileGeometry(5 * 2**14, 700, 300, (128, 128), "fold", 2, "tile", 3 * 2**14, 2**14),
    "tight": TileGeometry(2**16, 300, 300, (256, 128), "fold", 3, "element", 2**32 - 2**16, 2**15),
}
CASES = [("xla", name) for name in ANY_TILE]
CASES += [("pallas_triton", name) for name in TRITON_TILE] + [("pallas_mosaic_tpu", name) for name in TPU_TILE]
BACKENDS = {
    "reference": reference,
    "xla": xla,
    "pallas_triton": pallas_triton,
    "pallas_mosaic_tpu": pallas_mosaic_tpu,
}

_EXPAND = jax.jit(reference.expand, static_argnums=1)
_SLOTS, _SIGNS = (jax.jit(function, static_argnums=0) for function in (reference.slots, reference.signs))


def geometry_of(backend: str, name: str) -> TileGeometry:
    return {"pallas_triton": TRITON_TILE, "pallas_mosaic_tpu": TPU_TILE}.get(backend, ANY_TILE)[name]


def op_of(backend: str, op: str, scale: float = 1.0):
    """A backend's op, compiled, or interpreted where it is a kernel."""
    options = {"interpret": True} if backend.startswith("pallas") else {}
    function = functools.partial(getattr(BACKENDS[backend], op), scale=scale, **options)
    # A new function each time: nothing is found in a cache that a test has changed the ground of.
    return jax.jit(lambda a, b, geometry: function(a, b, geometry), static_argnums=2)


def draw(rng: np.random.Generator, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))


def matrix_of(memory, geometry: TileGeometry) -> np.ndarray:
    """W in float64."""
    return np.asarray(_EXPAND(memory, geometry), np.float64)


def exact_outer(x, y, geometry: TileGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Sums over weights and batch in float64, and a bound for the error of any order of float32 additions."""
    slots, signs = np.asarray(_SLOTS(geometry)).ravel(), np.asarray(_SIGNS(geometry), np.float64)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    total, size, terms = (np.zeros(geometry.budget) for _ in range(3))
    np.add.at(total, slots, ((x.T @ y) * signs).ravel())
    np.add.at(size, slots, (np.abs(x).T @ np.abs(y)).ravel())
    np.add.at(terms, slots, len(x))
    return total, (terms + 2) * EPS * size


def assert_product(got, left, right: np.ndarray) -> None:
    """``left @ right`` up to the order of float32 additions, and the rounding of the result."""
    left = np.asarray(left, np.float64)
    exact, size = left @ right, np.abs(left) @ np.abs(right)
    rounding = 0.0 if got.dtype == jnp.float32 else float(jnp.finfo(got.dtype).eps)
    assert_within(got, exact, (left.shape[1] + 3) * EPS * size + rounding * np.abs(exact))


def assert_within(got, expected: np.ndarray, bound: np.ndarray) -> None:
    error = np.abs(np.asarray(got, np.float64) - expected)
    assert np.all(error <= bound), f"off by {(error - bound).max()} more than any order of additions allows"


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "name"), [("reference", "fold"), *CASES])
def test_all_three_ops_are_products_with_the_matrix(backend, name):
    geometry, rng = geometry_of(backend, name), np.random.default_rng(1)
    memory = draw(rng, geometry.budget)
    x, y = draw(rng, 7, geometry.rows), draw(rng, 7, geometry.columns)
    w = matrix_of(memory, geometry)
    assert_product(op_of(backend, "multiply")(x, memory, geometry), x, w)
    assert_product(op_of(backend, "multiply_transposed")(y, memory, geometry), y, w.T)
    gradient = op_of(backend, "outer")(x, y, geometry)
    assert gradient.dtype == jnp.float32
    assert_within(gradient, *exact_outer(x, y, geometry))


@pytest.mark.parametrize(
    ("backend", "name", "n", "dtype"),
    [
        ("xla", "strips", 1, "bfloat16"),
        ("xla", "tight", 65, "float16"),
        ("pallas_triton", "tight", 1, "bfloat16"),
        ("pallas_triton", "whole", 257, "float16"),
        ("pallas_mosaic_tpu", "tight", 1, "bfloat16"),
        ("pallas_mosaic_tpu", "tile", 33, "bfloat16"),
    ],
)
def test_any_batch_and_dtype(backend, name, n, dtype):
    geometry, rng = geometry_of(backend, name), np.random.default_rng(2)
    memory = draw(rng, geometry.budget, dtype=dtype)
    x, y = draw(rng, n, geometry.rows, dtype=dtype), draw(rng, n, geometry.columns, dtype=dtype)
    w = matrix_of(memory, geometry) * 0.375
    for op, left, right in (("multiply", x, w), ("multiply_transposed", y, w.T)):
        got = op_of(backend, op, 0.375)(left, memory, geometry)
        assert got.dtype == jnp.dtype(dtype)
        assert_product(got, left, right)
    total, bound = exact_outer(x, y, geometry)
    gradient = op_of(backend, "outer", 0.375)(x, y, geometry)
    assert gradient.dtype == jnp.float32
    assert_within(gradient, 0.375 * total, 0.375 * bound)


@pytest.mark.parametrize("backend", ["xla", "pallas_triton", "pallas_mosaic_tpu"])
def test_bfloat16_gradients_are_added_in_float32(backend):
    """Each slot collects 4096 ones or more: in bfloat16 the sum would stop at 256."""
    side = 128 if backend == "pallas_mosaic_tpu" else 16
    geometry = TileGeometry(side**2, 2 * side, 2 * side, (side, side), "fold", sign="none", align=side**2)
    ones = jnp.ones((1024, 2 * side), jnp.bfloat16)
    total = op_of(backend, "outer")(ones, ones, geometry)
    np.testing.assert_array_equal(total, np.full(geometry.budget, 4096.0))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["ragged", "tight", "far"])
def test_strips_of_xla_may_have_any_width(monkeypatch, name, axis):
    """The last strip reaches beyond W, and the runs that lie in pieces are counted strip by strip."""
    geometry, rng = ANY_TILE[name], np.random.default_rng(3)
    memory = draw(rng, geometry.budget)
    monkeypatch.setattr(xla, "STRIP", 3 * geometry.tile[axis])
    strips = xla._strips(geometry, axis, xla.STRIP)
    assert strips.parts > 1
    assert strips.broken.size
    x, y = draw(rng, 7, geometry.rows), draw(rng, 7, geometry.columns)
    if axis:
        assert_product(op_of("xla", "multiply")(x, memory, geometry), x, matrix_of(memory, geometry))
    else:
        assert_product(op_of("xla", "multiply_transposed")(y, memory, geometry), y, matrix_of(memory, geometry).T)
        assert_within(op_of("xla", "outer")(x, y, geometry), *exact_outer(x, y, geometry))


def test_triton_programs_share_a_long_sum():
    geometry = TRITON_TILE["shared"]
    blocks = pallas_triton._product_blocks(7, geometry.columns, geometry.rows, geometry.tile[0], "float32")
    assert blocks.parts > 1  # and so in the first test above


def test_tpu_steps_of_several_blocks(monkeypatch):
    """Batches cut in blocks, sums of several steps, and gradients that are added up over blocks of the batch."""
    for name, value in (("_ROWS", 16), ("_OUTER_ROWS", 16), ("_STEP", 256)):
        monkeypatch.setattr(pallas_mosaic_tpu, name, value)
    geometry, rng = TPU_TILE["fold"], np.random.default_rng(4)
    memory, x, y = draw(rng, geometry.budget), draw(rng, 37, geometry.rows), draw(rng, 37, geometry.columns)
    w = matrix_of(memory, geometry)
    assert_product(op_of("pallas_mosaic_tpu", "multiply")(x, memory, geometry), x, w)
    assert_product(op_of("pallas_mosaic_tpu", "multiply_transposed")(y, memory, geometry), y, w.T)
    assert_within(op_of("pallas_mosaic_tpu", "outer")(x, y, geometry), *exact_outer(x, y, geometry))


def test_tpu_gradients_leave_unused_tiles_zero():
    geometry, rng = TileGeometry(2**18, 128, 128, (128, 128), align=2**14), np.random.default_rng(5)
    total = np.asarray(op_of("pallas_mosaic_tpu", "outer")(draw(rng, 4, 128), draw(rng, 4, 128), geometry))
    used = np.zeros(geometry.budget, bool)
    used[np.asarray(reference.slots(geometry))] = True
    assert used.sum() == 2**14
    assert np.all(total[used] != 0)
    assert not total[~used].any()


def test_tpu_kernels_under_the_simulator():
    """JAX's simulation of the TPU's memories: reads out of bounds, or of what is not yet there, and races."""
    simulate = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan", detect_races=True)
    geometry, rng = TileGeometry(2**15, 200, 130, (128, 128), seed=8, align=2**14), np.random.default_rng(6)
    memory, x, y = draw(rng, geometry.budget), draw(rng, 5, geometry.rows), draw(rng, 5, geometry.columns)
    w = matrix_of(memory, geometry)
    kernels = pallas_mosaic_tpu
    assert_product(kernels.multiply(x, memory, geometry, 1.0, interpret=simulate), x, w)
    assert_product(kernels.multiply_transposed(y, memory, geometry, 1.0, interpret=simulate), y, w.T)
    assert_within(kernels.outer(x, y, geometry, 1.0, interpret=simulate), *exact_outer(x, y, geometry))


@pytest.mark.parametrize("name", ANY_TILE)
def test_expand_and_pull_equal_the_definition(name):
    geometry, rng = ANY_TILE[name], np.random.default_rng(7)
    memory, gradient = draw(rng, geometry.budget), draw(rng, geometry.rows, geometry.columns)
    total, bound = exact_outer(np.eye(geometry.rows), gradient, geometry)

    @jax.jit
    def expanded(memory, gradient):
        w, back = jax.vjp(lambda memory: expand(memory, geometry, scale=0.5), memory)
        return w, back(gradient)[0]

    @jax.jit
    def pulled(gradient, memory):
        sums, back = jax.vjp(lambda gradient: pull(gradient, geometry), gradient)
        return sums, back(memory)[0]

    (w, back), (sums, forth) = expanded(memory, gradient), pulled(gradient, memory)
    np.testing.assert_array_equal(w, 0.5 * matrix_of(memory, geometry))
    np.testing.assert_array_equal(forth, matrix_of(memory, geometry))
    assert_within(sums, total, bound)
    np.testing.assert_array_equal(back, 0.5 * sums)


@pytest.mark.parametrize("name", ["fold", "tight", "far"])
def test_lookups_are_rows_of_the_matrix(name):
    geometry, rng = ANY_TILE[name], np.random.default_rng(8)
    memory, ids = draw(rng, geometry.budget), rng.integers(0, geometry.rows, (3, 4))
    rows = draw(rng, 3, 4, geometry.columns)

    @jax.jit
    def lookup(memory):
        found, back = jax.vjp(lambda memory: hashed_lookup(memory, ids, geometry, scale=0.5), memory)
        return found, back(rows)[0], hashed_lookup(memory, np.array([-5, 10**6]), geometry)

    (found, gradient, beyond), w = lookup(memory), matrix_of(memory, geometry)
    np.testing.assert_array_equal(found, 0.5 * w[ids])
    np.testing.assert_array_equal(beyond, w[[0, -1]])
    total, bound = exact_outer(np.eye(geometry.rows)[ids.ravel()], rows.reshape(12, -1), geometry)
    assert_within(gradient, 0.5 * total, 0.5 * bound)

"""Every backend equals the definition, and the definition equals a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from hashml_kernels import bits
from hashml_kernels.hash_gather import (
    BlockGeometry,
    api,
    hash_gather,
    hash_gather_bag,
    hash_scatter,
    pallas_mosaic_tpu,
    pallas_triton,
    reference,
    xla,
)
from hashml_kernels.hash_gather.geometry import block_bases

EPS = float(np.finfo(np.float32).eps)

# Small budgets: many blocks run over the end. Features that no tile and no block divides.
ANY_GEOMETRY = {
    "cut": BlockGeometry(101, 37, 5, seed=1),
    "elements": BlockGeometry(64, 16, 1, seed=2, sign="element"),
    "wide": BlockGeometry(128, 70, 64, seed=3, sign="block"),
    "edges": BlockGeometry(200, 48, 40, seed=4, sign="element", wrap="none", align=8),
}
LINE_GEOMETRY = {
    "line": BlockGeometry(384, 128, 128, seed=5, align=128),
    "cut": BlockGeometry(640, 384, 256, seed=6, sign="block", align=128),
    "edges": BlockGeometry(512, 256, 256, seed=7, wrap="none", align=256),
}
CASES = [(backend, name) for backend in ("xla", "pallas_triton") for name in ANY_GEOMETRY]
CASES += [("pallas_mosaic_tpu", name) for name in LINE_GEOMETRY]


def geometry_of(backend: str, name: str) -> BlockGeometry:
    return (LINE_GEOMETRY if backend == "pallas_mosaic_tpu" else ANY_GEOMETRY)[name]


def op_of(backend: str, op: str):
    """A backend's op, compiled, or interpreted where it is a kernel."""
    module = {"xla": xla, "pallas_triton": pallas_triton, "pallas_mosaic_tpu": pallas_mosaic_tpu}[backend]
    function = getattr(module, op)
    if backend != "xla":
        function = functools.partial(function, interpret=True)
    # A new function each time: nothing is found in a cache that a test has changed the ground of.
    return jax.jit(lambda *arguments: function(*arguments), static_argnums=3 if op.endswith("_bag") else 2)


def draw_ids(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """NumPy's, for which the reference hashes at once."""
    return rng.integers(0, 2**32, shape, np.uint32)


def draw(rng: np.random.Generator, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)))


def exact_scatter(gradients, ids, geometry) -> tuple[np.ndarray, np.ndarray]:
    """Sums in float64, and a bound for the error of any order of float32 additions: terms * eps * sum |x|."""
    slots = np.asarray(reference.slots(ids, geometry)).ravel()
    signed = (np.asarray(gradients, np.float64) * np.asarray(reference.signs(ids, geometry))).ravel()
    total, size, terms = (np.zeros(geometry.budget) for _ in range(3))
    np.add.at(total, slots, signed)
    np.add.at(size, slots, np.abs(signed))
    np.add.at(terms, slots, 1)
    return total, (terms + 1) * EPS * size


def spread(gradients, weights, members: int) -> np.ndarray:
    """The gradient of each member's row."""
    gradients = np.repeat(np.asarray(gradients, np.float64)[:, None, :], members, axis=1)
    return gradients if weights is None else gradients * np.asarray(weights, np.float64)[:, :, None]


def exact_bag(memory, ids, weights, geometry) -> tuple[np.ndarray, np.ndarray]:
    """Sums in float64, and the bound of their error in the dtype of the memory."""
    rows = np.asarray(reference.gather(memory, ids, geometry), np.float64)
    if weights is not None:
        rows = rows * np.asarray(weights, np.float64)[..., None]
    total, size = rows.sum(axis=1), np.abs(rows).sum(axis=1)
    rounding = 0.0 if memory.dtype == jnp.float32 else float(jnp.finfo(memory.dtype).eps)
    return total, (rows.shape[1] + 2) * EPS * size + rounding * np.abs(total)


def assert_within(got, expected: np.ndarray, bound: np.ndarray) -> None:
    error = np.abs(np.asarray(got, np.float64) - expected)
    assert np.all(error <= bound), f"off by {(error - bound).max()} more than any order of additions allows"


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", [*ANY_GEOMETRY.values(), LINE_GEOMETRY["cut"]])
def test_reference_equals_a_loop(geometry):
    rng = np.random.default_rng(0)
    ids, memory = rng.integers(0, 2**32, 9, np.uint32), rng.standard_normal(geometry.budget).astype(np.float32)
    expected = np.zeros((9, geometry.features), np.float32)
    for row, name in enumerate(ids):
        for block in range(geometry.blocks):
            base = int(block_bases(geometry, name, np.uint32(block)))
            assert base % geometry.align == 0
            for column in range(
                block * geometry.block_size, min((block + 1) * geometry.block_size, geometry.features)
            ):
                expected[row, column] = memory[(base + column % geometry.block_size) % geometry.budget]
    signs = np.asarray(reference.signs(ids, geometry))
    assert set(np.unique(signs)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(reference.gather(jnp.asarray(memory), ids, geometry), expected * signs)


def test_a_block_at_the_end_goes_on_at_the_start():
    geometry = BlockGeometry(7, 6, 6)
    slots = np.asarray(reference.slots(np.arange(200, dtype=np.uint32), geometry))
    assert set(slots[:, 0]) == set(range(7))  # every slot is the start of some block
    np.testing.assert_array_equal(slots, (slots[:, :1].astype(int) + np.arange(6)) % 7)


def test_without_wrap_no_block_crosses_the_end():
    geometry = BlockGeometry(50, 16, 8, wrap="none")
    slots = np.asarray(reference.slots(np.arange(500, dtype=np.uint32), geometry)).reshape(-1, 8)
    np.testing.assert_array_equal(slots, slots[:, :1] + np.arange(8))
    assert slots.max() == 49


def test_signs_are_balanced_and_of_their_unit():
    ids = np.arange(4000, dtype=np.uint32)
    blocks = np.asarray(reference.signs(ids, BlockGeometry(100, 32, 8, sign="block"))).reshape(4000, 4, 8)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :, :1], blocks.shape))
    elements = np.asarray(reference.signs(ids, BlockGeometry(100, 32, 8, sign="element")))
    for signs in (blocks[:, :, 0], elements):
        assert abs(signs.sum()) < 4 * np.sqrt(signs.size)  # four standard errors of fair coins
    assert not np.array_equal(elements.reshape(blocks.shape), blocks)


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_gather_is_bit_equal_to_the_reference(backend, name):
    geometry, rng = geometry_of(backend, name), np.random.default_rng(1)
    memory, ids = draw(rng, geometry.budget), draw_ids(rng, 130)
    got = op_of(backend, "gather")(memory, ids, geometry)
    np.testing.assert_array_equal(got, reference.gather(memory, ids, geometry))


@pytest.mark.parametrize(
    ("backend", "name", "n", "dtype"),
    [
        ("xla", "cut", 1, "bfloat16"),
        ("xla", "cut", 257, "float16"),
        ("pallas_triton", "cut", 1, "bfloat16"),
        ("pallas_triton", "cut", 257, "float16"),
        ("pallas_mosaic_tpu", "line", 1, "bfloat16"),
        ("pallas_mosaic_tpu", "line", 257, "float32"),
    ],
)
def test_gather_takes_any_count_and_dtype(backend, name, n, dtype):
    geometry, rng = geometry_of(backend, name), np.random.default_rng(2)
    memory, ids = draw(rng, geometry.budget, dtype=dtype), draw_ids(rng, n)
    got = op_of(backend, "gather")(memory, ids, geometry)
    assert got.dtype == memory.dtype
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(reference.gather(memory, ids, geometry), np.float32)
    )


@pytest.mark.parametrize(("backend", "name"), [("reference", "cut"), *CASES])
def test_scatter_adds_every_coordinate_once(backend, name):
    geometry, rng = geometry_of(backend, name), np.random.default_rng(3)
    gradients, ids = draw(rng, 130, geometry.features), draw_ids(rng, 130)
    scatter = reference.scatter if backend == "reference" else op_of(backend, "scatter")
    got = scatter(gradients, ids, geometry)
    assert got.dtype == jnp.float32
    assert_within(got, *exact_scatter(gradients, ids, geometry))


@pytest.mark.parametrize("backend", ["xla", "pallas_triton", "pallas_mosaic_tpu"])
def test_bfloat16_gradients_are_added_in_float32(backend):
    """One slot collects 4096 ones: in bfloat16 the sum would stop at 256."""
    lines = backend == "pallas_mosaic_tpu"
    geometry = BlockGeometry(128, 128, 128, align=128) if lines else BlockGeometry(1, 1, 1)
    gradients = jnp.ones((4096, geometry.features), jnp.bfloat16)
    total = op_of(backend, "scatter")(gradients, np.arange(4096, dtype=np.uint32), geometry)
    np.testing.assert_array_equal(total, np.full(geometry.budget, 4096.0))


@pytest.mark.parametrize(
    ("backend", "name", "members", "weighted", "dtype"),
    [
        ("reference", "cut", 3, True, "float32"),
        ("xla", "cut", 1, True, "float32"),
        ("xla", "elements", 5, False, "bfloat16"),
        ("pallas_triton", "cut", 1, True, "float32"),
        ("pallas_triton", "cut", 50, False, "float32"),
        ("pallas_triton", "elements", 11, True, "bfloat16"),
        ("pallas_triton", "wide", 3, True, "float32"),
        ("pallas_mosaic_tpu", "line", 1, True, "float32"),
        ("pallas_mosaic_tpu", "cut", 5, True, "float32"),
        ("pallas_mosaic_tpu", "edges", 3, False, "bfloat16"),
    ],
)
def test_bags_forward_and_backward(backend, name, members, weighted, dtype):
    geometry, rng = geometry_of(backend, name), np.random.default_rng(4)
    memory, ids = draw(rng, geometry.budget, dtype=dtype), draw_ids(rng, 9, members)
    weights = draw(rng, 9, members).at[2].set(0.0) if weighted else None
    gather, scatter = (
        getattr(reference, op) if backend == "reference" else op_of(backend, op)
        for op in ("gather_bag", "scatter_bag")
    )
    bags = gather(memory, ids, weights, geometry)
    assert bags.dtype == memory.dtype
    if weighted:
        assert not np.asarray(bags[2], np.float32).any()
    assert_within(bags, *exact_bag(memory, ids, weights, geometry))

    gradients = draw(rng, 9, geometry.features, dtype=dtype)
    got = scatter(gradients, ids, weights, geometry)
    total, bound = exact_scatter(spread(gradients, weights, members), ids, geometry)
    assert_within(got, total, 2 * bound)  # a product is rounded before it is added


def test_tpu_bags_of_several_tiles(monkeypatch):
    """Members and rows that fill their tiles in part, on the memory that stays in HBM and the one that does not."""
    monkeypatch.setattr(pallas_mosaic_tpu, "_SCALARS", 128)
    monkeypatch.setattr(pallas_mosaic_tpu, "_ROWS", 16)
    geometry, rng = LINE_GEOMETRY["cut"], np.random.default_rng(5)
    memory, ids, weights = draw(rng, geometry.budget), draw_ids(rng, 20, 7), draw(rng, 20, 7)
    expected = exact_bag(memory, ids, weights, geometry)
    gradients = draw(rng, 20, geometry.features)
    total, bound = exact_scatter(spread(gradients, weights, 7), ids, geometry)

    assert_within(op_of("pallas_mosaic_tpu", "gather_bag")(memory, ids, weights, geometry), *expected)
    assert_within(op_of("pallas_mosaic_tpu", "scatter_bag")(gradients, ids, weights, geometry), total, 2 * bound)
    monkeypatch.setattr(pallas_mosaic_tpu, "_RESIDENT_BYTES", 0)
    assert_within(op_of("pallas_mosaic_tpu", "gather_bag")(memory, ids, weights, geometry), *expected)


@pytest.mark.parametrize("resident", [True, False])
def test_tpu_kernels_under_the_simulator(monkeypatch, resident):
    """JAX's simulation of the TPU's memories: semaphores, transfers out of bounds, reads of what is not yet there."""
    simulate = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan", detect_races=True)
    geometry, rng = BlockGeometry(384, 256, 128, seed=8, align=128), np.random.default_rng(6)
    if not resident:
        monkeypatch.setattr(pallas_mosaic_tpu, "_RESIDENT_BYTES", 0)
    memory, ids = draw(rng, geometry.budget), draw_ids(rng, 9)
    got = pallas_mosaic_tpu.gather(memory, ids, geometry, interpret=simulate)
    np.testing.assert_array_equal(got, reference.gather(memory, ids, geometry))
    if resident:
        gradients = draw(rng, 9, geometry.features)
        total = pallas_mosaic_tpu.scatter(gradients, ids, geometry, interpret=simulate)
        assert_within(total, *exact_scatter(gradients, ids, geometry))


# --- what the kernels leave to XLA ----------------------------------------------------------------

LINE = BlockGeometry(384, 128, 128, align=128)
FLOATS, WORDS = jax.ShapeDtypeStruct((384,), jnp.float32), jax.ShapeDtypeStruct((5,), jnp.uint32)


@pytest.mark.parametrize(
    ("backend", "op", "operands", "geometry", "named"),
    [
        (pallas_triton, "gather", (FLOATS, bits.Limbs(WORDS, WORDS)), LINE, "ids"),
        (pallas_triton, "gather", (FLOATS, jax.ShapeDtypeStruct((0,), jnp.uint32)), LINE, "ids"),
        (pallas_triton, "scatter", (jax.ShapeDtypeStruct((5, 128), jnp.float64), WORDS), LINE, "gradients"),
        (pallas_mosaic_tpu, "gather", (FLOATS, bits.Limbs(WORDS, WORDS)), LINE, "ids"),
        (pallas_mosaic_tpu, "gather", (FLOATS, WORDS), BlockGeometry(384, 128, 128), "align"),
        (pallas_mosaic_tpu, "gather", (FLOATS, WORDS), BlockGeometry(384, 128, 64, align=128), "block_size"),
        (pallas_mosaic_tpu, "gather", (FLOATS, WORDS), BlockGeometry(384, 130, 128, align=128), "features"),
        (pallas_mosaic_tpu, "gather", (FLOATS, WORDS), BlockGeometry(4096, 4096, 128, align=128), "features"),
        (
            pallas_mosaic_tpu,
            "gather",
            (FLOATS, WORDS),
            BlockGeometry(384, 128, 128, sign="element", align=128),
            "sign",
        ),
        (pallas_mosaic_tpu, "gather", (jax.ShapeDtypeStruct((384,), jnp.float16), WORDS), LINE, "memory"),
        (
            pallas_mosaic_tpu,
            "scatter",
            (jax.ShapeDtypeStruct((5, 128), jnp.float32), WORDS),
            BlockGeometry(2**24, 128, 128, align=128),
            "budget",
        ),
    ],
)
def test_refusals_name_the_argument(backend, op, operands, geometry, named):
    with pytest.raises(NotImplementedError, match=rf"\b{named}\b"):
        backend.check(op, *operands, geometry=geometry)


def test_a_kernel_asked_for_by_name_refuses_aloud():
    with pytest.raises(NotImplementedError, match="align is 1"):
        hash_gather(jnp.zeros(384), jnp.arange(3), features=128, block_size=128, implementation="pallas_mosaic_tpu")


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["auto", "reference", "xla", "pallas_triton", "pallas_mosaic_tpu"])
def test_gradients_equal_autodiff_of_the_reference(implementation):
    geometry = BlockGeometry(384, 256, 128, seed=9, sign="block", align=128)
    options = {"features": 256, "block_size": 128, "seed": 9, "sign": "block", "align": 128}
    rng = np.random.default_rng(7)
    memory, ids, weights = draw(rng, 384), draw_ids(rng, 6, 3), draw(rng, 6, 3)
    rows, bags = draw(rng, 6, 3, 256), draw(rng, 6, 256)

    def loss(memory, weights, lookup, bag):
        return (lookup(memory, ids) * rows).sum() + (bag(memory, ids, weights) * bags).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=(2, 3))
    got = gradient(
        memory,
        weights,
        functools.partial(hash_gather, **options, implementation=implementation),
        functools.partial(hash_gather_bag, **options, implementation=implementation),
    )
    expected = gradient(
        memory,
        weights,
        lambda memory, ids: reference.gather(memory, ids, geometry),
        lambda memory, ids, weights: reference.gather_bag(memory, ids, weights, geometry),
    )
    for name, one, other in zip(("memory", "weights"), got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=256 * EPS * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("weighted", [False, True])
def test_scatter_of_a_bag_is_its_transpose_in_both_directions(weighted):
    """<scatter(g), m> = <g, bag(m)>, and the gradients of the left side are the right side's factors."""
    geometry, rng = ANY_GEOMETRY["cut"], np.random.default_rng(8)
    memory, ids, bags = draw(rng, 101), draw_ids(rng, 7, 4), draw(rng, 7, 37)
    weights = draw(rng, 7, 4) if weighted else None

    def left(bags, weights):
        return jnp.vdot(api._scatter_bag(bags, ids, weights, geometry, "auto"), memory)

    def right(bags, weights):
        return jnp.vdot(bags, reference.gather_bag(memory, ids, weights, geometry))

    np.testing.assert_allclose(left(bags, weights), right(bags, weights), rtol=1e-4)
    for argument in range(1 + weighted):
        np.testing.assert_allclose(
            jax.grad(left, argument)(bags, weights), jax.grad(right, argument)(bags, weights), rtol=1e-4, atol=1e-4
        )


def test_scatter_is_linear_and_its_gradient_is_a_lookup():
    geometry, rng = ANY_GEOMETRY["edges"], np.random.default_rng(9)
    ids, memory, rows = draw_ids(rng, 7), draw(rng, 200), draw(rng, 7, 48)
    options = {"budget": 200, "block_size": 40, "seed": 4, "sign": "element", "wrap": "none", "align": 8}
    gradient = jax.grad(lambda rows: jnp.vdot(hash_scatter(rows, ids, **options), memory))(rows)
    np.testing.assert_array_equal(gradient, reference.gather(memory, ids, geometry))


@pytest.mark.parametrize("implementation", ["auto", "pallas_triton", "pallas_mosaic_tpu"])
def test_vmap_twice_over_ids(implementation):
    geometry, rng = LINE_GEOMETRY["line"], np.random.default_rng(10)
    memory, ids = draw(rng, 384), draw_ids(rng, 2, 3, 5)
    lookup = functools.partial(
        hash_gather, features=128, block_size=128, seed=5, align=128, implementation=implementation
    )
    twice = jax.jit(jax.vmap(jax.vmap(lookup, (None, 0)), (None, 0)))
    np.testing.assert_array_equal(twice(memory, ids), reference.gather(memory, ids, geometry))


@pytest.mark.parametrize("batched", [(0, None, 0), (None, 0, None)])
def test_tpu_bags_under_vmap(batched):
    """Any of memory, ids and weights may be batched, and the gradient of a batch is a batch of gradients."""
    geometry, rng = LINE_GEOMETRY["line"], np.random.default_rng(11)
    operands = [draw(rng, 2, 384), jnp.asarray(draw_ids(rng, 2, 3, 2)), draw(rng, 2, 3, 2)]
    operands = [x if axis == 0 else x[0] for x, axis in zip(operands, batched, strict=True)]
    options = {"features": 128, "block_size": 128, "seed": 5, "align": 128, "implementation": "pallas_mosaic_tpu"}

    def value_and_gradient(bag):
        return jax.jit(jax.vmap(jax.value_and_grad(lambda m, i, w: (bag(m, i, w) ** 2).sum(), (0, 2)), batched))(
            *operands
        )

    got = value_and_gradient(functools.partial(hash_gather_bag, **options))
    expected = value_and_gradient(lambda m, i, w: reference.gather_bag(m, i, w, geometry))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_backward_keeps_ids_only():
    memory, ids = jnp.ones(10_000), jnp.arange(50, dtype=jnp.int32).reshape(10, 5)
    lookup = functools.partial(hash_gather, features=64)
    bag = functools.partial(hash_gather_bag, features=64)
    for function in (lookup, bag):
        _, pull = jax.vjp(lambda memory, function=function: function(memory, ids), memory)
        kept = [leaf for leaf in jax.tree.leaves(pull) if np.size(leaf)]
        assert [np.size(leaf) for leaf in kept] == [ids.size]
    weights = jnp.ones((10, 5))
    _, pull = jax.vjp(lambda memory, weights: bag(memory, ids, weights), memory, weights)
    assert sorted(np.size(leaf) for leaf in jax.tree.leaves(pull)) == [50, 50, 10_000]  # the memory is no copy

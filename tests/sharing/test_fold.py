"""RANDOMFOLD against a loop over its definition, the tiles' geometry, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from hashml.sharing.fold import FoldSpan, fold_expand, fold_load, fold_pull
from hashml_kernels import bits
from hashml_kernels.hashed_matmul.geometry import TileGeometry, hashed_starts, sign_bits, tile_positions, tile_runs

# budget, offset, size: one weight, one slot, a span within, across and over many partitions, beyond 2**32
SPANS = [
    (7, 0, 7),
    (1, 2, 5),
    (7, 3, 50),
    (7, 3, 300),
    (100, 30, 60),
    (100, 99, 120),
    (5, 2**33 + 1, 60),
    (64, 10, 64 * 40),
    (9, 4, 1),
]


def naive(span: FoldSpan) -> tuple[np.ndarray, np.ndarray]:
    """Slots and signs, one weight at a time."""
    slots, signs = [], []
    for place in range(span.offset, span.offset + span.size):
        partition = bits.split64(np.array([place // span.budget]))
        turn = hashed_starts(partition, budget=span.budget, align=1, seed=span.seed)[0]
        slots.append((int(turn) + place % span.budget) % span.budget)
        signs.append(1 - 2 * int(bits.sign_bit(bits.split64(np.array([place])), span.seed)[0]))
    return np.array(slots), np.array(signs)


@pytest.mark.parametrize("sign", ["element", "none"])
@pytest.mark.parametrize(("budget", "offset", "size"), SPANS)
def test_equals_the_definition(budget, offset, size, sign):
    span = FoldSpan(budget, offset, size, seed=3, sign=sign)
    slots, signs = naive(span)
    signs = signs if sign == "element" else 1
    draw = np.random.default_rng(0)
    memory, gradient = (draw.normal(size=n).astype(np.float32) for n in (budget, size))
    weights = fold_expand(memory, offset=offset, size=size, seed=3, sign=sign)
    np.testing.assert_array_equal(weights, memory[slots] * signs)
    pulled = fold_pull(gradient, budget=budget, offset=offset, seed=3, sign=sign)
    expected = np.bincount(slots, gradient.astype(np.float64) * signs, budget)
    np.testing.assert_allclose(pulled, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fold_load(span), np.bincount(slots, minlength=budget))


@pytest.mark.parametrize(("budget", "offset", "size"), SPANS)
def test_is_the_fold_of_one_by_one_tiles(budget, offset, size):
    tiles = TileGeometry(budget, size, 1, tile=(1, 1), map="fold", seed=5, offset=offset)
    slots = tile_runs(tiles).start.reshape(-1)
    signs = 1 - 2 * sign_bits(tiles, tile_positions(tiles), np.uint32(0)).reshape(-1).astype(np.float32)
    memory = np.arange(1, budget + 1, dtype=np.float32)
    np.testing.assert_array_equal(fold_expand(memory, offset=offset, size=size, seed=5), memory[slots] * signs)


@settings(max_examples=50, deadline=None)
@given(budget=st.integers(1, 40), size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_every_slot_serves_floor_or_ceil(budget, size, seed):
    """Of a whole model; cut in modules, their loads add up to the same."""
    load = fold_load(FoldSpan(budget, 0, size, seed))
    assert load.sum() == size
    assert set(load) <= {size // budget, -(-size // budget)}
    cut = size // 3
    if cut:
        parts = [FoldSpan(budget, 0, cut, seed), FoldSpan(budget, cut, size - cut, seed)]
        np.testing.assert_array_equal(sum(map(fold_load, parts)), load)


def test_partitions_are_turned_independently():
    """Turns of 4,000 partitions and their differences are uniform over 10 slots: chi-square of 9 degrees."""
    turns = hashed_starts(bits.split64(np.arange(4000)), budget=10, align=1, seed=1)
    for sample in (turns, np.diff(turns) % 10, (turns[2:] - 2 * turns[1:-1] + turns[:-2]) % 10):
        counts = np.bincount(sample, minlength=10)
        assert ((counts - len(sample) / 10) ** 2 / (len(sample) / 10)).sum() < 27.9  # quantile 0.999


@pytest.mark.parametrize("size", [20, 600])  # unrolled, and by a loop
def test_gradients_of_any_order(size):
    memory = jnp.linspace(-1.0, 1.0, 13)

    def function(memory):
        return jnp.sin(fold_expand(memory, offset=5, size=size, seed=0)).sum()

    def transposed(gradient):
        return jnp.sin(fold_pull(gradient, budget=13, offset=5, seed=0)).sum()

    check_grads(function, (memory,), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)
    check_grads(transposed, (jnp.linspace(-1.0, 1.0, size),), order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("size", [20, 600])
def test_adjoint_under_jit_and_vmap(size):
    draw = np.random.default_rng(1)
    memories, gradients = (draw.normal(size=(3, n)).astype(np.float32) for n in (13, size))
    weights = jax.jit(jax.vmap(lambda m: fold_expand(m, offset=5, size=size, seed=0)))(memories)
    pulled = jax.jit(jax.vmap(lambda g: fold_pull(g, budget=13, offset=5, seed=0)))(gradients)
    np.testing.assert_allclose((weights * gradients).sum(1), (memories * pulled).sum(1), rtol=1e-4)


@pytest.mark.parametrize("size", [20, 600])
def test_under_shard_map(size):
    """A memory that every device holds, of which each sees the gradient of its own weights."""
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
    memory = jnp.linspace(-1.0, 1.0, 13)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, size)), jnp.float32)

    def loss(memory, x):
        return jax.lax.pmean((x @ fold_expand(memory, offset=5, size=size, seed=0)).mean(), "data")

    split = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    found = jax.jit(split)(memory, jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
    expected = fold_pull(x.mean(0), budget=13, offset=5, seed=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_neither_gathers_nor_scatters(size):
    def loss(memory):
        return (fold_expand(memory, offset=7, size=size, seed=0) ** 2).sum()

    text = jax.jit(jax.grad(loss)).lower(jnp.ones(500)).as_text()
    assert "gather" not in text
    assert "scatter" not in text
    assert ("dynamic_slice" in text) == (size == 100_000)


def test_sums_are_float32_and_results_of_the_memorys_dtype():
    """Sums of 1000 ones in bfloat16 would stop at 256."""
    gradient = jnp.ones(1000, jnp.bfloat16)
    pulled = fold_pull(gradient, budget=1, offset=0, seed=0, sign="none")
    assert pulled.dtype == jnp.float32
    assert pulled[0] == 1000
    memory = jnp.ones(1, jnp.bfloat16)
    found = jax.grad(lambda m: fold_expand(m, offset=0, size=1000, seed=0, sign="none").sum())(memory)
    assert found.dtype == jnp.bfloat16
    assert found[0] == 1000


REFUSED = [
    (dict(memory=np.ones(4, np.int32)), TypeError, "memory has dtype int32; it must be a float type"),
    (dict(memory=np.ones((2, 2))), ValueError, "memory has shape (2, 2); it must be a vector"),
    (dict(offset=-1), ValueError, "offset is -1; it and offset + size must lie in 0"),
    (dict(size=0), ValueError, "size is 0; it must be at least 1"),
    (dict(sign="both"), ValueError, "sign is 'both'; it must be 'element' or 'none'"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_is_refused_by_name(change, error, message):
    arguments = dict(memory=np.ones(4, np.float32), offset=0, size=3, seed=0, sign="element") | change
    # Without the annotations' own checks, which the tests turn on: as users see it.
    function = getattr(fold_expand, "__wrapped__", fold_expand)
    with pytest.raises(Exception) as raised:  # noqa: PT011 - its type and text follow
        function(arguments.pop("memory"), **arguments)
    if type(raised.value).__name__ != "TypeCheckError":  # of the span's own fields
        assert (type(raised.value), message in str(raised.value)) == (error, True)

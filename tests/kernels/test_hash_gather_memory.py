"""No array of the size of the virtual table, nor one with an entry for each of its rows, exists at run time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hashml_kernels.hash_gather import hash_gather, hash_gather_bag

ROWS, FEATURES = 188_000_000, 128  # Criteo Terabyte, as MLPerf trains it
BATCH = 2048
ROW_BYTES = 4 * BATCH * FEATURES
"""Of the rows that are looked up, the natural measure of what a lookup may hold."""


def lookup(memory, ids):
    return hash_gather(memory, ids, features=FEATURES, block_size=32)


def bag(memory, ids):
    return hash_gather_bag(memory, ids.reshape(-1, 8), features=FEATURES, block_size=32)


def gradient(function):
    def pull(memory, ids, cotangent):
        return jax.vjp(lambda memory: function(memory, ids), memory)[1](cotangent)[0]

    return pull


def held(function, *arguments, **options) -> int:
    """Bytes of a compiled program beside its arguments."""
    memory = jax.jit(function, **options).lower(*arguments).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes + memory.output_size_in_bytes


def arguments(budget: int, function, *, backward: bool, place=lambda *_: None):
    memory = jax.ShapeDtypeStruct((budget,), jnp.float32, sharding=place())
    ids = jax.ShapeDtypeStruct((BATCH,), jnp.int32, sharding=place("data"))
    out = jax.eval_shape(function, memory, ids)
    cotangent = jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=place("data"))
    return (memory, ids, cotangent) if backward else (memory, ids)


@pytest.mark.parametrize("function", [lookup, bag])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("budget", [100_000, 25_000_000])
def test_programs_hold_rows_and_memory_only(function, backward, budget):
    operands = arguments(budget, function, backward=backward)
    total = held(gradient(function) if backward else function, *operands)
    # Rows once or twice with their bases; the sum of the gradients, once more with the tail for the wrap.
    allowed = 4 * ROW_BYTES + (3 * 4 * budget if backward else 0)
    assert total <= allowed < 4 * ROWS


@pytest.mark.parametrize("backward", [False, True])
def test_a_sharded_batch_holds_no_more(backward):
    devices = np.array(jax.devices())
    assert devices.size == 8
    mesh = Mesh(devices, ("data",))

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    operands = arguments(100_000, lookup, backward=backward, place=place)
    total = held(
        gradient(lookup) if backward else lookup, *operands, out_shardings=place() if backward else place("data")
    )
    assert total <= 4 * ROW_BYTES + (3 * 4 * 100_000 if backward else 0)


def test_ids_up_to_the_last_row_are_looked_up():
    memory = jnp.arange(100_000.0)
    rows = lookup(memory, jnp.array([0, ROWS - 1, 2**31 - 1], jnp.int32))
    assert rows.shape == (3, FEATURES)
    starts = np.asarray(rows).reshape(3, -1, 32)
    np.testing.assert_array_equal(np.diff(starts, axis=-1) % 100_000, 1)  # runs of one memory

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hashml.accounting import compression, format_bytes, stored_bytes


def test_counts_every_array_leaf():
    tree = {
        "table": jnp.zeros((10, 4), jnp.float32),
        "nested": [np.zeros(3, np.int64), (jnp.zeros((), jnp.bfloat16), None)],
        "mask": np.zeros(5, bool),
        "scale": np.float16(2),
    }
    assert stored_bytes(tree) == 160 + 24 + 2 + 5 + 2


@pytest.mark.parametrize("tree", [None, {}, [], {"a": (), "b": None}, jnp.zeros((0, 7))])
def test_nothing_stored_is_no_bytes(tree):
    assert stored_bytes(tree) == 0


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("int2", 2),
        ("uint2", 2),
        ("int4", 4),
        ("uint4", 4),
        ("float4_e2m1fn", 4),
        ("float8_e4m3fn", 8),
        ("int8", 8),
        ("bool", 8),
        ("bfloat16", 16),
        ("float32", 32),
        ("complex64", 64),
    ],
)
@pytest.mark.parametrize("size", [0, 1, 2, 5, 16])
def test_narrow_types_count_their_real_bits(dtype, bits, size):
    assert stored_bytes(jnp.zeros(size, dtype)) == -(-size * bits // 8)


@given(st.lists(st.integers(0, 7), max_size=4), st.sampled_from(["float32", "float16", "int8", "uint32"]))
def test_equals_numpy_for_whole_bytes(shape, dtype):
    assert stored_bytes(np.zeros(shape, dtype)) == np.zeros(shape, dtype).nbytes


def test_abstract_and_traced_arrays_count_as_concrete_ones():
    def init():
        return {"w": jnp.ones((3, 5)), "key": jax.random.key(0)}

    assert stored_bytes(jax.eval_shape(init)) == stored_bytes(init()) == 60 + 8
    seen = []
    jax.jit(lambda x: seen.append(stored_bytes({"x": x})))(jnp.ones((3, 5)))
    assert seen == [60]


def test_optimizer_state_is_counted_too():
    params = {"w": jnp.zeros((8, 8)), "b": jnp.zeros(8)}
    state = optax.adam(0.1).init(params)  # two moments and an int32 step
    assert stored_bytes(state) == 2 * stored_bytes(params) + 4


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": {"b": [jnp.ones(2), 3.0]}}, r"tree\['a'\]\['b'\]\[1\] is of type float"),
        ({"seed": 7}, r"tree\['seed'\] is of type int"),
        ("weights", "tree is of type str"),
        ({"a": np.array([None, 1])}, r"tree\['a'\] is an array of Python objects"),
    ],
)
def test_a_leaf_that_is_no_array_is_named(tree, place):
    with pytest.raises(TypeError, match=place):
        stored_bytes(tree)


def test_compression_is_a_quotient_of_bytes_and_not_of_entries():
    dense = {"table": jnp.zeros((1000, 16))}
    stored = {"codes": jnp.zeros((1000, 16), jnp.int4), "scale": jnp.zeros(1000)}
    assert compression(dense, stored) == 64000 / (8000 + 4000)
    assert compression(dense, dense) == 1.0


def test_compression_into_nothing_is_refused():
    with pytest.raises(ValueError, match="stored_tree holds 0 bytes"):
        compression({"w": jnp.ones(3)}, {})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10239, "10.0 KiB"),
        (102399, "100 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (2**20 - 1, "1.00 MiB"),
        (96136908288, "89.5 GiB"),
        (2**70, "1048576 PiB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(st.integers(1024, 2**55))
def test_format_bytes_keeps_three_digits(count):
    number, unit = format_bytes(count).split()
    exponent = ["KiB", "MiB", "GiB", "TiB", "PiB"].index(unit) + 1
    assert abs(float(number) * 1024**exponent - count) <= 0.005 * count
    assert len(number) <= 4


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count is -1"):
        format_bytes(-1)
